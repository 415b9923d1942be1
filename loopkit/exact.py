"""Exact comparison, bit for bit."""

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor


def assert_bitwise_equal(ours: Any, theirs: Any, where: str = "value") -> None:
    """Raise unless two nested values are equal bit for bit, NaNs and signs of zero included.

    Args:
        ours: Tensors, arrays, numbers, text, and mappings and sequences of those.
        theirs: The same.
        where: What the value is called in the message.

    Raises:
        AssertionError: Saying where they differ first, and by how much.

    Example:
        >>> assert_bitwise_equal({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])})
        Traceback (most recent call last):
        AssertionError: value['a'] differs in 1 of 1 elements, by at most 0.0
    """
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        _assert_equal_tensors(ours, theirs, where)
    elif isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if ours.keys() != theirs.keys():
            fail(f"{where} has the keys {sorted(map(str, ours))}, not {sorted(map(str, theirs))}")
        for key in ours:
            assert_bitwise_equal(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            fail(f"{where} has {len(ours)} items, not {len(theirs)}")
        for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_bitwise_equal(our, their, f"{where}[{i}]")
    elif _is_array(ours) or _is_array(theirs):
        _assert_equal_arrays(ours, theirs, where)
    elif ours != theirs and not (ours != ours and theirs != theirs):  # noqa: PLR0124
        fail(f"{where} is {ours!r}, not {theirs!r}")


def _assert_equal_tensors(ours: Tensor, theirs: Tensor, where: str) -> None:
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        fail(f"{where} is {ours.dtype}{[*ours.shape]}, not {theirs.dtype}{[*theirs.shape]}")
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    bits = [t.contiguous().reshape(-1, 1).view(torch.uint8) for t in (ours, theirs)]
    differs = (bits[0] != bits[1]).any(dim=1)
    if differs.any():
        most = (ours.double() - theirs.double()).abs().max().item()
        fail(f"{where} differs in {differs.sum()} of {ours.numel()} elements, by at most {most}")


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _assert_equal_arrays(ours: Any, theirs: Any, where: str) -> None:
    if not (_is_array(ours) and _is_array(theirs)):
        fail(f"{where} is a {type(ours).__name__}, not a {type(theirs).__name__}")
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        fail(f"{where} is {ours.dtype}{[*ours.shape]}, not {theirs.dtype}{[*theirs.shape]}")
    if ours.dtype.hasobject:
        assert_bitwise_equal(ours.tolist(), theirs.tolist(), where)
        return
    if ours.tobytes() == theirs.tobytes():
        return
    elements = zip(ours.reshape(-1), theirs.reshape(-1), strict=True)
    differing = sum(our.tobytes() != their.tobytes() for our, their in elements)
    fail(f"{where} differs in {differing} of {ours.size} elements")


def fail(message: str) -> NoReturn:
    """Raise an AssertionError, from where an expression has to."""
    raise AssertionError(message)
