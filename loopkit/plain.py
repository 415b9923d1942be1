"""Plain data: what can be saved without running code to load it."""

import copy
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import Tensor

NUMPY_DTYPES = {f"{kind}int{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)}
NUMPY_DTYPES |= {"bool", "float16", "float32", "float64", "complex64", "complex128"}


@runtime_checkable
class Stateful(Protocol):
    """What can be saved and restored: it has `state_dict` and `load_state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that has to be saved."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Take back what `state_dict` gave."""
        ...


def is_plain(value: object) -> bool:
    """Whether `value` is numbers, text, tensors, and lists, tuples, sets and dicts of those.

    Arrays and scalars of NumPy are plain where they hold numbers that torch has a dtype for.

    Example:
        >>> import numpy
        >>> is_plain({"a": [1, None]}), is_plain(numpy.ones(3)), is_plain(object())
        (True, True, False)
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Tensor):
        return True
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and is_plain(item) for key, item in value.items())
    return _is_numpy(value) and value.dtype.name in NUMPY_DTYPES


def _is_numpy(value: object) -> TypeGuard[Any]:
    numpy = sys.modules.get("numpy")  # who has an array has imported it; loopkit need not
    return numpy is not None and (
        type(value) is numpy.ndarray or isinstance(value, numpy.generic)  # no masked arrays
    )


def is_stateful(value: object) -> TypeGuard[Stateful]:
    """Whether `value` can be saved through `state_dict` and `load_state_dict`.

    Example:
        >>> import torch
        >>> is_stateful(torch.nn.Linear(1, 1)), is_stateful(3)
        (True, False)
    """
    return isinstance(value, Stateful) and not isinstance(value, type)


def saved(value: object) -> Any:
    """What stands for `value` in a checkpoint."""
    return value.state_dict() if is_stateful(value) else value


def saveable(values: Mapping[str, object]) -> dict[str, Any]:
    """Those of `values` that a checkpoint can hold, as it holds them."""
    return {k: saved(v) for k, v in values.items() if _is_saveable(v)}


def _is_saveable(value: object) -> bool:
    return is_stateful(value) or is_plain(value)


def unsaveable(values: Mapping[str, object]) -> dict[str, str]:
    """The others: what a checkpoint cannot hold, by name, and the type of each.

    Example:
        >>> unsaveable({"count": 3, "tokenize": str.split})
        {'tokenize': 'method_descriptor'}
    """
    return {k: type(v).__name__ for k, v in values.items() if not _is_saveable(v)}


def restore(values: dict[str, Any], loaded: Mapping[str, Any]) -> None:
    """Put a copy of each of `loaded` back in its place among `values`."""
    for name, value in copy.deepcopy(dict(loaded)).items():
        if is_stateful(values.get(name)):
            values[name].load_state_dict(value)
        else:
            values[name] = value
