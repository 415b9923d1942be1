"""Gradient accumulation."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from loopkit.check import at_least_one
from loopkit.compose import Decorator, own
from loopkit.errors import UsageError
from loopkit.state import TrainState
from loopkit.window import MicroBatches, Window

WindowSchedule = int | Mapping[int, int] | Callable[[TrainState], int]


@attrs.frozen
class WindowOf:
    """The owner of `window`: micro-batches of the next update."""

    n: WindowSchedule

    def __call__(self, state: TrainState) -> int:
        """Look the schedule up."""
        if isinstance(self.n, int):
            return self.n
        if isinstance(self.n, Mapping):
            return self.n[max((epoch for epoch in self.n if epoch <= state.epoch), default=0)]
        return at_least_one(f"with_grad_accum({self.n!r})", "n", self.n(state))


@attrs.frozen
class TakeWindow:
    """The owner of `split`: a call takes a window of micro-batches."""

    n: WindowSchedule

    def __call__(self, state: TrainState, batch: Any) -> MicroBatches:  # noqa: ARG002
        """The window's micro-batches."""
        if not isinstance(batch, Window):
            raise UsageError(
                "step(state, batch)",
                f"a bare {type(batch).__name__} for a step with with_grad_accum({self.n!r})",
                "for window in lk.windows(loader, n): step(state, window), or"
                " step(state, lk.Window([batch, ...])); lk.run makes the windows itself",
            )
        return batch.micro_batches()


def with_grad_accum(n: WindowSchedule) -> Decorator:
    """Accumulate gradients over `n` micro-batches for each update.

    One call of the step takes a `Window` of micro-batches and makes one update with
    the gradient of the window's mean: `sum(w_i * grad(loss_i)) / sum(w_i)`, where `w_i` is
    the `"weight"` that the step function returned, or 1. `run` makes the windows. A
    shorter window at the end of an epoch is the exact mean over what it holds.

    A micro-batch of weight zero adds nothing, and an update over nothing is skipped, where
    the host knows the weight (a number, or a tensor on the CPU). A weight that is a tensor on
    a device is not read, which would wait: there, let a mean over nothing be finite, as
    `F.cross_entropy(..., ignore_index=...)` has finite gradients, or by
    `total / count.clamp(min=1)`.

    Args:
        n: Micro-batches for each update; or by epoch, `{0: 1, 5: 4}` (4 from epoch 5
            on); or a function of the state's clock (`step`, `epoch`, `batch`, `samples`).

    Raises:
        UsageError: If it is below 1, or a mapping that does not start at epoch 0.

    Example:
        >>> with_grad_accum(4)
        with_grad_accum(4)
    """
    name = f"with_grad_accum({n!r})"
    if isinstance(n, Mapping):
        if 0 not in n:
            raise UsageError(name, f"epochs {sorted(n)}", "a mapping that says n from epoch 0 on")
        n = dict(n)
    for value in n.values() if isinstance(n, dict) else [] if callable(n) else [n]:
        at_least_one(name, "n", value)
    return own(name=name, window=WindowOf(n), split=TakeWindow(n))
