"""Progress round a run, and round the batches of an evaluation."""

import contextlib
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import attrs

from loopkit.check import near, positive
from loopkit.errors import UsageError
from loopkit.feed import reading
from loopkit.limits import known_length
from loopkit.observe.display import Bar, Display, Lines, Pace, Shown, amount, is_fancy
from loopkit.observe.fetch import Fetched, fetch
from loopkit.ranks import is_main_rank
from loopkit.state import TrainState
from loopkit.updates import Adapted, check_updates


@attrs.define
class Rates:
    """Updates and samples per second, by wall time, from after the first update."""

    started: float | None = None
    step: int = 0
    samples: int = 0

    def of(self, state: TrainState, now: float) -> tuple[float, float]:
        """Updates and samples per second so far; zeros at the first call, which starts the clock.

        The first update is slow for reasons of its own (compiling, growing memory), and an
        estimate that counted it would promise too little for long.
        """
        if self.started is None:
            self.started, self.step, self.samples = now, state.step, state.samples
            return 0.0, 0.0
        passed = max(now - self.started, 1e-9)
        return (state.step - self.step) / passed, (state.samples - self.samples) / passed


@attrs.define
class Frame:
    """What is to be shown of one update, when its numbers have arrived from the device."""

    epoch: int
    step: int
    rates: tuple[float, float]
    values: Fetched

    def shown(self, total: int | None) -> Shown:
        """As a bar shows it; this waits for numbers that are still on their way."""
        parts = [
            f"{name} {value if isinstance(value, str) else amount(value)}"
            for name, value in self.values.values().items()
        ]
        remaining = None
        if self.rates[0]:
            parts += [f"{amount(self.rates[0])} it/s", f"{amount(self.rates[1])} samples/s"]
            remaining = (total - self.step) / self.rates[0] if total else None
        return Shown(f"epoch {self.epoch}", self.step, total, tuple(parts), remaining)


def progress(
    updates: Iterable[TrainState],
    *,
    show: Iterable[str] = (),
    every_s: float = 0.2,
    file: Any = None,
) -> Adapted:
    """Show how far a run is: epoch, step, loss, learning rate, speed, and the time that is left.

    A bar on a terminal (with rich installed; a narrow one shows less), else a line every ten
    seconds. Numbers are copied from the device in the background, and shown when they have
    arrived. One rank shows it.

    Args:
        updates: A run, or any iterator of states.
        show: Names of `state.metrics` to show as well.
        every_s: Seconds between two redraws of the bar.
        file: Where it is shown; standard error by default.

    Returns:
        An iterator of the states of `updates`, and context manager, with its `.total_steps`.

    Raises:
        UsageError: If `every_s` is not above 0; at the first update, for a name that
            `state.metrics` does not have.

    Example:
        >>> list(progress([]))
        []
    """
    positive(f"progress(every_s={every_s})", "every_s", every_s)
    check_updates("progress", updates)
    if not is_main_rank():
        return Adapted(updates, _passed(updates))
    total = getattr(updates, "total_steps", None)
    return Adapted(updates, _shown(updates, tuple(show), _file(file), every_s, total))


def _passed(updates: Iterable[TrainState]) -> Generator[TrainState]:
    yield from updates


def _file(given: Any) -> Any:
    return sys.stderr if given is None else given


def _display(file: Any, every_s: float, *, nested: bool = False) -> Display:
    return Bar(file, every_s) if is_fancy(file) else Lines(file, nested)


def _shown(
    updates: Iterable[TrainState], names: tuple[str, ...], file: Any, every_s: float, total: Any
) -> Generator[TrainState]:
    rates, last, epoch = Rates(), -1, 0
    state: TrainState | None = None
    frame: Frame | None = None
    with contextlib.closing(_display(file, every_s)) as display:
        pace = Pace(display.every_s)
        try:
            for state in updates:
                epoch = state.epoch  # at the end of the run it is one more
                if frame is None and pace.is_due():
                    frame = _frame(state, rates, names)
                if frame is not None and frame.values.ready():
                    display.show(frame.shown(total))
                    last, frame = frame.step, None
                yield state
        finally:
            if state is not None and last != state.step:
                frame = attrs.evolve(_frame(state, rates, names), epoch=epoch)
                display.show(frame.shown(total))


