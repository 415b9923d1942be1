"""The curves that schedules are made of; each is called like a function and is a value."""
# ruff: noqa: N801  in lower case, as property and partial are: what is written is what is printed

import math
from typing import Any

import attrs

from loopkit.check import at_least_one, positive
from loopkit.optim.schedule import Phase, Schedule, Steps, value_field


def _positive(phase: Phase, field: Any, value: Any) -> None:
    positive(f"{type(phase).__name__}({field.name}={value!r:.40})", field.name, value)


def _at_least_one(phase: Phase, field: Any, value: Any) -> None:
    at_least_one(f"{type(phase).__name__}({field.name}={value!r:.40})", field.name, value)


@attrs.frozen(repr=False)
class constant(Phase):
    """The same value for a number of steps, or for ever.

    Args:
        steps: How many; for ever by default.
        value: By default the one that the phase before has ended with.

    Raises:
        UsageError: For steps or a value that cannot be right.

    Example:
        >>> constant(value=3e-4)(1_000_000)
        0.0003
        >>> (warmup(10, peak=1.0) >> constant(20) >> linear(10))(35)
        0.5
    """

    value: float | None = value_field()

    endless = True

    @property
    def first(self) -> float | None:
        """Its value."""
        return self.value

    def at(self, n: float, start: float | None) -> float:  # noqa: ARG002
        """The value."""
        return self.known("value", start if self.value is None else self.value)


@attrs.frozen(repr=False)
class warmup(Phase):
    """Up to the peak in a straight line: `start + (peak - start) * n / steps`.

    The first update has the value `start`, the one after `steps` updates the peak.

    Args:
        steps: How many; 0 begins at the peak.
        peak: The value at the end; by default the one that the next phase names.
        start: The value at the beginning; by default 0, or where the phase before has ended.

    Raises:
        UsageError: For steps or a value that cannot be right.

    Example:
        >>> lr = warmup(100, peak=3e-4)
        >>> lr(0), lr(50), lr(100), lr(1000)
        (0.0, 0.00015, 0.0003, 0.0003)

    Source: https://arxiv.org/abs/1706.02677
    """

    peak: float | None = value_field()
    start: float | None = value_field()

    @property
    def first(self) -> float | None:
        """Its start."""
        return self.start

    def at(self, n: float, start: float | None) -> float:
        """The value on the line."""
        begin = self.start if self.start is not None else start or 0.0
        done = self.progress(n)
        return begin * (1 - done) + self.known("peak", self.peak) * done

    def towards(self, following: Phase) -> Phase:
        """With the peak that the next phase begins at, unless it has its own."""
        return self if self.peak is not None else attrs.evolve(self, peak=following.first)


@attrs.frozen(repr=False)
class Decay(Phase):
    """From a peak to a floor: `floor + (peak - floor) * remaining(n / steps)`.

    Attributes:
        peak: The value at the beginning; by default where the phase before has ended.
        floor: The value at the end, and after. It may be above the peak: then it rises.
    """

    peak: float | None = value_field()
    floor: float = value_field(0.0)

    @property
    def first(self) -> float | None:
        """Its peak."""
        return self.peak

    def at(self, n: float, start: float | None) -> float:
        """The value on the curve."""
        peak = self.known("peak", start if self.peak is None else self.peak)
        rest = self.remaining(self.progress(n))
        return self.floor * (1 - rest) + peak * rest

    def remaining(self, done: float) -> float:
        """What is left of the way to the floor, from 1 where `done` is 0 to 0 where it is 1."""
        raise NotImplementedError


@attrs.frozen(repr=False)
class linear(Decay):
    """Down to the floor in a straight line: `floor + (peak - floor) * (1 - n / steps)`.

    Args:
        steps: How many; by default all that the other phases leave of `over(total_steps)`.
        peak: The value at the beginning; by default where the phase before has ended.
        floor: The value at the end, and after.

    Raises:
        UsageError: For steps or a value that cannot be right.

    Example:
        >>> lr = linear(900, peak=3e-4)
        >>> lr(0), lr(450), lr(900)
        (0.0003, 0.00015, 0.0)
    """

    def remaining(self, done: float) -> float:
        """`1 - done`."""
        return 1 - done


