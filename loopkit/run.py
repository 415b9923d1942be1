"""The loop: a thin iterator that calls the step and yields the state after each update."""

import functools
import math
import time
import warnings
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import attrs
from loguru import logger

from loopkit.compose import train_step
from loopkit.errors import DataError, UsageError
from loopkit.feed import check_exhausted, feed_sized, feed_unsized, reading
from loopkit.given import check_data
from loopkit.interrupt import Interruptible
from loopkit.limits import Limits, Time, empty, known_length
from loopkit.opening import opened, read_again
from loopkit.position import Position, moved, take_up
from loopkit.state import TrainState
from loopkit.step import Step
from loopkit.types import StepFunction
from loopkit.updates import Updates
from loopkit.window import Ahead, Window


@attrs.define
class Clock:
    """What a window schedule may look at, for an estimate."""

    step: int
    epoch: int
    batch: int = 0
    samples: int = 0


@attrs.define
class Loop:
    """What a run does.

    It is apart from `Run`, which holds the generator of its updates: a generator that held
    the run in turn would be a cycle, and a loader's workers would outlive a `break` until
    the garbage collector finds it.

    Attributes:
        step: What is called for each update.
        state: What is trained.
        data: What the batches come from.
        limits: Where it ends.
    """

    step: Step
    state: TrainState
    data: Iterable[Any]
    limits: Limits
    _begun_at: int = 0
    _dried_up: bool = False
    _end: int | None = None
    _ahead: Ahead | None = None

    def updates(self) -> Generator[TrainState]:
        """The state after each update."""
        state, step = self.state, self.step
        most = self.limits.steps or math.inf
        deadline = time.monotonic() + (self.limits.seconds or math.inf)
        timed = self.limits.seconds is not None
        other = self._start()
        if self._ended() and state.ranks.is_first:
            self._say_nothing_left(other)
        with Interruptible() as interrupt:
            while not self._ended() and not (timed and self._is_over(deadline)):
                before = state.step
                with reading(self.data, self._open) as batches:
                    for batch in self._feed(batches):
                        interrupt.busy = True
                        step(state, batch)
                        state.taken = (batch.length or 1) if type(batch) is Window else 1
                        state.batch += state.taken
                        state.epoch_end = state.batch == self._end
                        interrupt.busy = False
                        if interrupt.pending:
                            interrupt.release()
                        if state.epoch_end or self._ahead is not None:
                            self._look_ahead(batches)
                        yield state
                        if state.step >= most or (timed and self._is_over(deadline)):
                            break
                    else:
                        if state.step == before:
                            self._explain_nothing(batches)
                self._roll_over()
        state.graph, state.window = None, ((), 0)  # the last batch need not outlive the run

    def _is_over(self, deadline: float) -> bool:
        return bool(self.state.ranks.agree(time.monotonic() >= deadline))

    def _start(self) -> bool:
        """Take the state's place in the data up; whether it is other data than that of before."""
        state, other = self.state, self._is_other_data()
        if other:
            state.batch, state.position = 0, Position()
        elif state.data is None:
            take_up(self.data, state.position)
            state.batch = moved(self.data, state.position, state.batch, state.epoch)
        self._roll_over()
        state.data, state.epoch_batches = self.data, self.limits.batches
        self._begun_at, self._dried_up = state.epoch, False
        return other

    def _say_nothing_left(self, other: bool) -> None:
        state, limits = self.state, self.limits
        logger.info("{} has come to the end of its run: no update is left to do", state)
        by_steps = limits.steps is not None and state.step >= limits.steps
        # Fine is a script that is run again after its end, which makes no update before this; a
        # loop that goes on with the same data; and a total of updates over parts of the data.
        if other and state.taken and not by_steps:
            warnings.warn(
                f"run(..., max_epochs={limits.epochs:g}) over other data makes no update:"
                f" {state!r} has come to that end already, as limits count from the state's first"
                f" epoch, not from this run's; write max_epochs={state.epoch + 1} for one more, or"
                " lk.TrainState(model, optimizer), which begins at epoch 0",
                stacklevel=3,
            )

    def _open(self, data: Iterable[Any]) -> Iterator[Any]:
        state = self.state
        state.position, batches = opened(data, state.position, state.epoch, state.batch)
        return batches

    def _roll_over(self) -> None:
        state, length = self.state, self.limits.batches
        complete = length is not None and state.batch >= length and self._cut() is None
        if state.epoch_end or complete:
            state.epoch += 1
            state.batch, state.epoch_end = 0, False

    def _ended(self) -> bool:
        cut = self._cut()
        if self._dried_up or (cut is not None and self.state.batch >= cut):
            return True
        return self.state.step >= (self.limits.steps or math.inf)

    def _cut(self) -> int | None:
        """The batch after which a fractional limit ends this epoch before its end, if it does."""
        length = self.limits.batches_in(self.state.epoch)
        return None if length == self.limits.batches else length

    def _feed(self, batches: Iterator[Any]) -> Iterator[Any]:
        length = self.limits.batches_in(self.state.epoch)
        self._end, self._ahead = length if self._cut() is None else None, None
        sizes, device = functools.partial(self.step.window, self.state), self.state.device
        left = math.inf if length is None else max(0, length - self.state.batch)
        if known_length(self.data) is not None:
            return feed_sized(batches, int(left), sizes, device)
        self._ahead = self._ahead_of(batches)
        read_again(self._ahead, self.state.position, device)
        return feed_unsized(self._ahead, left, sizes, device)

    def _ahead_of(self, batches: Iterator[Any]) -> Ahead:
        if batches is not self.data:
            return Ahead(batches)
        if self.state.ahead is None or self.state.ahead.items is not batches:
            self.state.ahead = Ahead(batches)
        return self.state.ahead  # a run that goes on with an iterator gets what was read ahead

    def _look_ahead(self, batches: Iterator[Any]) -> None:
        """See whether the epoch is over; after an update, for data may depend on the weights."""
        state = self.state
        state.position.ahead = None
        if self._ahead is None:
            if not self.limits.capped:
                check_exhausted(batches, state.batch)
        elif not state.epoch_end and state.batch != self._cut():
            # Before more is read than was trained on
            state.position.keep(self.data, state.device)
            state.epoch_end = self._ahead.at_end

    def _explain_nothing(self, batches: Iterator[Any]) -> None:
        limits, epoch = self.limits, self.state.epoch
        if batches is not self.data:
            if self.state.batch == 0:
                raise empty(self.data, f"no batch in epoch {epoch}")
            self.state.epoch_end = True  # it was interrupted when nothing was left
        elif epoch == self._begun_at:
            raise empty(self.data, "no batch left in it")
        elif limits.epochs is None and limits.steps is None:
            self._dried_up = True
        else:
            raise DataError(
                f"run(..., max_epochs={limits.epochs}, max_steps={limits.steps})",
                f"an iterator, which can be read once; it ended before epoch {epoch}",
                "data that can be iterated anew for each epoch (a list, a loader), or max_epochs=1",
            )

    def total_steps(self) -> int | None:
        """See `Run.total_steps`."""
        by_epochs = self._steps_by_epochs()
        ends = [end for end in (self.limits.steps, by_epochs) if end is not None]
        return max(self.state.step, min(ends)) if ends else None

    def _steps_by_epochs(self) -> int | None:
        if self.limits.epochs is None or self.limits.batches is None:
            return None
        state = self.state
        clock = Clock(state.step, state.epoch + state.epoch_end)
        taken = 0 if state.epoch_end or self._is_other_data() else state.batch
        most = self.limits.steps or math.inf
        while clock.step < most and (batches := self.limits.batches_in(clock.epoch)):
            size = self.step.window(clock) or 1  # type: ignore[arg-type]
            clock.step += math.ceil(max(0, batches - taken) / size)
            clock.epoch, taken = clock.epoch + 1, 0
        return clock.step

    def _is_other_data(self) -> bool:
        return self.state.data is not None and self.state.data is not self.data


