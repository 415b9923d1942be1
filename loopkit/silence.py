"""A backward pass that runs and leaves zeros."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def silenced(loss: Tensor) -> Iterator[None]:
    """Within it the backward pass of `loss` gives each leaf a gradient of zeros.

    For a rank whose batch counts for nothing: the others wait for its backward pass, and what
    is computed in it may be no number. Zero times that is no number either, so the gradients
    are replaced where they enter the leaves.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> loss = (x.sum() / x.sum())
        >>> with silenced(loss):
        ...     loss.backward()
        >>> x.grad
        tensor([0., 0.])
    """
    hooks = [leaf.register_prehook(_zeros) for leaf in _leaves(loss)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zeros(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)


def _leaves(loss: Tensor) -> Iterator[Any]:
    """The nodes of the graph that accumulate gradients."""
    seen, todo = set[Any](), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            yield node
