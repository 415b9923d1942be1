"""Schedules of learning rates and of any other value of a param group."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import attrs
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from loopkit.check import near
from loopkit.compose import Decorator, compose, wrap
from loopkit.counting import Count
from loopkit.errors import UsageError
from loopkit.state import TrainState
from loopkit.types import Transform

Schedule = Callable[[int], float]
KEPT_AS = "schedule."
PHASES = (
    *("constant", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear", "polynomial"),
    *("warmup", "wsd"),
)
PLATEAU = "for ReduceLROnPlateau call scheduler.step(score) in your loop"


@attrs.frozen
class SetValues:
    """A value of the param groups, set for the update that comes."""

    inner: Transform
    key: str
    schedule: Schedule | tuple[Schedule, ...]

    def __call__(self, state: TrainState) -> None:
        """Set the value, then go on."""
        key, schedule = self.key, self.schedule
        count = state.features[KEPT_AS + key]
        updates = count.updates if count.arriving is None else count.now()
        groups: Any = state.optimizer and state.optimizer.param_groups
        for i, group in enumerate(groups):
            value = (schedule if callable(schedule) else schedule[i])(updates)
            if isinstance(group[key], Tensor):
                group[key].fill_(value)  # in place: a compiled optimizer has captured the tensor
            else:
                group[key] = value
        self.inner(state)


@attrs.frozen
class CountApplied:
    """The count that a schedule is a function of."""

    inner: Transform
    key: str

    def __call__(self, state: TrainState) -> None:
        """Count the update if it was applied, then go on."""
        count = state.features[KEPT_AS + self.key]
        if state.applied is True:
            count.updates += 1
        else:
            count.add(state.applied)
        self.inner(state)


@attrs.frozen
class StepScheduler:
    """A torch scheduler's step after each applied update."""

    inner: Transform

    def __call__(self, state: TrainState) -> None:
        """Step it, then go on."""
        if state.applied:
            if isinstance(state.lr, Tensor):  # which the scheduler overwrites
                state.lr = state.lr.clone()
            state.features[KEPT_AS + "lr"].step()
        self.inner(state)


def with_schedule(
    scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    **values: Schedule | Sequence[Schedule],
) -> Decorator:
    """Set values of the optimizer's param groups as functions of the update count.

    `group[key] = f(n)` before the update that follows n applied ones: n is 0 at the
    first, and a skipped update does not count. A torch scheduler may be given instead;
    it takes one step after each applied update.

    Args:
        scheduler: A torch scheduler over the state's optimizer, or what makes one from
            an optimizer: `partial(CosineAnnealingLR, T_max=1000)`.
        **values: For each key of the param groups, a function of the count for all
            groups, or one for each group: `lr=lambda n: 1e-3 * 0.99**n`, `weight_decay=[f, g]`.

    Raises:
        UsageError: If neither or both are given, a key is not in the param groups, or
            the scheduler needs a metric (ReduceLROnPlateau) or belongs to another optimizer.

    Example:
        >>> with_schedule(lr=lambda n: 0.1 / (1 + n))
        with_schedule(lr=<lambda>)
    """
    call = f"with_schedule({', '.join(f'{k}={_shown(v)}' for k, v in values.items())})"
    if scheduler is not None:
        if values:
            raise UsageError(
                call,
                f"a torch scheduler and {sorted(values)}",
                "one or the other; two decorators for both",
            )
        return _with_torch_scheduler(scheduler)
    if not values:
        raise UsageError(
            call, "no schedule", "with_schedule(lr=f) or with_schedule(torch_scheduler)"
        )
    return compose(*(_of_key(call, key, value) for key, value in reversed(values.items())))


def _of_key(call: str, key: str, value: Any) -> Decorator:
    if isinstance(value, Sequence) and value and all(map(callable, value)):
        value = tuple(value)
    elif not callable(value):
        raise UsageError(
            call,
            f"{key} = {value!r:.60}",
            f"{key}: a function of the update count, or one for each group{_named(value)}",
        )
    make = functools.partial(_make_count, call=call, key=key, schedule=value)
    values = functools.partial(SetValues, key=key, schedule=value)
    counted = functools.partial(CountApplied, key=key)
    return wrap(name=call, init={KEPT_AS + key: make}, before=values, after=counted)


def _named(value: object) -> str:
    """What to write in place of a schedule's name."""
    if not isinstance(value, str):
        return ""
    word = value.removesuffix("_with_warmup").removesuffix("_schedule")
    return (
        f", as {near(word, PHASES)}: with_schedule(lr=lk.warmup(100, peak=1e-3) >> lk.cosine(900))"
    )


def _with_torch_scheduler(scheduler: Any) -> Decorator:
    call = f"with_schedule({_shown(scheduler)})"
    if isinstance(scheduler, ReduceLROnPlateau) or not (
        callable(scheduler) or isinstance(scheduler, LRScheduler)
    ):
        raise UsageError(
            call,
            f"a {type(scheduler).__name__}, which is not stepped once for each update",
            f"an LRScheduler, or a function of the optimizer that makes one; {PLATEAU}"
            + _named(scheduler),
        )
    make = functools.partial(_make_scheduler, call=call, scheduler=scheduler)
    return wrap(name=call, init={KEPT_AS + "lr": make}, after=StepScheduler)


def _make_count(
    state: TrainState, call: str, key: str, schedule: Schedule | tuple[Schedule, ...]
) -> Count:
    groups = state.optimizer.param_groups if state.optimizer else []
    if missing := [i for i, group in enumerate(groups) if key not in group]:
        raise UsageError(
            call,
            f"no {key!r} in the param groups {missing}",
            f"one of the names they have: {sorted(groups[missing[0]].keys() - {'params'})}",
        )
    if not callable(schedule) and len(schedule) != len(groups):
        raise UsageError(
            call, f"{len(schedule)} schedules for {len(groups)} param groups", "one for each group"
        )
    shared = len({id(group[key]) for group in groups}) < len(groups)
    for group in groups if shared else []:
        if isinstance(group[key], Tensor):  # torch gives one tensor to all groups
            group[key] = group[key].clone()
    return Count()


def _make_scheduler(state: TrainState, call: str, scheduler: Any) -> LRScheduler:
    made: LRScheduler = (
        scheduler if isinstance(scheduler, LRScheduler) else scheduler(state.optimizer)
    )
    if isinstance(made, ReduceLROnPlateau):
        raise UsageError(call, "a ReduceLROnPlateau, which needs a score", PLATEAU)
    if made.optimizer is not state.optimizer:
        raise UsageError(
            call, "a scheduler over another optimizer", "a scheduler made from state.optimizer"
        )
    return made


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or (
        type(value).__name__ if isinstance(value, LRScheduler) else f"{value!r:.60}"
    )
