"""Schedules as values: phases, each a curve over a number of steps, one after the other."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import attrs

from loopkit.check import at_least_one
from loopkit.errors import CompositionError, UsageError

Steps = int | float | None
"""A number of steps, a fraction of the total, or None: all that the other phases leave."""


class Schedule:
    """A pure function of the update count: `schedule(n)` is the value after n updates.

    `a >> b` is a, then b; `schedule * 0.1` scales the values. Each phase counts its own
    steps from 0 and starts at the value where the one before has ended, unless it has
    its own `peak`; the last one keeps the value that it ends with. Schedules are frozen
    values: they print, compare and pickle.

    Attributes:
        phases: In the order in which they run.

    Example:
        >>> from loopkit.optim.phases import cosine, warmup
        >>> lr = warmup(100, peak=3e-4) >> cosine(900)
        >>> [round(lr(n), 6) for n in (0, 50, 100, 550, 1000, 2000)]
        [0.0, 0.00015, 0.0003, 0.00015, 0.0, 0.0]
        >>> lr * 2
        warmup(100, peak=0.0006) >> cosine(900)
    """

    phases: "tuple[Phase, ...]"

    def __call__(self, step: int) -> float:
        """The value for the update that follows `step` updates.

        Raises:
            UsageError: If a phase has no length or no value to start from.
        """
        value: float | None = None
        *lengths, last = self.lengths()
        for phase, length in zip(self.phases, lengths, strict=False):
            if step < length:
                return phase.at(step, value)
            value, step = phase.at(length, value), int(step - length)
        return self.phases[-1].at(min(step, last), value)

    def lengths(self) -> list[float]:
        """The steps of each phase; infinity for a last one that goes on for ever.

        Raises:
            UsageError: If a phase has a length that depends on the total, or none.
        """
        last = len(self.phases) - 1
        return [phase.length(last=i == last) for i, phase in enumerate(self.phases)]

    def over(self, total_steps: int) -> "Schedule":
        """The same schedule with its lengths as numbers of steps, for a run of `total_steps`.

        A fraction is one of `total_steps`; the phase without a length gets what the
        others leave. Ends are rounded to whole steps, so that fractions of 1 fill the total.
        What a run will make of its loader, windows and limits it says itself, before it begins:
        `schedule.over(lk.run(step, state, loader, max_epochs=3).total_steps)`.

        Raises:
            UsageError: If the phases are longer than the total, or two have no length.

        Example:
            >>> from loopkit.optim.phases import cosine, warmup
            >>> (warmup(0.1, peak=3e-4) >> cosine()).over(5000)
            warmup(500, peak=0.0003) >> cosine(4500)
        """
        call = f"{self!r:.80}.over({total_steps!r})"
        total = at_least_one(call, "total_steps", total_steps)
        exact = [p.steps * total if isinstance(p.steps, float) else p.steps for p in self.phases]
        rest = total - sum(length for length in exact if length is not None)
        if rest < -1e-6 * total or exact.count(None) > 1:
            raise UsageError(
                call,
                f"phases of {total - rest:g} steps, and {exact.count(None)} without a length",
                f"at most {total} steps (or fractions up to 1), and one phase without a length",
            )
        ends = [0.0]
        for length in exact:
            ends.append(ends[-1] + (rest if length is None else length))
        whole = [math.floor(end + 0.5) for end in ends]
        return joined(
            attrs.evolve(phase, steps=end - begin)
            for phase, begin, end in zip(self.phases, whole, whole[1:], strict=False)
        )

    def __rshift__(self, other: object) -> "Schedule":
        if not isinstance(other, Schedule):
            raise CompositionError(
                f"{self!r:.60} >> {other!r:.40}",
                f"a {type(other).__name__} on the right",
                "a schedule, such as cosine(900) or constant(100)",
            )
        *before, last = self.phases
        return joined((*before, last.towards(other.phases[0]), *other.phases))

    def __mul__(self, factor: float) -> "Schedule":
        return joined(phase.scaled(factor) for phase in self.phases)

    __rmul__ = __mul__


@attrs.frozen(repr=False)
class Chain(Schedule):
    """Several phases; what `>>` makes."""

    phases: "tuple[Phase, ...]"

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.phases))


def joined(phases: "Iterable[Phase]") -> Schedule:
    """The schedule of these phases."""
    made = tuple(phases)
    return made[0] if len(made) == 1 else Chain(made)


def _check_steps(phase: "Phase", _: object, steps: Any) -> None:
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
    fraction = isinstance(steps, float) and 0 < steps <= 1
    if not (steps is None or whole or fraction):
        raise UsageError(
            f"{type(phase).__name__}({steps!r:.40})",
            f"steps = {steps!r:.40} ({type(steps).__name__})",
            "a number of steps as an int, a fraction of the total as a float in (0, 1],"
            " or None for all that other phases leave",
        )


def _check_value(phase: "Phase", field: Any, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(
            f"{type(phase).__name__}({field.name}={value!r:.40})",
            f"{field.name} = {value!r:.40} ({type(value).__name__})",
            f"{field.name}: a finite number",
        )


def value_field(default: float | None = None) -> Any:
    """A keyword that `*` scales: a number, or None if that is the default."""
    validator = attrs.validators.optional(_check_value) if default is None else _check_value
    return attrs.field(
        default=default, kw_only=True, validator=validator, metadata={"scales": True}
    )


@attrs.frozen(repr=False)
class Phase(Schedule):
    """One curve of a schedule, over its own steps; the base to make others from.

    A subclass is a frozen attrs class with `at`; `value_field()` makes its values.

    Attributes:
        steps: How long it lasts.
        endless: Whether it can be the last phase without a length.
    """

    steps: Steps = attrs.field(default=None, validator=_check_steps)

    endless: ClassVar[bool] = False

    @property
    def phases(self) -> "tuple[Phase, ...]":  # type: ignore[override]
        """Itself."""
        return (self,)

    @property
    def first(self) -> float | None:
        """The value that it was told to start at; None to start where the one before has ended."""
        return None

    def at(self, n: float, start: float | None) -> float:
        """The value after n of its steps, n from 0 to `steps`.

        Args:
            n: Steps of this phase so far.
            start: The value at which the phase before has ended; None for the first.
        """
        raise NotImplementedError

    def length(self, *, last: bool) -> float:
        """Its steps as a number.

        Args:
            last: Whether it is the last phase, which may go on for ever if it is endless.

        Raises:
            UsageError: If they depend on a total that was not given.
        """
        if isinstance(self.steps, int):
            return self.steps
        if self.steps is None and self.endless and last:
            return math.inf
        raise UsageError(
            f"{self!r}(step)",
            "no steps: all that other phases leave of a total"
            if self.steps is None
            else f"the fraction {self.steps} of a total",
            "schedule.over(lk.run(step, state, loader, max_epochs=n).total_steps), with the step as"
            " it is without the schedule; or a number of steps as an int",
        )

    def progress(self, n: float) -> float:
        """The part of its steps that is done, from 0 to 1; a phase of 0 steps is done."""
        return n / self.steps if self.steps else 1.0

    def known(self, name: str, value: float | None) -> float:
        """The value, if there is one.

        Raises:
            UsageError: If there is none.
        """
        if value is None:
            raise UsageError(
                f"{self!r}(step)", f"no {name}", f"{type(self).__name__}(..., {name}=3e-4)"
            )
        return value

    def towards(self, following: "Phase") -> "Phase":  # noqa: ARG002
        """This phase, when `following` comes after it."""
        return self

    def scaled(self, factor: float) -> Self:
        """The same curve with its values times `factor`."""
        values = {
            field.name: getattr(self, field.name) * factor
            for field in attrs.fields(type(self))
            if field.metadata.get("scales") and getattr(self, field.name) is not None
        }
        return attrs.evolve(self, **values)

    def __repr__(self) -> str:
        settings = [(field, getattr(self, field.name)) for field in attrs.fields(type(self))]
        shown = [
            repr(value) if field.name == "steps" else f"{field.name}={value!r}"
            for field, value in settings
            if value != field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"
