"""Curves of runs as pictures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loopkit.check import fraction, near
from loopkit.errors import UsageError
from loopkit.extras import extra
from loopkit.observe.files import CLOCK, read_records

Curve = tuple[list[float], list[float]]
FILES = ("metrics.jsonl", "metrics.csv")
AXES = {"step": "update", "epoch": "epoch", "samples": "samples", "time": "minutes"}


def plot(
    runs: str | Path | Sequence[str | Path],
    path: str | Path | None = None,
    *,
    metrics: Iterable[str] | None = None,
    x: str = "step",
    smooth: float = 0.0,
) -> Path:
    r"""Draw the curves of one or several runs, from what `JSONL` or `CSV` wrote, to an image.

    A panel for each metric; `loss` and `val/loss` share one. Several runs have a colour each.
    NaN and infinity leave a gap, which a cross at the edge marks.

    Args:
        runs: The folder of a run, its `metrics.jsonl` or `.csv`, or several of them.
        path: Where to write: `.png`, `.svg`, `.pdf`; by default `curves.png` in the first folder.
        metrics: Which, such as `["loss", "val/loss"]`; by default all.
        x: `"step"`, `"epoch"`, `"samples"`, or `"time"`, in minutes since the run's first record.
        smooth: From 0 to 1: how much of the average so far each point keeps; the points
            themselves stay, pale. Learning rates, and curves of fewer than 30 points, are no
            noise, and stay as they are.

    Returns:
        The path.

    Raises:
        UsageError: For a folder without records, or metrics that no run has.
        MissingExtraError: If matplotlib is not installed.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> lines = [json.dumps({"step": n, "loss": 1 / n}) for n in range(1, 9)]
        >>> _ = (folder / "metrics.jsonl").write_text("\n".join(lines))
        >>> plot(folder).name
        'curves.png'
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [*map(Path, runs)]
    call = f"plot({', '.join(map(str, folders)):.80})"
    fraction(call, "smooth", smooth)
    if x not in AXES or not folders:
        raise UsageError(call, f"x = {x!r}, {len(folders)} runs", f"a run, and x={near(x, AXES)}")
    files = {name: _file(call, folder) for name, folder in _labels(folders).items()}
    found = {name: _curves(file, x) for name, file in files.items()}
    panels = _panels(call, found, None if metrics is None else [*metrics])
    target = Path(path) if path is not None else next(iter(files.values())).parent / "curves.png"
    _draw(call, found, panels, AXES[x], smooth).savefig(target, dpi=150)
    return target


def _labels(folders: list[Path]) -> dict[str, Path]:
    """The shortest ends of the paths by which the runs differ."""
    for length in range(1, max(len(f.parts) for f in folders) + 1):
        names = {"/".join(folder.parts[-length:]): folder for folder in folders}
        if len(names) == len(folders):
            return names
    return {str(folder): folder for folder in folders}