def _frame(state: TrainState, rates: Rates, names: tuple[str, ...]) -> Frame:
    values = {"loss": state.loss, **{name: _metric(state, name) for name in names}}
    if state.lr is not None:
        values.setdefault("lr", state.lr)
    speed = rates.of(state, time.monotonic())
    return Frame(state.epoch, state.step, speed, fetch("progress(run)", values))


def _metric(state: TrainState, name: str) -> Any:
    metrics = state.metrics
    if name in metrics:
        return metrics[name]
    call, found = f"progress(run, show=[{name!r}])", f"state.metrics without it: {sorted(metrics)}"
    if state.output is not None and name in state.output:
        raise UsageError(
            call,
            f"{found}; in the step function's mapping it is {_described(state.output[name])}",
            f"{name!r} as a number there, or a 0-d tensor, such as {name}.mean()",
        )
    raise UsageError(
        call,
        found,
        f"{near(name, metrics)}, or {name!r} as a number in the step function's mapping",
    )


def _described(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"a {type(value).__name__}{shape}"


class Counted:
    """Data that shows how far one is through it; made by `bar`.

    Everything else is the data's own: its length, its samplers and generators.

    Attributes:
        data: The data.
    """

    def __init__(self, data: Iterable[Any], label: str, every_s: float, file: Any) -> None:
        self.data = data
        self._label, self._every_s, self._file = label, every_s, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["data"], name)

    def __len__(self) -> int:
        return known_length(self.data)  # type: ignore[return-value] # None is a TypeError, of len()

    def __iter__(self) -> Iterator[Any]:
        if not is_main_rank():
            return iter(self.data)
        return _counted(self.data, self._label, self._every_s, _file(self._file))


def bar(
    data: Iterable[Any], label: str = "batches", *, every_s: float = 0.2, file: Any = None
) -> Any:
    """Show how far an evaluation is: a bar under that of the run, gone when it is over.

    `lk.evaluate(eval_step, state, lk.bar(val_loader, "val"))`. Into a file or a pipe it
    writes a line only where it takes more than ten seconds.

    Args:
        data: Any iterable of batches, for `evaluate`, `predict` or a loop of your own.
        label: What is shown before it.
        every_s: Seconds between two redraws.
        file: Where it is shown; standard error by default.

    Returns:
        The same data, which can be iterated over as often as it could.

    Raises:
        UsageError: If `every_s` is not above 0, or the data is nothing to iterate over.

    Example:
        >>> import io
        >>> list(bar([1, 2, 3], "val", file=io.StringIO()))
        [1, 2, 3]
    """
    positive(f"bar(data, every_s={every_s})", "every_s", every_s)
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise UsageError("bar(data)", f"a {type(data).__name__}", "a loader: bar(val_loader)")
    return Counted(data, label, every_s, file)


def _counted(data: Iterable[Any], label: str, every_s: float, file: Any) -> Generator[Any]:
    total, started = known_length(data), time.monotonic()
    with contextlib.closing(_display(file, every_s, nested=True)) as display:
        pace = Pace(display.every_s)
        pace.is_due()
        if isinstance(display, Bar):
            display.show(Shown(label, 0, total))
        with reading(data) as batches:
            for done, batch in enumerate(batches, 1):
                if pace.is_due():
                    rate = done / max(time.monotonic() - started, 1e-9)
                    remaining = (total - done) / rate if total else None
                    display.show(Shown(label, done, total, (f"{amount(rate)} it/s",), remaining))
                yield batch
