"""Tensors that lie in parts: on several ranks, and in several files of a checkpoint."""

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.nested import map_container

Numbers = tuple[int, ...]


@attrs.frozen(eq=False)
class Part:
    """A part of a tensor.

    Attributes:
        shape: That of the whole.
        start: Where the part begins, in each dimension.
        tensor: The part itself; on the meta device, where another process holds it.

    Example:
        >>> whole, half = torch.zeros(4), torch.ones(2)
        >>> Part((4,), (2,), half).copy_to(Part((4,), (0,), whole)), whole
        (True, tensor([0., 0., 1., 1.]))
    """

    shape: Numbers
    start: Numbers
    tensor: Tensor

    @property
    def ends(self) -> Numbers:
        """Where it ends, in each dimension."""
        return tuple(a + n for a, n in zip(self.start, self.tensor.shape, strict=True))

    def common(self, other: "Part") -> tuple[Numbers, Numbers] | None:
        """Where what is in this and in another part begins and ends; None if nothing is."""
        begins = tuple(map(max, self.start, other.start))
        ends = tuple(map(min, self.ends, other.ends))
        return (begins, ends) if all(a < b for a, b in zip(begins, ends, strict=True)) else None

    def copy_to(self, target: "Part") -> bool:
        """Copy what this part and a target have in common; whether there is any."""
        if (found := self.common(target)) is None:
            return False
        target.cut(*found).copy_(self.cut(*found))
        return True

    def cut(self, begins: Numbers, ends: Numbers) -> Tensor:
        """A view of what lies between two corners of the whole."""
        places = zip(begins, ends, self.start, strict=True)
        return self.tensor[tuple(slice(a - start, b - start) for a, b, start in places)]


@attrs.define(eq=False)
class Scattered:
    """A tensor in the parts of a checkpoint, which are read when it is known what is wanted.

    Attributes:
        shape: Of the whole.
        dtype: Of all parts.
        wanted: Memory for what is wanted of it, to be filled.
    """

    shape: torch.Size
    dtype: torch.dtype
    wanted: list[Part] = attrs.field(factory=list)

    def want(self, start: Numbers, sizes: Numbers, device: Any = "cpu") -> Tensor:
        """Memory that is to be filled with what begins at `start` and has these sizes."""
        memory = torch.empty(sizes, dtype=self.dtype, device=device)
        self.wanted.append(Part(self.shape, start, memory))
        return memory

    def want_whole(self) -> Tensor:
        """Memory for all of it."""
        return self.want((0,) * len(self.shape), self.shape)


def map_scattered(function: Callable[[Scattered], Any], tree: Any) -> Any:
    """Apply `function` to what is scattered in a tree.

    Example:
        >>> tree = {"a": [Scattered(torch.Size([2]), torch.int64), 1]}
        >>> map_scattered(lambda scattered: scattered.shape, tree)
        {'a': [torch.Size([2]), 1]}
    """
    if isinstance(tree, Scattered):
        return function(tree)
    return map_container(functools.partial(map_scattered, function), tree)