class Run(Updates):
    """An iterator over the states of a training run, once for each update; made by `run`.

    `for state in run(...)`, or `run(...).finish()` where the loop would have no body. `break`
    when you like: the state is then as after its last update. As a context manager (`with
    run(...) as updates:`) it ends its data workers at the end of the block, otherwise when it
    is dropped.

    Attributes:
        step: What is called for each update.
        state: What is trained.
        data: What the batches come from.
        limits: Where it ends.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> data = [torch.ones(4, 2)] * 3
        >>> with run(lambda state, x: state.model(x).mean(), state, data, max_epochs=2) as updates:
        ...     first = next(updates)
        >>> first is state, updates.total_steps
        (True, 6)
    """

    def __init__(self, step: Step, state: TrainState, data: Iterable[Any], limits: Limits) -> None:
        self.step, self.state, self.data, self.limits = step, state, data, limits
        self._loop = Loop(step, state, data, limits)
        super().__init__(self._loop.updates())

    @property
    def total_steps(self) -> int | None:
        """`state.step` at the end, estimated; None if only a break or a time limit ends it.

        Exact for sized data, unless updates of this state were made outside of `run`. A window
        schedule that is a function is asked once for each epoch.
        """
        return self._loop.total_steps()

    @property
    def endless(self) -> bool:
        """Whether nothing but a `break` ends it: no limit, and data to be read again and again."""
        limits = self.limits
        limited = any(x is not None for x in (limits.epochs, limits.steps, limits.seconds))
        return not limited and not isinstance(self.data, Iterator)