@attrs.frozen(repr=False)
class cosine(Decay):
    """Half a cosine: `floor + (peak - floor) * (1 + cos(pi * n / steps)) / 2`.

    Args:
        steps: How many; by default all that the other phases leave of `over(total_steps)`.
        peak: The value at the beginning; by default where the phase before has ended.
        floor: The value at the end, and after.

    Raises:
        UsageError: For steps or a value that cannot be right.

    Example:
        >>> lr = cosine(900, peak=3e-4, floor=3e-5)
        >>> lr(0), round(lr(450), 9), lr(900)
        (0.0003, 0.000165, 3e-05)

    Source: https://arxiv.org/abs/1608.03983
    """

    def remaining(self, done: float) -> float:
        """Half a cosine."""
        return (1 + math.cos(math.pi * done)) / 2


@attrs.frozen(repr=False)
class polynomial(Decay):
    """A power of the way: `floor + (peak - floor) * (1 - n / steps) ** power`.

    Args:
        steps: How many; by default all that the other phases leave of `over(total_steps)`.
        power: 1 is a straight line; larger falls sooner.
        peak: The value at the beginning; by default where the phase before has ended.
        floor: The value at the end, and after.

    Raises:
        UsageError: For steps or a value that cannot be right.

    Example:
        >>> polynomial(100, power=2, peak=1.0)(50)
        0.25
    """

    power: float = attrs.field(kw_only=True, validator=_positive)

    def remaining(self, done: float) -> float:
        """A power of what is left."""
        return math.pow(1 - done, self.power)


@attrs.frozen(repr=False)
class cosine_with_restarts(Decay):
    """Several equal halves of a cosine, each from the peak to the floor.

    `floor + (peak - floor) * (1 + cos(pi * ((cycles * n / steps) mod 1))) / 2`. For
    restarts that grow longer or lower, chain: `cosine(100, peak=a) >> cosine(200, peak=b)`.

    Args:
        steps: How many in all; by default all that the other phases leave of `over(total_steps)`.
        cycles: How many times it starts from the peak.
        peak: The value at each start; by default where the phase before has ended.
        floor: The value at the end, and after.

    Raises:
        UsageError: For steps, cycles or a value that cannot be right.

    Example:
        >>> lr = cosine_with_restarts(200, cycles=2, peak=1.0)
        >>> [round(lr(n), 4) for n in (0, 50, 99, 100, 150, 200)]
        [1.0, 0.5, 0.0002, 1.0, 0.5, 0.0]

    Source: https://arxiv.org/abs/1608.03983
    """

    cycles: int = attrs.field(kw_only=True, validator=_at_least_one)

    def remaining(self, done: float) -> float:
        """The cosine of the cycle that it is in."""
        return (1 + math.cos(math.pi * (self.cycles * done % 1))) / 2 if done < 1 else 0.0


@attrs.frozen(repr=False)
class inverse_sqrt(Phase):
    """Down with the root of the steps: `peak * sqrt(timescale / (n + timescale))`.

    After `warmup(w)` and with `timescale=w` it is the schedule of the transformer.

    Args:
        steps: How many; for ever by default.
        timescale: Steps after which the value is the peak divided by the root of 2.
        peak: The value at the beginning; by default where the phase before has ended.

    Raises:
        UsageError: For steps, a timescale or a value that cannot be right.

    Example:
        >>> lr = warmup(4000, peak=1e-3) >> inverse_sqrt(timescale=4000)
        >>> lr(4000), lr(16_000)
        (0.001, 0.0005)

    Source: https://arxiv.org/abs/1706.03762
    """

    timescale: float = attrs.field(kw_only=True, validator=_positive)
    peak: float | None = value_field()

    endless = True

    @property
    def first(self) -> float | None:
        """Its peak."""
        return self.peak

    def at(self, n: float, start: float | None) -> float:
        """The value on the curve."""
        peak = self.known("peak", start if self.peak is None else self.peak)
        return peak * math.sqrt(self.timescale / (n + self.timescale))


def wsd(
    warmup_steps: Steps,
    stable_steps: Steps,
    decay_steps: Steps,
    *,
    peak: float,
    floor: float = 0.0,
) -> Schedule:
    """Warmup, stable, decay: `warmup >> constant >> linear`; chain them yourself for another decay.

    Args:
        warmup_steps: From 0 up to the peak.
        stable_steps: At the peak; None for all that the others leave of `over(total_steps)`.
        decay_steps: Down to the floor in a straight line.
        peak: The value in the middle.
        floor: The value at the end, and after.

    Raises:
        UsageError: For steps or a value that cannot be right.

    Example:
        >>> wsd(100, None, 0.2, peak=3e-4).over(1000)
        warmup(100, peak=0.0003) >> constant(700) >> linear(200)

    Source: https://arxiv.org/abs/2404.06395
    """
    up = warmup(warmup_steps, peak=peak)
    return up >> constant(stable_steps) >> linear(decay_steps, floor=floor)
