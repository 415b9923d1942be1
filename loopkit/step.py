"""The step: features composed round a step function, and what one call of it does."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import attrs

from loopkit import places
from loopkit.errors import CompositionError, OutputError
from loopkit.feature import Feature, check_excluded
from loopkit.setup import set_up
from loopkit.state import TrainState
from loopkit.types import (
    Apply,
    Around,
    Backward,
    Forward,
    GradientsOf,
    Split,
    StepFunction,
    Transform,
    Update,
    Verdict,
    WindowSize,
)


def _chain(place: str, base: Callable[..., Any] | None = None) -> Any:
    """A field of `Step`: the base of one place with its layers, nearest the function outermost."""

    def build(step: "Step") -> Any:
        inner = base or step.base_of(place)
        for feature in step.features:
            if place in feature.owns:
                owner = feature.owns[place]
                inner = owner(inner) if place in places.COMPOSITE else owner
        for feature in reversed(step.features):
            if place in feature.wraps:
                inner = feature.wraps[place](inner)
        return inner

    return attrs.field(init=False, eq=False, default=attrs.Factory(build, takes_self=True))


@attrs.frozen(repr=False)
class Step:
    """One optimizer update as a value: a step function and the features composed onto it.

    Decorators make it, or `train_step`; it prints, compares and pickles. Calling it
    is one update: `state = step(state, batch)`. Its fields are the places of an
    update, each a callable: the default, or its owner, within the layers of features.

    Attributes:
        function: The user's function.
        features: What was composed onto it, nearest to the function first.

    Raises:
        CompositionError: If two features own one place, or keep state under one name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> step = Step(lambda state, x: state.model(x).mean())
        >>> state = step(state, torch.ones(4, 2))
        >>> state.step, state.samples
        (1, 4)
    """

    function: StepFunction
    features: tuple[Feature, ...] = ()
    window: WindowSize = _chain("window", places.no_window)
    before: Transform = _chain("before", places.nothing)
    split: Split = _chain("split", places.whole_batch)
    around: Around = _chain("around", places.no_context)
    forward: Forward = _chain("forward")
    backward: Backward = _chain("backward", places.backward)
    gradients: GradientsOf = _chain("gradients")
    unscale: Transform = _chain("unscale", places.divide_by_weight)
    transform: Transform = _chain("transform", places.nothing)
    verdict: Verdict = _chain("verdict", places.gather_votes)
    apply: Apply = _chain("apply", places.apply_update)
    update: Update = _chain("update")
    after: Transform = _chain("after", places.nothing)

    def __attrs_post_init__(self) -> None:
        _check_composition(self.features)

    def __call__(self, state: TrainState, batch: Any) -> TrainState:
        """One update.

        Args:
            state: What is trained; changed in place and returned.
            batch: A batch, or a `Window` where the step accumulates gradients.

        Returns:
            The same state.
        """
        try:
            known = id(self) in state.attached
        except AttributeError:  # no state: said by set_up, so that it costs nothing here
            known = False
        if not known:
            set_up(self.features, self, state)
            state.unproven = True
        self.before(state)  # values of a schedule, freezing
        window = state.window = self.split(state, batch)
        try:
            state.applied = self.update(state, window)  # gradients, unscale, transform, apply
        except Exception as error:
            state.ranks.explain(error, f"update {state.step + 1}")
            _explain(error, self)
            raise
        if state.unproven and not state.outcome.is_empty():
            self._prove(state)
        state.step += 1
        state.samples += state.outcome.samples
        state.lr = state.optimizer.param_groups[0].get("lr")  # type: ignore[union-attr]
        self.after(state)  # averages, scaler, counts
        return state

    def set_up(self, state: TrainState) -> TrainState:
        """Set a state up for this step now; `run`, and else the first update, do it too.

        It prepares, compiles and parallelizes the model, and makes what the features keep.
        Call it where that must come before something else: to restore into shards, say.

        Args:
            state: What is trained; changed in place and returned.

        Raises:
            UsageError: If it is no state, or has no optimizer.
            CompositionError: If the state holds what another composition keeps in it.
        """
        set_up(self.features, self, state)
        return state

    def _prove(self, state: TrainState) -> None:
        """After the first update: its backward pass has reached a parameter of the state at all."""
        state.unproven = False
        owned = {place for feature in self.features for place in feature.owns}
        external = owned & {"gradients", "backward", "apply", "update"}
        if not external and not state.gradients():
            raise OutputError(
                f"the loss of {name_of_function(self)}",
                f"no gradient for any of the {len(state.parameters())} parameters of {state!r}",
                "a loss computed with state.model, not with another copy of the model",
            )

    def base_of(self, place: str) -> Any:
        """What stands in a place that is made of the step's own parts."""
        if place == "forward":
            return self.function
        return places.COMPOSITE[place](self)

    def __repr__(self) -> str:
        names = dict.fromkeys(feature.name for feature in self.features)
        return f"Step({', '.join([name_of_function(self), *names])})"

    def __str__(self) -> str:
        return describe(self)

    def __reduce__(self) -> Any:
        found = _by_name(self.function.__module__, getattr(self.function, "__qualname__", ""))
        if isinstance(found, Step) and found.function is self.function:
            # The decorator syntax has put the step under the function's name, by which pickle
            # would look the function up: so name the step, and take its function.
            return _rebuild, (self.function.__module__, self.function.__qualname__, self.features)
        return Step, (self.function, self.features)


