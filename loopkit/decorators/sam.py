"""Sharpness-aware minimisation."""

import functools
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.check import positive
from loopkit.compose import Decorator, wrap
from loopkit.modes import scratch_statistics
from loopkit.state import TrainState
from loopkit.types import GradientsOf
from loopkit.window import KeepMicroBatches, MicroBatches


@attrs.frozen
class GradientsAtTheWorst:
    """The layer of `with_sam`."""

    inner: GradientsOf
    rho: float
    adaptive: bool

    def __call__(self, state: TrainState, window: MicroBatches) -> None:
        """The gradients at the weights where the loss is worst nearby."""
        self.inner(state, window)
        found = state.outcome, state.output
        if not state.gradients():  # a window over nothing, or a backward pass that went elsewhere
            return
        parameters: list[Any] = state.parameters_with_grad()
        own = [p.detach().clone() for p in parameters]
        try:
            with torch.no_grad():
                _climb(parameters, self.rho, self.adaptive)
            with scratch_statistics(state.model):
                self.inner(state, window)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, own)
        state.outcome, state.output = found


def _climb(parameters: list[Any], rho: float, adaptive: bool) -> None:
    """`w <- w + rho * g / norm(g)`; where the norm is not finite the weights stay."""
    slopes: list[Any] = [p.grad for p in parameters]
    scaled = [g * p.abs() for p, g in zip(parameters, slopes, strict=True)] if adaptive else slopes
    norm: Any = nn.utils.get_total_norm(scaled)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards on all ranks
    length = rho / (norm + 1e-12)
    for parameter, slope in zip(parameters, scaled, strict=True):
        step: Tensor = slope * parameter.abs() if adaptive else slope
        # Where it overflowed the next backward pass does again, and amp skips the update
        there = length.to(step.device)
        parameter.add_(torch.where(there.isfinite() & (there > 0), step * there, 0))


def with_sam(rho: float = 0.05, *, adaptive: bool = False) -> Decorator:
    """Sharpness-aware minimisation: the gradient of the worst loss near the weights.

    `g = grad L(w + rho * grad L(w) / norm(grad L(w)))`, over the whole window of an update,
    so it costs two forward and backward passes. Loss scales and window weights leave the
    direction as it is. `state.loss` is that at the weights themselves, and running
    statistics of BatchNorm see the first pass only. The weights come back bit for bit.

    Args:
        rho: How far to look.
        adaptive: Measure in units of the weights: `rho * w**2 * g / norm(abs(w) * g)`; rho is
            then ten times as large.

    Raises:
        UsageError: If rho is not a number above 0.

    Example:
        >>> with_sam(0.05)
        with_sam(0.05)

    Source: https://arxiv.org/abs/2010.01412, https://arxiv.org/abs/2102.11600 (adaptive)
    """
    name = f"with_sam({rho!r}{', adaptive=True' * bool(adaptive)})"
    layer = functools.partial(
        GradientsAtTheWorst, rho=positive(name, "rho", rho), adaptive=bool(adaptive)
    )
    return wrap(name=name, gradients=layer, split=KeepMicroBatches)
