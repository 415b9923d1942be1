"""Where the time of a training goes: data, forward, backward, update."""

import functools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any, overload

import attrs
import torch

from loopkit.check import at_least_one
from loopkit.compose import Decorator, wrap
from loopkit.errors import UsageError
from loopkit.observe.stopwatch import Mark, is_past, mark, since
from loopkit.state import TrainState
from loopkit.step import Step
from loopkit.types import Backward, Forward, Split, StepFunction, Transform
from loopkit.updates import Adapted, Updates
from loopkit.window import MicroBatches

PARTS = ("data", "forward", "backward", "update", "loop")


@attrs.define
class Lap:
    """One update: its moments, and the stretches of its step that were told apart.

    Attributes:
        begin: When the run went for it; without a timed run, when its step began.
        by_run: Whether a timed run said so.
        step: Begin and end of the step, if that is timed.
        end: When the run had it.
        loop_end: When the loop's body was through with it.
        parts: Name, begin and end of the stretches within the step.
    """

    begin: Mark
    by_run: bool
    step: tuple[Mark, Mark] | None = None
    end: Mark | None = None
    loop_end: Mark | None = None
    parts: list[tuple[str, Mark, Mark]] = attrs.field(factory=list)

    def seconds(self) -> dict[str, float]:
        """Seconds of each part; all moments must be past."""
        end = self.end or self.begin
        whole = since(self.begin, end)
        spent = {} if self.step is None else {"forward": 0.0, "backward": 0.0}
        for name, start, stop in self.parts:
            spent[name] = spent.get(name, 0.0) + since(start, stop)
        step = whole if self.step is None else since(*self.step)
        spent["update"] = step - sum(spent.values())
        if self.by_run and self.step is not None:
            spent["data"] = spent.get("data", 0.0) + whole - step
        if self.loop_end is not None:
            spent["loop"] = since(end, self.loop_end)
        return {name: max(spent[name], 0.0) for name in PARTS if name in spent}


@attrs.define(eq=False)
class Timing:
    """Measures which share of a training goes to data, forward, backward and update.

    Call it on the step, on the run, or on both: the step tells forward, backward and update
    (clipping, the optimizer, averages) apart, the run adds the waiting for data, and `loop`,
    the time of the loop's own body. On an accelerator the times are the device's own, taken by
    events that nothing waits for; the clock of the first updates is left out.

    Args:
        warmup: Updates to leave out.

    Raises:
        UsageError: If what it is called on is neither a step nor a run.

    Example:
        >>> import loopkit as lk
        >>> timing = Timing()
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> step = timing(lambda state, x: state.model(x).mean())
        >>> for state in timing(lk.run(step, state, [torch.ones(4, 2)] * 3, max_epochs=1)):
        ...     pass
        >>> timing.updates, [*timing.shares]
        (2, ['data', 'forward', 'backward', 'update', 'loop'])
    """

    warmup: int = 1
    _counted: int = attrs.field(default=0, init=False, repr=False)
    _totals: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)
    _waiting: deque[Lap] = attrs.field(factory=deque, init=False, repr=False)
    _lap: Lap | None = attrs.field(default=None, init=False, repr=False)
    _skipped: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.warmup != 0:
            at_least_one(f"Timing(warmup={self.warmup!r})", "warmup", self.warmup)

    @overload
    def __call__(self, timed: Step | StepFunction) -> Step: ...

    @overload
    def __call__(self, timed: Iterable[TrainState]) -> Adapted: ...

    def __call__(self, timed: Any) -> Step | Adapted:
        """The same step, or run, with its times taken."""
        if isinstance(timed, Step) or (callable(timed) and not isinstance(timed, type | Decorator)):
            return self._decorator()(timed)
        if isinstance(timed, Updates | Iterable):
            return Adapted(timed, _timed(timed, self))
        raise UsageError(
            "Timing()(...)", f"a {type(timed).__name__}", "a step, or a run: timing(lk.run(...))"
        )

    @property
    def updates(self) -> int:
        """Updates that were measured."""
        self._settle()
        return self._counted

    @property
    def seconds(self) -> dict[str, float]:
        """Mean seconds of an update, by part."""
        updates = max(self.updates, 1)
        return {name: total / updates for name, total in self._ordered().items()}

    @property
    def shares(self) -> dict[str, float]:
        """Share of the whole, by part; they add up to 1."""
        seconds = self.seconds
        whole = sum(seconds.values()) or 1.0
        return {name: value / whole for name, value in seconds.items()}

    def __str__(self) -> str:
        seconds, shares = self.seconds, self.shares
        lines = [f"{'part':<10}{'ms / update':>12}{'share':>9}"]
        lines += [f"{n:<10}{seconds[n] * 1e3:>12.3f}{shares[n]:>9.1%}" for n in seconds]
        lines += [f"{'sum':<10}{sum(seconds.values()) * 1e3:>12.3f}    over {self.updates} updates"]
        return "\n".join(lines)

    # What the layers and the adaptor tell it

    def begins(self, now: Mark, *, by_run: bool) -> None:
        """An update begins: for a run, with its reading of data."""
        if by_run and self._waiting:
            self._waiting[-1].loop_end = now
        if by_run or self._lap is None or not self._lap.by_run:
            self._lap = Lap(now, by_run)

    def had(self, name: str, start: Mark, device: torch.device) -> None:
        """A stretch of the step is over."""
        if self._lap is not None:
            self._lap.parts.append((name, start, mark(device)))

    def step_begins(self, now: Mark) -> None:
        """The step begins; where no run is timed, so does the update."""
        self.begins(now, by_run=False)
        if self._lap is not None:
            self._lap.step = now, now

    def step_ends(self, now: Mark) -> None:
        """The step is over; where no run is timed, so is the update."""
        if self._lap is not None and self._lap.step is not None:
            self._lap.step = self._lap.step[0], now
            if not self._lap.by_run:
                self.ends(now)

    def ends(self, now: Mark) -> None:
        """The update is over."""
        lap, self._lap = self._lap, None
        if lap is None:
            return
        lap.end = now
        if self._skipped < self.warmup:
            self._skipped += 1
            return
        self._waiting.append(lap)
        while len(self._waiting) > 1 and is_past(self._latest()):
            self._count(self._waiting.popleft())

    def drop(self) -> None:
        """What has begun does not end."""
        self._lap = None

    def _latest(self) -> Mark:
        """The last moment of the first lap that waits; the last lap may still get its loop's."""
        lap = self._waiting[0]
        return lap.loop_end or lap.end or lap.begin

    def _settle(self) -> None:
        """Count all that is there, waiting for the device."""
        if self._waiting and isinstance(self._latest(), torch.Event):
            torch.accelerator.synchronize()
        while self._waiting:
            self._count(self._waiting.popleft())

    def _ordered(self) -> dict[str, float]:
        return {name: self._totals[name] for name in PARTS if name in self._totals}

    def _count(self, lap: Lap) -> None:
        for name, seconds in lap.seconds().items():
            self._totals[name] = self._totals.get(name, 0.0) + seconds
        self._counted += 1

    def _decorator(self) -> Decorator:
        return wrap(
            name="timing",
            split=functools.partial(TimeSplit, timing=self),
            forward=functools.partial(TimeForward, timing=self),
            backward=functools.partial(TimeBackward, timing=self),
            after=functools.partial(TimeAfter, timing=self),
        )


