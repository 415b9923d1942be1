"""Profilers round a run."""

import cProfile
import io
import pstats
import warnings
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import attrs
import torch

from loopkit.check import at_least_one, one_of
from loopkit.errors import UsageError
from loopkit.ranks import is_main_rank
from loopkit.state import TrainState
from loopkit.updates import Adapted, check_updates

ROWS = 30


@attrs.define
class Profile:
    """What a profiler found.

    Attributes:
        dir: Where its files are written.
        traces: Chrome traces that were written.
        table: Functions or operations by the time they took.
    """

    dir: Path
    traces: list[Path] = attrs.field(factory=list)
    table: str = ""

    def write_table(self, table: str) -> None:
        """Keep the table, and write it to `profile.txt`."""
        self.table = table
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "profile.txt").write_text(table + "\n")


class Profiled(Adapted):
    """The states of a run that is profiled; made by `profile`."""

    def __init__(
        self, run: Iterable[TrainState], states: Generator[TrainState], profile: Profile
    ) -> None:
        super().__init__(run, states)
        self._profile = profile

    @property
    def traces(self) -> list[Path]:
        """Chrome traces that were written so far."""
        return self._profile.traces

    @property
    def table(self) -> str:
        """Functions or operations by the time they took; empty before that is known."""
        return self._profile.table


def profile(
    run: Iterable[TrainState],
    dir: str | Path,  # noqa: A002
    *,
    kind: str = "torch",
    wait: int = 1,
    warmup: int = 1,
    active: int = 3,
    repeat: int = 1,
    **settings: Any,
) -> Profiled:
    """Profile some updates of a run, and write what was found into a folder.

    By default torch's profiler: of `repeat` cycles of `wait + warmup + active` updates it
    records the `active` ones, each cycle as a Chrome trace (`trace-<update>.json`, for
    Perfetto or chrome://tracing), and the operations by time in `profile.txt`. What comes after
    costs nothing. With `kind="python"` Python's own profiler records all updates, without the
    loop's body, by function. Which share goes to data, forward, backward and update is quicker
    told by `Timing`. One rank is profiled.

    Args:
        run: A run, or any iterator of states.
        dir: Where the files go; made if it is not there.
        kind: `"torch"` or `"python"`.
        wait: Updates to let pass, of each cycle.
        warmup: Updates with the profiler on that are thrown away, for its start is slow.
        active: Updates that are recorded.
        repeat: Cycles; 0 until the run ends.
        **settings: More of `torch.profiler.profile`: `with_stack`, `profile_memory`, ...

    Returns:
        An iterator of the states, with `.traces` and `.table`.

    Raises:
        UsageError: For settings that cannot be right.

    Example:
        >>> import tempfile
        >>> [*profile([], tempfile.mkdtemp())]
        []

    Source: https://docs.pytorch.org/docs/stable/profiler.html, docs.python.org/3/library/profile
    """
    check_updates("profile", run)
    one_of(f"profile(run, dir, kind={kind!r})", "kind", kind, ("torch", "python"))
    for name, number in {"wait": wait, "warmup": warmup, "repeat": repeat}.items():
        if number != 0:
            at_least_one(f"profile(run, dir, {name}={number!r})", name, number)
    at_least_one(f"profile(run, dir, active={active!r})", "active", active)
    found = Profile(Path(dir))
    if not is_main_rank():
        states = _passed(run)
    elif kind == "python":
        if settings:
            raise UsageError(
                'profile(run, dir, kind="python", ...)', f"{sorted(settings)}", "no more settings"
            )
        states = _by_python(run, found)
    else:
        schedule = torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=repeat)
        states = _by_torch(run, found, schedule, settings)
    return Profiled(run, states, found)


def _passed(run: Iterable[TrainState]) -> Generator[TrainState]:
    yield from run


@attrs.define
class Write:
    """Writes what torch's profiler recorded in a cycle."""

    found: Profile

    def __call__(self, profiler: Any) -> None:
        """Write the trace and the table."""
        self.found.dir.mkdir(parents=True, exist_ok=True)
        path = self.found.dir / f"trace-{profiler.step_num}.json"
        profiler.export_chrome_trace(str(path))
        self.found.traces.append(path)
        on_device = any(event.device_time_total for event in profiler.key_averages())
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        self.found.write_table(profiler.key_averages().table(sort_by=order, row_limit=ROWS))


def _by_torch(
    run: Iterable[TrainState], found: Profile, schedule: Any, settings: dict[str, Any]
) -> Generator[TrainState]:
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=Write(found), **settings
    ) as profiler:
        for state in run:
            yield state
            with warnings.catch_warnings():
                # Where warnings are errors this one, of the second cycle, would leave torch's
                # profiler half started, which crashes the process when it stops (torch 2.13).
                warnings.filterwarnings("ignore", message=".*clears events at the end of each")
                profiler.step()


def _by_python(run: Iterable[TrainState], found: Profile) -> Generator[TrainState]:
    profiler, states = cProfile.Profile(), iter(run)
    try:
        while True:
            profiler.enable()
            state = next(states, None)
            profiler.disable()
            if state is None:
                return
            yield state
    finally:
        text = io.StringIO()
        try:
            pstats.Stats(profiler, stream=text).sort_stats("cumulative").print_stats(ROWS)
        except TypeError:  # nothing was recorded
            text.write("no update was made")
        found.write_table(text.getvalue().strip())