def _explain(error: Exception, step: Step) -> None:
    """Say what torch cannot know: that a step runs the backward pass itself.

    Raises:
        OutputError: If the error is that of a second backward pass.
    """
    if "backward through the graph a second time" in str(error):
        raise OutputError(
            f"the loss of {name_of_function(step)}",
            "a graph that is used up: the function has called loss.backward() itself, or has kept"
            " a tensor of an earlier batch with its graph",
            "no loss.backward() and no optimizer.step() in it, only `return loss`: the step does"
            " both; and hidden.detach() for what goes on from batch to batch",
        ) from error


def name_of_function(step: Step) -> str:
    """The name of the user's function."""
    return getattr(step.function, "__name__", None) or repr(step.function)


def describe(step: Step) -> str:
    """What will run, in the order in which it runs; see `explain`."""
    lines = [f"{name_of_function(step)}: one call is one update"]
    shown = {**places.SET_UP, **places.PLACES}
    for place, meaning in shown.items():
        if names := _names_in(step, place):
            lines.append(f"  {place:<11} {' > '.join(names)}")
        elif place in {"gradients", "forward", "apply"}:
            lines.append(f"  {place:<11} {meaning}")
    return "\n".join(lines)


def _names_in(step: Step, place: str) -> list[str]:
    names = [
        feature.name
        for feature in step.features
        if place in feature.wraps
        or (place == "prepare" and feature.prepare)
        or (place == "init" and feature.init)
    ]
    owners = [feature.name for feature in step.features if place in feature.owns]
    if names and place not in places.SET_UP:
        return [*names, *(owners or [name_of_function(step) if place == "forward" else "default"])]
    return names + owners


def _check_composition(features: tuple[Feature, ...]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for index, feature in enumerate(features):
        claims = [("own the place", place) for place in feature.owns]
        claims += [("keep state under the name", name) for name in feature.init]
        for claim in claims + [("set the", name) for name in feature.claims]:
            other = seen.setdefault(claim, index)
            if other != index:
                raise CompositionError(
                    f"{feature.name} composed with {features[other].name}",
                    f"that both {claim[0]} {claim[1]!r}",
                    "one of the two" + ", or another name=..." * claim[0].startswith("keep"),
                )
    check_excluded(features, alone=True)


def _by_name(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found


def _rebuild(module: str, qualname: str, features: tuple[Feature, ...]) -> Step:
    importlib.import_module(module)
    return Step(_by_name(module, qualname).function, features)
