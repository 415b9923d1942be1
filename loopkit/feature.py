"""A feature: what one decorator adds to a step, as a value."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from loopkit.errors import CompositionError
from loopkit.types import Init, Layer, SetUp


def _comparable(value: Any) -> Any:
    """`functools.partial` compares by identity; here settings decide."""
    if isinstance(value, functools.partial):
        return value.func, _comparable(value.args), _comparable(value.keywords)
    if isinstance(value, Mapping):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_comparable, value))
    return value


def _values(**settings: Any) -> Any:
    return attrs.field(eq=_comparable, hash=False, factory=dict, **settings)


@attrs.frozen(repr=False)
class Feature:
    """What one decorator adds: layers round places, owners of places, set-up, and named state.

    Two features are equal if they were written equal: layers made by
    `functools.partial` compare by their settings.

    Attributes:
        name: What the user wrote, such as `with_clip(1.0)`.
        wraps: For each place, what makes a layer from the one below it.
        owns: For each place, what stands there in the default's stead.
        prepare: Run once on a state before its first update.
        init: For each name, what makes the state that is kept under it.
        claims: What only one feature of a step may do, such as "precision".
        excludes: Places that no other feature may fill beside it.
    """

    name: str
    wraps: Mapping[str, Layer] = _values()
    owns: Mapping[str, Callable[..., Any]] = _values()
    prepare: SetUp | None = attrs.field(default=None, eq=_comparable)
    init: Init = _values()
    claims: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name


def name_of(value: Any) -> str:
    """How a layer's maker is shown: the class with its settings.

    Example:
        >>> name_of(functools.partial(dict, strength=0.1))
        'dict(strength=0.1)'
    """
    if isinstance(value, functools.partial):
        settings = [*map(repr, value.args), *(f"{k}={v!r}" for k, v in value.keywords.items())]
        return f"{name_of(value.func)}({', '.join(settings)})"
    return getattr(value, "__qualname__", None) or repr(value)


def check_excluded(features: tuple[Feature, ...], *, alone: bool) -> None:
    """Check that none of the features fills a place that another one excludes.

    Args:
        features: Those of a step.
        alone: Leave out what spreads a state over ranks, which does nothing on one process.

    Raises:
        CompositionError: If one does.
    """
    idle = {feature.name for feature in features if alone and "parallelize" in feature.owns}
    for feature in features:
        for other in features:
            if other.name != feature.name and other.name not in idle:
                _check_pair(feature, other)


def _check_pair(feature: Feature, other: Feature) -> None:
    for place in feature.excludes:
        if place in other.owns or place in other.wraps:
            raise CompositionError(
                f"{feature.name} composed with {other.name}",
                f"that the first leaves nothing to do for what the second has in {place!r}",
                "one of the two",
            )