def run(
    step: Step | StepFunction,
    state: TrainState,
    data: Iterable[Any],
    *,
    max_epochs: float | None = None,
    max_steps: int | None = None,
    max_time: Time | None = None,
    limit_batches: float | None = None,
) -> Run:
    """Call the step on the data and yield the state after each update.

    `for state in run(step, state, loader, max_epochs=3): ...`; the body runs between
    updates, and may evaluate, log, save, or break; where there is nothing to do between them,
    `state = run(step, state, loader, max_epochs=3).finish()`. Where the step accumulates
    gradients `run` makes its windows. Limits are totals of the state's clock, so a run
    that was resumed ends where the first would have; without any it goes on until you break.

    Args:
        step: A step, or a plain step function.
        state: What is trained. If it stopped within an epoch of this data, that epoch goes on.
        data: Any iterable of batches. Data without a length is read one batch ahead
            after each update, to know where an epoch ends.
        max_epochs: Epochs; 2.5 is two and the first half of the third.
        max_steps: Updates.
        max_time: Seconds, a timedelta, "DD:HH:MM:SS" or `{"hours": 2}`, from now on.
        limit_batches: Batches of each epoch: a number, or a fraction of a sized loader.

    Returns:
        An iterator, and context manager, with `.total_steps` and `.finish()`.

    Raises:
        UsageError: For a limit that cannot be right, and what is no data.
        DataError: For data that is empty, or runs out where more was asked for.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> data = [torch.ones(4, 2)] * 3
        >>> updates = run(lambda state, x: state.model(x).mean(), state, data, max_epochs=2)
        >>> updates.total_steps, [state.step for state in updates]
        (6, [1, 2, 3, 4, 5, 6])
    """
    check_data("run(step, state, data)", data)
    lifted = train_step(step)
    ranks = lifted.set_up(_checked(state)).ranks
    part = data if ranks.alone else ranks.share(data)  # processes may train apart, by plain steps
    limits = Limits.of(part, max_epochs, max_steps, max_time, limit_batches)
    return Run(lifted, state, part, limits)


def _checked(state: object) -> TrainState:
    if isinstance(state, TrainState):
        return state
    raise UsageError(
        "run(step, state, data)",
        f"a state of type {type(state).__name__}",
        "lk.TrainState(model, optimizer) as the second argument",
    )
