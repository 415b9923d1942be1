"""Composing: what makes decorators, and what stacks them."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from loopkit.errors import CompositionError
from loopkit.feature import Feature, name_of
from loopkit.places import PLACES, SET_UP
from loopkit.step import Step, describe
from loopkit.types import Init, Layer, SetUp, StepFunction


@attrs.frozen(repr=False)
class Decorator:
    """Features that can be composed onto a step function or a step.

    Example:
        >>> wrap(name="nothing")(lambda state, batch: batch)
        Step(<lambda>, nothing)
    """

    features: tuple[Feature, ...]

    def __call__(self, step: Step | StepFunction) -> Step:
        """The step with these features outside of those that it has."""
        inner = train_step(step)
        return Step(inner.function, inner.features + self.features)

    def __repr__(self) -> str:
        names = [*dict.fromkeys(feature.name for feature in self.features)]
        return names[0] if len(names) == 1 else f"compose({', '.join(reversed(names))})"


def train_step(function: Step | StepFunction) -> Step:
    """Lift a function `(state, batch) -> loss | mapping` to a step, and do no more.

    Raises:
        CompositionError: If what is given is no function.

    Example:
        >>> train_step(lambda state, batch: batch)
        Step(<lambda>)
    """
    if isinstance(function, Step):
        return function
    if not callable(function) or isinstance(function, type | Decorator):
        raise CompositionError(
            f"a step made from {function!r:.80}",
            f"a {type(function).__name__}, which is no step function",
            "a function (state, batch) -> loss; decorators are called first: @lk.with_clip(1.0)",
        )
    return Step(function)


def eval_step(function: Step | StepFunction) -> Step:
    """Lift a function for `evaluate` and `predict`: `train_step` under the reader's name for it.

    Example:
        >>> eval_step(lambda state, batch: batch)
        Step(<lambda>)
    """
    return train_step(function)


def compose(*decorators: Decorator) -> Decorator:
    """Several decorators as one: `compose(a, b, c)(f)` equals `a(b(c(f)))`.

    Raises:
        CompositionError: If one of them is not made by `wrap`, `own` or `compose`.

    Example:
        >>> compose(wrap(name="a"), wrap(name="b"))(lambda state, batch: batch)
        Step(<lambda>, b, a)
    """
    for decorator in decorators:
        if not isinstance(decorator, Decorator):
            raise CompositionError(
                f"compose(..., {decorator!r:.60}, ...)",
                f"a {type(decorator).__name__}",
                "decorators, with the function after: compose(a, b)(function)",
            )
    return Decorator(tuple(f for decorator in reversed(decorators) for f in decorator.features))


def wrap(
    *,
    name: str | None = None,
    prepare: SetUp | None = None,
    init: Init | None = None,
    claims: tuple[str, ...] = (),
    excludes: tuple[str, ...] = (),
    **layers: Layer,
) -> Decorator:
    """A decorator that puts a layer round places of the step.

    A layer is made from the one below it, must call it once, and is best a frozen
    attrs class: then the step prints, compares and pickles. Settings come through
    `functools.partial`. Where several features wrap one place, the one nearest to the
    function runs first.

    Args:
        name: How the feature is shown; by default the layers' names.
        prepare: Run once on a state before its first update.
        init: For each name, what makes the state kept in `state.features[name]` (and in
            checkpoints): a function of the state that returns an object with `state_dict`.
        claims: What only one feature of a step may do, such as "precision".
        excludes: Places that no other feature may fill beside it.
        **layers: For each place, what makes the layer: `transform=Centralise`.

    Raises:
        CompositionError: For a place that a step does not have.

    Example:
        >>> @attrs.frozen
        ... class Halve:
        ...     inner: Callable
        ...     def __call__(self, state):
        ...         for p in state.parameters_with_grad():
        ...             p.grad.mul_(0.5)
        ...         return self.inner(state)
        >>> wrap(transform=Halve)
        Halve
    """
    _check_places("wrap", layers, {*PLACES})
    if init is not None and not isinstance(init, Mapping):
        raise CompositionError(
            f"wrap(init={init!r:.40})", f"a {type(init).__name__}", 'a mapping: init={"name": make}'
        )
    made = name or " + ".join(map(name_of, layers.values())) or "wrap()"
    feature = Feature(
        made, wraps=layers, prepare=prepare, init=init or {}, claims=claims, excludes=excludes
    )
    return Decorator((feature,))


def own(
    *, name: str | None = None, excludes: tuple[str, ...] = (), **owners: Callable[..., Any]
) -> Decorator:
    """A decorator that takes places of the step over: it stands where the default stood.

    Two places are made of others: `gradients` of `around`, `forward` and `backward`, and
    `update` of `gradients`, `unscale`, `transform`, `verdict` and `apply`. What owns one
    of these two is made from the default, as a layer is from the one below it, and finds the
    parts as its attributes: `own(gradients=Pipeline)` with `Pipeline(parts)(state, window)`.

    Args:
        name: How the feature is shown; by default the owners' names.
        excludes: Places that no other feature may fill beside it.
        **owners: For each place, the callable: `apply=external_engine`.

    Raises:
        CompositionError: For a place that a step does not have.

    Example:
        >>> own(name="engine", backward=lambda state, loss: loss.backward())
        engine
    """
    _check_places("own", owners, {*PLACES, *SET_UP} - {"prepare", "init"})
    made = name or " + ".join(map(name_of, owners.values())) or "own()"
    return Decorator((Feature(made, owns=owners, excludes=excludes),))


def _check_places(call: str, given: dict[str, Any], known: set[str]) -> None:
    for place, value in given.items():
        if place not in known:
            raise CompositionError(
                f"{call}({place}=...)",
                "no such place for it in a step",
                f"one of {sorted(known)}" + "; own(...) for set-up" * (place in SET_UP),
            )
        if not callable(value):
            raise CompositionError(
                f"{call}({place}={value!r:.40})", f"a {type(value).__name__}", "a callable"
            )


def explain(step: Step | StepFunction) -> str:
    """What a call of the step will run, place by place, in order; `print(step)` shows it too.

    Example:
        >>> print(explain(train_step(lambda state, batch: batch)))
        <lambda>: one call is one update
          gradients   the gradients of the window, micro-batch by micro-batch
          forward     the step function
          apply       optimizer.step(), unless skipped
    """
    return describe(train_step(step))
