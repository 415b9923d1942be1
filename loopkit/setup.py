"""Setting a state up for a step, once, before the step's first update."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from loopkit.errors import CompositionError, UsageError
from loopkit.feature import Feature, check_excluded
from loopkit.plain import restore
from loopkit.state import TrainState

MANY = 100


def set_up(features: tuple[Feature, ...], step: object, state: object) -> None:
    """Run what the features set up on `state`: prepare, compile, parallelize, init.

    What an equal feature has set up on this state before is not set up again, so
    that several steps can train one state.

    Raises:
        UsageError: If the state is none, or has no optimizer.
        CompositionError: If the state holds what another composition keeps in it.
    """
    if not isinstance(state, TrainState):
        raise UsageError(
            "step(state, batch)",
            f"a state of type {type(state).__name__}",
            "lk.TrainState(model, optimizer), the state first and the batch second",
        )
    if state.optimizer is None:
        raise UsageError(
            "step(state, batch)",
            f"{state!r}, a state to evaluate",
            "lk.TrainState(model, optimizer)",
        )
    _check_names(features, state)
    _check_use(features, state)
    new = [feature for feature in features if feature not in state.set_up]
    for feature in new:
        if feature.prepare is not None:
            feature.prepare(state)
        state.set_up.append(feature)  # one by one: what was prepared is not prepared again
    for place in ("compile", "parallelize"):
        for feature in new:
            if place in feature.owns:
                feature.owns[place](state)
    check_excluded(features, alone=state.ranks.alone)
    _init(features, state)
    if len(state.attached) > MANY:  # steps made in a loop: checking one again is cheap
        state.attached.clear()
    state.attached[id(step)] = step  # holding it, so that its id is not given to another


@contextmanager
def _restored_values(state: TrainState) -> Iterator[None]:
    """Keep what was restored into the param groups: a torch scheduler sets them when it is made."""
    groups = state.optimizer.param_groups if state.pending and state.optimizer else []
    kept = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in groups
    ]
    try:
        yield
    finally:
        for group, values in zip(groups, kept, strict=True):
            group.update(values)


def _init(features: tuple[Feature, ...], state: TrainState) -> None:
    makers = {name: make for feature in features for name, make in feature.init.items()}
    with _restored_values(state):
        made = {name: make(state) for name, make in makers.items() if name not in state.features}
    state.features |= made  # only now, so that one that fails leaves none behind
    if made:
        state.attached.clear()  # steps that lack what is kept now are no longer right for it
    if waiting := made.keys() & state.pending:
        parts = {"features": {name: state.pending.pop(name) for name in waiting}}
        restore(state.features, state.ranks.fitted(state, parts)["features"])


def _check_use(features: tuple[Feature, ...], state: TrainState) -> None:
    closure = inspect.signature(state.optimizer.step).parameters.get("closure")  # type: ignore[union-attr]
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if needs_closure and not any("apply" in feature.owns for feature in features):
        raise CompositionError(
            f"a step for {type(state.optimizer).__name__}",
            "an optimizer that evaluates the loss itself, through a closure",
            "@lk.with_closure() on the step",
        )
    if not state.model.training:
        warnings.warn(
            "training a model in eval mode: its dropout is off and its BatchNorm statistics stay"
            " (from_pretrained leaves models so); call model.train() before, or freeze parts of it"
            " by their own eval()",
            stacklevel=4,
        )


def _check_names(features: tuple[Feature, ...], state: TrainState) -> None:
    names = {name for feature in features for name in feature.init}
    held = {*state.features, *state.pending}
    if extra := sorted(held - names):
        raise CompositionError(
            "step(state, batch)",
            f"a state that keeps {extra} for another step; this one keeps {sorted(names)}",
            "the same decorators on every step of a state, or lk.TrainState(state.model,"
            " state.optimizer) for a state of its own",
        )
    for feature in features:
        for name in feature.init:
            if name in state.features and feature not in state.set_up:
                others = [f.name for f in state.set_up if isinstance(f, Feature) and name in f.init]
                raise CompositionError(
                    f"{feature.name} on a state",
                    f"{name!r} kept there already by {others[0]}, with other settings",
                    "equal settings on every step of a state, or another name=...",
                )
