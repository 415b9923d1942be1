"""Freezing parts of a model, for good or for a while."""

import functools
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import attrs
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from loopkit.check import near
from loopkit.compose import Decorator, wrap
from loopkit.errors import UsageError
from loopkit.state import TrainState
from loopkit.types import Transform

Parts = str | Collection[str]
FreezeSchedule = Parts | Mapping[int, Parts] | Callable[[TrainState], Parts]
KEPT_AS = "frozen"


@attrs.define(eq=False)
class Frozen:
    """What is frozen now, by names; only what was trained before, so that the rest stays yours.

    It follows from the clock, so nothing of it is saved.
    """

    patterns: tuple[str, ...] = ()
    parameters: set[str] = attrs.field(factory=set)
    norms: set[str] = attrs.field(factory=set)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the next update looks at the clock."""


@attrs.frozen
class Freeze:
    """The layer of `with_freeze`."""

    inner: Transform
    schedule: Any
    train_bn: bool

    def __call__(self, state: TrainState) -> None:
        """Freeze and unfreeze what the clock says, then go on."""
        frozen, patterns = state.features[KEPT_AS], _patterns(self.schedule, state)
        if patterns != frozen.patterns:
            _check_patterns(patterns, state.model)
            _set_frozen(state.model, frozen, patterns, self.train_bn)
        for name in frozen.norms:  # each time: model.train() wakes them up
            state.model.get_submodule(name).training = False
        self.inner(state)


def _patterns(schedule: Any, state: TrainState) -> tuple[str, ...]:
    if callable(schedule):
        return _as_tuple("with_freeze(function)", schedule(state))
    if isinstance(schedule, Mapping):
        past = [epoch for epoch in schedule if epoch <= state.epoch]
        return schedule[max(past)] if past else ()
    return schedule  # type: ignore[no-any-return]


def _set_frozen(model: nn.Module, frozen: Frozen, patterns: tuple[str, ...], bn: bool) -> None:
    wanted, norms = _names(model, patterns, bn)
    parameters = dict(model.named_parameters())
    for name in frozen.parameters - wanted:
        parameters[name].requires_grad_(True)
    new = {name for name in wanted if name in parameters and parameters[name].requires_grad}
    for name in new:
        parameters[name].requires_grad_(False)
        parameters[name].grad = None
    frozen.parameters = (frozen.parameters & wanted) | new
    for name in frozen.norms - norms:
        model.get_submodule(name).training = True
    awake = {name for name in norms if model.get_submodule(name).training}
    frozen.norms, frozen.patterns = (frozen.norms & norms) | awake, patterns


def _names(model: nn.Module, patterns: tuple[str, ...], train_bn: bool) -> tuple[set[str], ...]:
    """The parameters, and the norms with running statistics, that the patterns fit."""
    norms = {name for name, module in model.named_modules() if isinstance(module, _NormBase)}
    parameters, owner_of = set(), {}
    for name, _ in model.named_parameters():
        owner_of[name] = name.rpartition(".")[0]
        if _fits(name, patterns) and not (train_bn and owner_of[name] in norms):
            parameters.add(name)
    if train_bn:
        return parameters, set()
    trained = {owner for name, owner in owner_of.items() if name not in parameters}
    owners = {*owner_of.values()}
    whole = {n for n in norms if _fits(n, patterns) or (n in owners and n not in trained)}
    return parameters, whole


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    words = name.split(".")
    paths = [".".join(words[:i]) for i in range(1, len(words) + 1)]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


def _as_tuple(call: str, parts: object) -> tuple[str, ...]:
    if isinstance(parts, str):
        return (parts,)
    if isinstance(parts, Collection) and all(isinstance(part, str) for part in parts):
        return tuple(parts)
    raise UsageError(
        call, f"{parts!r:.60} ({type(parts).__name__})", 'names or patterns: ["backbone", "head.*"]'
    )


def _check_patterns(patterns: tuple[str, ...], model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(_fits(name, (pattern,)) for name in names):
            known = {name.rpartition(".")[0] or name for name in names}
            raise UsageError(
                f"with_freeze({pattern!r})",
                f"no parameter of {type(model).__name__} that fits it",
                f"a module, a parameter or a pattern: {near(pattern, known)}"[:400],
            )


@attrs.frozen
class CheckParts:
    """Finds the parts before the first update, so that a wrong name is told then."""

    schedule: Any

    def __call__(self, state: TrainState) -> None:
        """Look for all that the schedule names."""
        if isinstance(self.schedule, Mapping):
            for patterns in self.schedule.values():
                _check_patterns(patterns, state.model)
        elif not callable(self.schedule):
            _check_patterns(self.schedule, state.model)


def _make_frozen(state: TrainState) -> Frozen:  # noqa: ARG001
    return Frozen()


def with_freeze(schedule: FreezeSchedule, *, train_bn: bool = False) -> Decorator:
    """Freeze parts of the model, by epoch or by the clock.

    A frozen parameter gets no gradient, no weight decay and no optimizer step, and its
    backward pass is not computed. BatchNorms of frozen parts are in eval mode. Once it
    thaws a parameter trains on with the optimizer state that it had. What you have frozen
    yourself stays as it is. What is frozen follows from the clock, so resuming is right.

    The optimizer is over all parameters from the start; frozen ones cost it nothing. With
    DDP it takes `lk.DDP(find_unused_parameters=True)`, for what has no gradient for a while.

    Args:
        schedule: Names of modules or parameters, or patterns (`"layers.[0-5]"`), a string or
            several, frozen for good; or by epoch, `{0: ["backbone"], 10: []}` (all trains
            from epoch 10 on); or a function of the state's clock that returns them.
        train_bn: Let the BatchNorms within frozen parts train (as Lightning does by default).

    Raises:
        UsageError: For a part that is not in the model, or an epoch that is no whole number.

    Example:
        >>> with_freeze({0: ["backbone"], 10: []})
        with_freeze({0: ['backbone'], 10: []})

    Source: https://lightning.ai/docs/pytorch/stable/api/lightning.pytorch.callbacks.BackboneFinetuning.html
    """
    shown = getattr(schedule, "__name__", None) or f"{schedule!r:.120}"
    name = f"with_freeze({shown}{', train_bn=True' * bool(train_bn)})"
    parts: Any = schedule
    if isinstance(schedule, Mapping):
        for epoch in schedule:
            if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
                raise UsageError(name, f"epoch {epoch!r}", "epochs as whole numbers from 0 on")
        parts = {epoch: _as_tuple(name, named) for epoch, named in schedule.items()}
    elif not callable(schedule):
        parts = _as_tuple(name, schedule)
    layer = functools.partial(Freeze, schedule=parts, train_bn=bool(train_bn))
    return wrap(name=name, prepare=CheckParts(parts), init={KEPT_AS: _make_frozen}, before=layer)