def _file(call: str, path: Path) -> Path:
    candidates = [path] if path.is_file() else [path / name for name in FILES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UsageError(
        call,
        f"neither {' nor '.join(FILES)} in {path}",
        'the folder of a run that was logged: lk.Log("runs/a", lk.JSONL())',
    )


def _curves(file: Path, x: str) -> dict[str, Curve]:
    curves: dict[str, dict[float, float]] = {}
    start = None
    for row in read_records(file):
        at = _number(row.get(x))
        if at is None:
            continue
        if x == "time":
            start = at if start is None else start
            at = (at - start) / 60
        for name, cell in row.items():
            value = None if name in CLOCK else _number(cell)
            if value is not None:
                curves.setdefault(name, {})[at] = value
    return {name: ([*points], [*points.values()]) for name, points in curves.items()}


def _number(cell: Any) -> float | None:
    try:
        return None if cell is None or isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        return None


def _panels(
    call: str, found: Mapping[str, Mapping[str, Curve]], wanted: list[str] | None
) -> dict[str, list[str]]:
    """The metrics of each panel, by the last word of their names."""
    there = dict.fromkeys(name for curves in found.values() for name in curves)
    missing = [name for name in wanted or [] if name not in there]
    if missing or not there:
        raise UsageError(
            call,
            f"no {missing[0]!r} in {', '.join(found)}" if missing else "no number in any record",
            near(missing[0], there) if missing and there else "a run that logged numbers",
        )
    panels: dict[str, list[str]] = {}
    for name in wanted or there:
        group, _, last = name.rpartition("/")
        shared = last if not group or last in there or not last.isdigit() else group
        panels.setdefault(shared, []).append(name)
    return panels


def _draw(
    call: str,
    found: Mapping[str, Mapping[str, Curve]],
    panels: dict[str, list[str]],
    label: str,
    smooth: float,
) -> Any:
    across = 1 if len(panels) == 1 else 2
    down = math.ceil(len(panels) / across)
    # Not pyplot: that would choose a backend for the whole process.
    figure = extra("matplotlib.figure", package="matplotlib", wrote=call).Figure(
        figsize=(5.2 * across + 1, 3 * down + 0.4), layout="constrained"
    )
    axes = [*figure.subplots(down, across, squeeze=False).flat]
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, title, names, found, smooth)
        axis.set_xlabel(label)
    shown = axes[: len(panels)]
    for axis in axes[len(panels) :]:
        axis.remove()
    ends = [axis.get_xlim() for axis in shown]
    for axis in shown:  # one scale, for panels are compared
        axis.set_xlim(min(low for low, _ in ends), max(high for _, high in ends))
    return figure


def _draw_panel(
    axis: Any,
    title: str,
    names: list[str],
    found: Mapping[str, Mapping[str, Curve]],
    smooth: float,
) -> None:
    lines = 0
    for colour, (run, curves) in enumerate(found.items()):
        for style, name in enumerate(n for n in names if n in curves):
            label = " ".join([run] * (len(found) > 1) + [name] * (len(names) > 1))
            one = len(found) == 1
            keep = 0.0 if _is_exact(name, curves[name]) else smooth
            _draw_curve(
                axis, curves[name], keep, label, f"C{(style if one else colour) % 10}",
                "-" if one else ("-", "--", ":", "-.")[style % 4],
            )  # fmt: skip
            lines += 1
    axis.set_title(title if len(names) > 1 else names[0], fontsize=11)
    axis.grid(alpha=0.3)
    axis.margins(x=0.02)
    axis.ticklabel_format(axis="y", scilimits=(-3, 4))
    if lines > 1:
        axis.legend(fontsize=8)


def _draw_curve(
    axis: Any, curve: Curve, smooth: float, label: str, colour: str, style: str
) -> None:
    xs, ys = curve
    finite = [y if math.isfinite(y) else math.nan for y in ys]
    settings = {"color": colour, "linestyle": style, "marker": "o" if len(xs) < 3 else None}
    if smooth:
        axis.plot(xs, finite, **settings, linewidth=0.8, alpha=0.25)
        axis.plot(xs, _smoothed(finite, smooth), **settings, linewidth=1.8, label=label)
    else:
        axis.plot(xs, finite, **settings, linewidth=1.6, label=label)
    if lost := [x for x, y in zip(xs, ys, strict=True) if not math.isfinite(y)]:
        axis.plot(lost, [0.97] * len(lost), "x", color=colour, transform=axis.get_xaxis_transform())


def _is_exact(name: str, curve: Curve) -> bool:
    return len(curve[0]) < 30 or name.partition("/")[0] == "lr"


def _smoothed(ys: list[float], keep: float) -> list[float]:
    """An exponential average, without the pull of its start: as Adam corrects its moments."""
    smoothed, total, weight = [], 0.0, 0.0
    for y in ys:
        if math.isfinite(y):
            total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append(total / weight if weight else math.nan)
    return smoothed
