"""How often: every so many updates, epochs, samples, or so much time."""

import datetime
import re
import time
from fractions import Fraction

import attrs

from loopkit.check import at_least_one, near
from loopkit.errors import DataError, UsageError
from loopkit.state import TrainState

SECONDS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60}
SECONDS |= {"h": 3600, "hour": 3600, "d": 86400, "day": 86400}
UNITS = {"step": "step", "update": "step", "ep": "epoch", "epoch": "epoch", "sample": "sample"}
UNITS |= dict.fromkeys(SECONDS, "second")
EXAMPLES = '500, "epoch", "0.25ep", "1e6 samples", "10min", or a timedelta'
Interval = int | str | datetime.timedelta


@attrs.frozen
class Moment:
    """A state's clock as it was at some update: by default before the first.

    Args:
        step: Updates.
        samples: Samples.
        epoch: Epochs, the one that has just ended included.
        batch: Batches of the next.

    Example:
        >>> import torch
        >>> Moment.of(TrainState(torch.nn.Linear(2, 1))) == Moment()
        True
    """

    step: int = 0
    samples: int = 0
    epoch: int = 0
    batch: int = 0

    @classmethod
    def of(cls, state: TrainState) -> "Moment":
        """The present one."""
        ended = state.epoch_end
        batch = 0 if ended else state.batch
        return cls(state.step, state.samples, state.epoch + ended, batch)


@attrs.define(repr=False)
class Every:
    """Says after each update whether it is time; made by `every`.

    Attributes:
        interval: What the user wrote.
        count: How much of the unit lies between two times.
        unit: `"step"`, `"epoch"`, `"sample"` or `"second"`.
        first: Whether the first update counts, too.
    """

    interval: Interval
    count: int | Fraction
    unit: str
    first: bool = False
    _since: float = attrs.field(init=False, eq=False)

    @_since.default
    def _now(self) -> float:
        return time.monotonic()

    @classmethod
    def of(cls, interval: Interval, call: str, *, first: bool = False) -> "Every":
        """Read what the user wrote, in the call that an error shows.

        Raises:
            UsageError: If it is no interval.
        """
        if isinstance(interval, datetime.timedelta):
            count, unit = Fraction(str(interval.total_seconds())), "second"
        elif isinstance(interval, str):
            count, unit = _parsed(interval, call)
        elif isinstance(interval, float):
            raise UsageError(
                call,
                f"{interval}, without a unit",
                f'"{interval:g}ep" for a part of an epoch, or one of {EXAMPLES}',
            )
        else:
            count, unit = Fraction(at_least_one(call, "the interval", interval)), "step"
        _check(call, count, unit)
        whole = count.denominator == 1  # and quick to divide by
        return cls(interval, int(count) if whole else count, unit, first)

    def __call__(self, state: TrainState, since: Moment | None = None) -> bool:
        """Whether it is time, after what the state has just seen.

        Args:
            state: After an update.
            since: The moment of the question before; it is time where a multiple lies
                anywhere after it. By default that of one update before.
        """
        if self.unit == "second":
            return self._time(state)
        before = max(0, state.step - 1) if since is None else since.step
        if self.first and before == 0 < state.step:
            return True
        if self.unit == "step":
            return self._passed(before, state.step)
        if self.unit == "sample":
            samples = state.samples - state.outcome.samples if since is None else since.samples
            own = state.ranks.is_first and self._passed(samples, state.samples)
            return bool(state.ranks.agree(own))
        return self._epoch(state, since)

    def _passed(self, before: int | Fraction, now: int | Fraction) -> bool:
        """Whether a multiple of the interval lies in (before, now]."""
        return now // self.count > before // self.count

    def _epoch(self, state: TrainState, since: Moment | None) -> bool:
        now = Moment.of(state)
        if self.count.denominator == 1:
            return self._passed(state.epoch if since is None else since.epoch, now.epoch)
        length = state.epoch_batches
        if length is None:
            raise DataError(
                repr(self),
                "a state that no run gives batches of data with a length, so that a part of"
                " an epoch is not known",
                'lk.every(500), lk.every("epoch"), or data with a length',
            )
        end = now.epoch + Fraction(now.batch, length)
        if since is None:
            return self._passed(end - Fraction(state.taken, length), end)
        return self._passed(since.epoch + Fraction(since.batch, length), end)

    def _time(self, state: TrainState) -> bool:
        now = time.monotonic()
        due = bool(state.ranks.agree(now - self._since >= self.count))
        self._since = now if due else self._since
        return due

    def __repr__(self) -> str:
        return f"every({self.interval!r}{', first=True' * self.first})"


