"""Clipping gradients."""

import functools
from typing import Any

import attrs
from torch import Tensor, nn

from loopkit.check import positive
from loopkit.compose import Decorator, wrap
from loopkit.norms import total_norm
from loopkit.state import TrainState
from loopkit.types import Transform


@attrs.frozen
class ClipNorm:
    """The layer of `with_clip`."""

    inner: Transform
    max_norm: float
    norm_type: float = 2.0

    def __call__(self, state: TrainState) -> None:
        """Clip, and note the norm from before."""
        clip = _clip_sharded if state.ranks.shards_tensors else nn.utils.clip_grad_norm_
        state.grad_norm = clip(state.parameters(), self.max_norm, self.norm_type)
        self.inner(state)


def _clip_sharded(parameters: list[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
    """The same where parameters are spread over ranks, some over others than the rest."""
    with_grad = [p for p in parameters if p.grad is not None]
    total = total_norm([p.grad for p in with_grad if p.grad is not None], norm_type)
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in with_grad:
        meshes.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    for held in meshes.values():
        nn.utils.clip_grads_with_norm_(held, max_norm, total)
    return total


@attrs.frozen
class ClipValue:
    """The layer of `with_clip_value`."""

    inner: Transform
    limit: float

    def __call__(self, state: TrainState) -> None:
        """Clip each element."""
        if state.ranks.shards_tensors:
            for gradient in state.ranks.local(state.gradients()):
                gradient.clamp_(-self.limit, self.limit)
        else:
            nn.utils.clip_grad_value_(state.parameters(), self.limit)
        self.inner(state)


def with_clip(max_norm: float, *, norm_type: float = 2.0) -> Decorator:
    """Scale the gradients down so that their global norm is at most `max_norm`.

    `g <- g * min(1, max_norm / (norm(g) + 1e-6))`, with the norm over all parameters
    of the optimizer together. It sees the gradients of the mean loss: after loss
    scaling and window weights have left them. The norm from before is in
    `state.grad_norm`; `with_clip(math.inf)` only measures it.

    Args:
        max_norm: The largest norm that is left.
        norm_type: p of the p-norm; `math.inf` for the largest element.

    Raises:
        UsageError: If either is not a number above 0.

    Example:
        >>> with_clip(1.0)
        with_clip(1.0)

    Source: https://arxiv.org/abs/1211.5063
    """
    name = (
        f"with_clip({max_norm})"
        if norm_type == 2
        else f"with_clip({max_norm}, norm_type={norm_type})"
    )
    settings = positive(name, "max_norm", max_norm), positive(name, "norm_type", norm_type)
    layer = functools.partial(ClipNorm, max_norm=settings[0], norm_type=settings[1])
    return wrap(name=name, transform=layer)


def with_clip_value(limit: float) -> Decorator:
    """Clip each element of the gradients to `[-limit, limit]`.

    Args:
        limit: The largest absolute value that is left.

    Raises:
        UsageError: If it is not a number above 0.

    Example:
        >>> with_clip_value(0.5)
        with_clip_value(0.5)
    """
    name = f"with_clip_value({limit})"
    layer = functools.partial(ClipValue, limit=positive(name, "limit", limit))
    return wrap(name=name, transform=layer)
