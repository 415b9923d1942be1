"""Walking through a batch: any nesting of containers, each kept in its own type."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import attrs
from torch import Tensor

from loopkit.errors import DataError

Leaf = Callable[[Any], Any]


def map_tensors(function: Leaf, tree: Any) -> Any:
    """Apply `function` to the tensors of `tree`, keeping every container's own type.

    Objects that are no container but know how to move (they have `.to`) count as
    leaves as well; anything else is returned as it is.

    Example:
        >>> import torch
        >>> map_tensors(lambda t: t + 1, {"a": (torch.zeros(()), "text")})
        {'a': (tensor(1.), 'text')}
    """
    if isinstance(tree, Tensor) or _moves_itself(tree):
        return function(tree)
    return map_container(functools.partial(map_tensors, function), tree)


def map_container(inside: Leaf, tree: Any) -> Any:
    """Apply `inside` to what a container holds; what is none is returned as it is."""
    if isinstance(tree, list | tuple):
        return _map_sequence(inside, tree)
    if isinstance(tree, Mapping):
        return _map_mapping(inside, tree)
    if names := _field_names(tree):
        return _map_fields(inside, tree, names)
    return tree


def _moves_itself(tree: Any) -> bool:
    return callable(getattr(type(tree), "to", None))  # of the type: a field may be called so


def _map_sequence(inside: Leaf, tree: Any) -> Any:
    mapped = [inside(item) for item in tree]
    if hasattr(tree, "_fields"):
        return type(tree)(*mapped)
    if isinstance(tree, tuple):
        return type(tree)(mapped)
    result = copy.copy(tree)  # keeps what a list of the user's own type has beside its items
    result[:] = mapped
    return result


def _map_mapping(inside: Leaf, tree: Mapping[Any, Any]) -> Any:
    mapped = {key: inside(value) for key, value in tree.items()}
    if not hasattr(tree, "__setitem__"):
        return type(tree)(mapped)  # type: ignore[call-arg]
    result = copy.copy(tree)  # keeps what the type adds, such as a default factory
    for key, value in mapped.items():
        result[key] = value
    return result


def _map_fields(inside: Leaf, tree: Any, names: tuple[str, ...]) -> Any:
    result = copy.copy(tree)
    for name in names:  # object.__setattr__: the user's class may be frozen, the copy is ours
        object.__setattr__(result, name, inside(getattr(tree, name)))
    return result


def _field_names(tree: Any) -> tuple[str, ...]:
    if isinstance(tree, type):
        return ()
    if attrs.has(type(tree)):
        return tuple(field.name for field in attrs.fields(type(tree)))
    if dataclasses.is_dataclass(tree):
        return tuple(field.name for field in dataclasses.fields(tree))
    return ()


def children_of(tree: Any) -> dict[Any, Any] | None:
    """What a container holds directly, by key, number or field; None for what is no container.

    Example:
        >>> children_of(("a", 1)), children_of("text")
        ({0: 'a', 1: 1}, None)
    """
    if isinstance(tree, Tensor) or _moves_itself(tree):
        return None
    if isinstance(tree, list | tuple):
        return dict(enumerate(tree))
    if isinstance(tree, Mapping):
        return dict(tree)
    return {name: getattr(tree, name) for name in _field_names(tree)} or None


def leaves_of(tree: Any) -> Iterator[Any]:
    """What `tree` holds that is no container, in order.

    Example:
        >>> [*leaves_of([1, {"b": (2, "text")}])]
        [1, 2, 'text']
    """
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from leaves_of(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from leaves_of(item)
    elif names := _field_names(tree):
        for name in names:
            yield from leaves_of(getattr(tree, name))
    else:
        yield tree


def batch_size(batch: Any) -> int:
    """Number of samples in a batch: the length of its first tensor or array with a dimension.

    A batch without one counts as its `len()`, a mapping as its first value does, and one
    without a length as a single sample.

    Example:
        >>> import torch
        >>> batch_size((torch.zeros(8, 3), torch.zeros(8))), batch_size(["a", "b"])
        (8, 2)
    """
    first = batch[0] if type(batch) in {list, tuple} and batch else batch
    if isinstance(first, Tensor) and first.ndim:  # the usual batch, without a walk
        return first.shape[0]
    for leaf in leaves_of(batch):
        shape = getattr(leaf, "shape", None)
        if isinstance(shape, tuple) and shape:
            return int(shape[0])
    if isinstance(batch, Mapping) and batch:
        return batch_size(next(iter(batch.values())))
    try:
        return len(batch)
    except TypeError:  # a number, or a tensor without a dimension
        return 1


def rows_of(tree: Any, start: int, stop: int, total: int) -> Any:
    """The samples from `start` to `stop` of a batch of `total`, every container in its own type.

    Tensors and arrays are cut along their first dimension, and so are plain sequences (of
    text, of numbers) with an item for each sample. Numbers, text and 0-d tensors stay.

    Raises:
        DataError: For what cannot be cut.

    Example:
        >>> rows_of({"x": [1, 2, 3], "y": ("a", "b", "c"), "z": 7}, 1, 3, 3)
        {'x': [2, 3], 'y': ('b', 'c'), 'z': 7}
    """
    shape = getattr(tree, "shape", None)
    if isinstance(shape, tuple):
        if shape and shape[0] != total:
            _refuse_to_cut(f"{type(tree).__name__} of shape {[*shape]}", total)
        return tree[start:stop] if shape else tree
    if isinstance(tree, list | tuple) and len(tree) == total and all(map(_is_leaf, tree)):
        return tree[start:stop]
    if _is_leaf(tree) and _moves_itself(tree):
        _refuse_to_cut(type(tree).__name__, total)
    return map_container(functools.partial(rows_of, start=start, stop=stop, total=total), tree)


def _is_leaf(tree: Any) -> bool:
    contains = isinstance(tree, list | tuple | Mapping) or _field_names(tree)
    return not contains and not getattr(tree, "shape", None)


def _refuse_to_cut(found: str, total: int) -> NoReturn:
    raise DataError(
        f"cutting a batch of {total} samples",
        f"a {found} in it, which does not say where to cut",
        "tensors with the samples in their first dimension, or with_microbatch(n, cut=f) with"
        " f(batch, n) -> pieces of at most n samples",
    )
