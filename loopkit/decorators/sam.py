"""Sharpness-aware minimisation."""

import functools
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.check import positive
from loopkit.compose import Decorator, wrap
from loopkit.modes import scratch_statistics
from loopkit.norms import total_norm
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
        held = [*state.parameters_with_grad()]
        parameters = state.ranks.local([p.detach() for p in held])
        own = [p.clone() for p in parameters]
        try:
            with torch.no_grad():
                self._climb(state, held, parameters)
            with scratch_statistics(state.model):
                self.inner(state, window)
        finally:
            torch._foreach_copy_(parameters, own)
        state.outcome, state.output = found

    def _climb(self, state: TrainState, held: list[nn.Parameter], parts: list[Tensor]) -> None:
        """`w <- w + rho * g / norm(g)`; where the norm is not finite the weights stay."""
        slopes: list[Any] = [p.grad for p in held]
        if self.adaptive:
            slopes = [slope * p.abs() for slope, p in zip(slopes, held, strict=True)]
        length = self.rho / (total_norm(slopes) + 1e-12)
        for part, slope in zip(parts, state.ranks.local(slopes), strict=True):
            step = slope * part.abs() if self.adaptive else slope
            # Where it overflowed the next backward pass does again, and amp skips the update
            there = length.to(step.device)
            part.add_(torch.where(there.isfinite() & (there > 0), step * there, 0))


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
