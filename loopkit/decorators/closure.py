"""Optimizers that evaluate the loss themselves, such as LBFGS."""

from typing import Any

import attrs

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
        computed = [state.loss]
        optimizer: Any = state.optimizer
        optimizer.step(lambda: computed.pop() if computed else recompute(state))
        return True


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
