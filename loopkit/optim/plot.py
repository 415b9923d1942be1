"""Drawing schedules."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loopkit.check import at_least_one
from loopkit.errors import UsageError
from loopkit.extras import extra
from loopkit.optim.schedule import Schedule

Function = Callable[[int], float]


def plot_schedule(
    schedules: Function | Mapping[str, Function], path: str | Path, *, steps: int | None = None
) -> Path:
    """Draw a schedule, or several by name one under the other, to an image file.

    Args:
        schedules: A schedule or any function of the update count, or several by name.
        path: Where to write; the suffix says what: `.png`, `.svg`, `.pdf`.
        steps: How many updates to draw; by default up to the end of the longest schedule.

    Returns:
        The path.

    Raises:
        UsageError: If nothing is given, or no schedule has an end and `steps` is not given.
        MissingExtraError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from loopkit.optim.phases import cosine, warmup
        >>> lr = warmup(100, peak=3e-4) >> cosine(900)
        >>> plot_schedule(lr, Path(tempfile.mkdtemp()) / "lr.png").name
        'lr.png'
    """
    call = f"plot_schedule(..., {str(path)!r})"
    named = schedules if isinstance(schedules, Mapping) else {}
    curves = {"": schedules} if callable(schedules) else {**named}
    if not curves or not all(map(callable, curves.values())):
        raise UsageError(
            call,
            f"{schedules!r:.60}",
            'a schedule, or several by name: {"lr": warmup(100, peak=3e-4) >> cosine(900)}',
        )
    last = _last(call, curves) if steps is None else at_least_one(call, "steps", steps)
    # Not pyplot: that would choose a backend for the whole process.
    figure = extra("matplotlib.figure", package="matplotlib", wrote=call).Figure(
        figsize=(8, 1 + 2.4 * len(curves)), layout="constrained"
    )
    axes = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axis, (name, function) in zip(axes, curves.items(), strict=True):
        _draw(axis, name, function, last)
    axes[-1].set_xlabel("update")
    figure.align_ylabels()
    figure.savefig(path, dpi=150)
    return Path(path)


def _last(call: str, curves: Mapping[str, Function]) -> int:
    lengths = [sum(f.lengths()) for f in curves.values() if isinstance(f, Schedule)]
    ends = [int(length) for length in lengths if math.isfinite(length)]
    if not ends:
        raise UsageError(call, "schedules without an end", "steps=1000, or as many as to draw")
    return max(*ends, 1)


def _draw(axis: Any, name: str, function: Function, last: int) -> None:
    at_most = 5000  # points; more than a screen has
    counts = range(0, last + 1, math.ceil((last + 1) / at_most))
    axis.plot(counts, [function(n) for n in counts], linewidth=1.8)
    axis.set_ylabel(name or "value")
    axis.margins(x=0, y=0.06)
    axis.ticklabel_format(axis="y", scilimits=(-2, 4))
    axis.grid(alpha=0.3)
    axis.set_title(f"{function!r:.110}" if isinstance(function, Schedule) else "", fontsize=9)