@attrs.frozen
class TimeSplit:
    """The layer that sees a step begin, and times the reading of a lazy window."""

    inner: Split
    timing: Timing

    def __call__(self, state: TrainState, batch: Any) -> MicroBatches:
        """The micro-batches."""
        now = mark(state.device)
        self.timing.step_begins(now)
        batches, count = self.inner(state, batch)
        if isinstance(batches, tuple | list):
            return batches, count
        return TimedBatches(batches, self.timing, state.device), count


@attrs.frozen
class TimedBatches:
    """Micro-batches whose reading is timed."""

    batches: Any
    timing: Timing
    device: torch.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __iter__(self) -> Iterator[Any]:
        batches, nothing = iter(self.batches), object()
        while True:
            start = mark(self.device)
            batch = next(batches, nothing)
            self.timing.had("data", start, self.device)
            if batch is nothing:
                return
            yield batch


@attrs.frozen
class TimeForward:
    """The layer round the step function."""

    inner: Forward
    timing: Timing

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """What the step function returns."""
        start = mark(state.device)
        output = self.inner(state, batch)
        self.timing.had("forward", start, state.device)
        return output


@attrs.frozen
class TimeBackward:
    """The layer round the backward pass."""

    inner: Backward
    timing: Timing

    def __call__(self, state: TrainState, loss: torch.Tensor) -> None:
        """Run it."""
        start = mark(state.device)
        self.inner(state, loss)
        self.timing.had("backward", start, state.device)


@attrs.frozen
class TimeAfter:
    """The layer that sees a step end."""

    inner: Transform
    timing: Timing

    def __call__(self, state: TrainState) -> None:
        """Do what follows an update first."""
        self.inner(state)
        self.timing.step_ends(mark(state.device))


def _timed(run: Iterable[TrainState], timing: Timing) -> Generator[TrainState]:
    states, state = iter(run), getattr(run, "state", None)
    try:
        while True:
            if state is not None:
                timing.begins(mark(state.device), by_run=True)
            state = next(states, None)
            if state is None:
                return
            timing.ends(mark(state.device))
            yield state
    finally:
        timing.drop()
