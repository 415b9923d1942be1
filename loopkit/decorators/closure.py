"""Optimizers that evaluate the loss themselves, such as LBFGS."""

from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.compose import Decorator, compose, own, wrap
from loopkit.state import TrainState
from loopkit.types import Recompute
from loopkit.window import KeepMicroBatches


@attrs.frozen
class StepWithClosure:
    """The optimizer's step, with a closure that computes the gradients again."""

    def __call__(self, state: TrainState, recompute: Recompute) -> bool:
        """The first evaluation is the one that the step has made already."""
        if state.verdict is not None and state.verdict.item():
            return False
        computed = [_over_ranks(state)]
        optimizer: Any = state.optimizer

        def closure() -> Tensor:
            if computed:
                return computed.pop()
            recompute(state)
            return _over_ranks(state)

        optimizer.step(closure)
        return True


def _over_ranks(state: TrainState) -> Tensor:
    """The loss, equal on all ranks: line searches branch on it."""
    if state.ranks.size == 1:
        return state.loss
    weight = state.outcome.total_weight()
    count = torch.as_tensor(len(state.outcome.parts) if weight is None else weight)
    count = count.to(state.device, torch.float64)
    total = torch.where(count > 0, state.loss.double() * count, 0)
    held = state.ranks.sum(torch.stack([total, count]))
    return held[0] / held[1]


def with_closure() -> Decorator:
    """Give the optimizer a closure that computes loss and gradients again.

    For optimizers that evaluate the loss several times in one update, such as
    `torch.optim.LBFGS`. Each evaluation runs the whole window with all layers
    (autocast, clipping); `state.loss` is that of the last.

    Example:
        >>> with_closure()
        with_closure()

    Source: https://docs.pytorch.org/docs/stable/optim.html#optimizer-step-closure
    """
    return compose(
        own(name="with_closure()", apply=StepWithClosure()),
        wrap(name="with_closure()", split=KeepMicroBatches),
    )