def every(interval: Interval, *, first: bool = False) -> Every:
    """Answer "how often": a function of the state that is true when it is time.

    Make it once, ask it after each update: `due = lk.every("0.25ep")`, then
    `if due(state): ...`. Updates, epochs and samples are read off the state's clock, by no
    memory of its own: `floor(clock / interval) > floor(clock before this update / interval)`.
    So asking twice gives one answer, one `every` serves any number of states, and a
    resumed run is answered as the first would have been. Time is no such function: it counts
    from when `every` was called, then from when it was last true, so that a resumed run
    counts anew. Several ranks agree on time and on samples in a small exchange: all have to ask.

    Without a memory, the answer is for the last update alone: who asks after each 7th update
    finds `every(50)` true at 350, which both divide, and not at 56. Who asks less often than
    after each update therefore says when that was last, by a `Moment`, and has an answer for all
    updates since: `due(state, since)`. `checkpoints.wrap` and `log.wrap` do that by themselves.

    Args:
        interval: Updates (`500`, `"500 steps"`); epochs, at their ends (`"epoch"`, `"2ep"`)
            or in parts (`"0.25ep"`, of data with a length); samples of the first rank
            (`"1e6 samples"`); or time: `"30s"`, `"10min"`, `"2h"`, a timedelta.
        first: Also true after the very first update.

    Raises:
        UsageError: For what is no interval above 0, has no unit, or an unknown one.
        DataError: When it is asked about parts of epochs whose length nobody knows.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> due = every(10, first=True)
        >>> [state.step for state.step in range(25) if due(state)]
        [1, 10, 20]
        >>> due, since, saved = every(10), Moment(), []
        >>> for state.step in range(7, 43, 7):
        ...     if due(state, since):
        ...         saved.append(state.step)
        ...     since = Moment.of(state)
        >>> saved
        [14, 21, 35, 42]
    """
    return Every.of(interval, f"lk.every({interval!r})", first=first)


def _parsed(text: str, call: str) -> tuple[Fraction, str]:
    match = re.fullmatch(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)?\s*([a-z]*)\s*", text.lower())
    number, unit = match.groups() if match else (None, text)
    if number is not None and not unit:
        raise UsageError(
            call, f"{text!r}, without a unit", f'"{number} steps" or "{number}ep", or {EXAMPLES}'
        )
    name = next((u for u in (unit, unit.removesuffix("s")) if u in UNITS), None)
    if name is None:
        units = near(unit.removesuffix("s"), [*UNITS])
        raise UsageError(call, f"the unit {unit!r:.40}", f"{units}; such as {EXAMPLES}")
    try:
        count = Fraction(number or 1)
    except ValueError as error:
        raise UsageError(call, f"{number!r}, which is no number", EXAMPLES) from error
    return count * SECONDS.get(name, 1), UNITS[name]


def _check(call: str, count: Fraction, unit: str) -> None:
    if count <= 0:
        raise UsageError(call, "no interval above 0", EXAMPLES)
    if unit in {"step", "sample"} and count.denominator != 1:
        raise UsageError(
            call, f"{float(count):g} {unit}s", f"a whole number of {unit}s, or {EXAMPLES}"
        )
