"""The places of a step, and what stands in each before a feature fills it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from loopkit.data.order import Uneven
from loopkit.errors import DataError, OutputError, UsageError
from loopkit.nested import batch_size
from loopkit.output import read_output, shared
from loopkit.silence import silenced
from loopkit.state import TrainState
from loopkit.types import (
    Apply,
    Around,
    Backward,
    Forward,
    GradientsOf,
    Recompute,
    Transform,
    Verdict,
)
from loopkit.window import MicroBatches, Window

# In the order in which an update runs them.
PLACES = {
    "window": "how many micro-batches run() gives one update",
    "before": "what precedes an update",
    "split": "the micro-batches of one call",
    "gradients": "the gradients of the window, micro-batch by micro-batch",
    "around": "a context round each micro-batch",
    "forward": "the step function",
    "backward": "loss.backward()",
    "unscale": "divides the gradients by what the losses were multiplied with",
    "transform": "changes or measures the gradients",
    "verdict": "gathers the votes to skip",
    "apply": "optimizer.step(), unless skipped",
    "update": "all from gradients to apply",
    "after": "what follows an update",
}
SET_UP = {
    "prepare": "once, before the first update",
    "compile": "once, after prepare",
    "parallelize": "once, after compile",
    "init": "named state, made once",
}


def no_window(state: TrainState) -> int | None:  # noqa: ARG001
    """The step takes bare batches."""
    return None


def whole_batch(state: TrainState, batch: Any) -> MicroBatches:  # noqa: ARG001
    """The batch is the only micro-batch."""
    if type(batch) is Window:
        raise UsageError(
            "step(state, Window(...))",
            f"a window of {batch.length} micro-batches for a step that does not accumulate",
            "@lk.with_grad_accum(n) on the step, or a bare batch",
        )
    return (batch,), 1


_NO_CONTEXT = nullcontext()


def no_context(state: TrainState, last: bool) -> AbstractContextManager[None]:  # noqa: ARG001
    """Nothing is entered."""
    return _NO_CONTEXT


def backward(state: TrainState, loss: Tensor) -> None:  # noqa: ARG001
    """The backward pass."""
    torch.autograd.backward(loss)  # what loss.backward() calls, less a frame of Python


def nothing(state: TrainState) -> None:
    """The place is empty."""


@attrs.frozen
class Gradients:
    """Forward and backward for each micro-batch; the gradients add up in `.grad`."""

    around: Around
    forward: Forward
    backward: Backward

    def __call__(self, state: TrainState, window: MicroBatches) -> None:
        """Leave the sum of the micro-batches' gradients, each with its share."""
        micro_batches, count = window
        outcome = state.begin_update(count)
        parts, without_gradient, ranks = outcome.parts, 0, state.ranks.size
        for micro_batch in micro_batches:
            if count != 1:
                state.output = None  # the last micro-batch's need not outlive it
            filler = False
            if type(micro_batch) is Uneven:
                filler, outcome.missing = micro_batch.filler, outcome.missing + micro_batch.missing
                micro_batch = micro_batch.batch  # noqa: PLW2901
            last = len(parts) + 1 == count or (count is None and micro_batches.at_end)  # type: ignore[attr-defined]
            with self.around(state, last):
                loss, weight, scalars, state.output = read_output(self.forward(state, micro_batch))
                if state.unproven and len(parts) > without_gradient:
                    _check_kept(state)
                if count == 1 and weight is None and not filler:
                    self.backward(state, loss)
                elif filler or (ranks > 1 and type(weight) is not Tensor and weight == 0):
                    weight = None if weight is None else 0
                    with silenced(loss):  # other ranks wait for this one's backward pass
                        self.backward(state, loss)
                elif (share := shared(loss, weight, count, ranks)) is None:
                    without_gradient += 1
                else:
                    self.backward(state, share)
            state.graph = loss  # freed only now, the last graph lent this one its leaf nodes
            parts.append((loss.detach(), weight, scalars))
            outcome.samples += 0 if filler else batch_size(micro_batch)
        if len(parts) != count:
            check_count(len(parts), count)
        if without_gradient == len(parts):
            state.votes.append(torch.ones(()))  # to skip: a window over nothing says nothing


def _check_kept(state: TrainState) -> None:
    """In the first window: the gradients of its earlier micro-batches are still there."""
    if state.ranks.alone and state.optimizer is not None and not state.gradients():
        raise OutputError(
            "a step function with accumulation",
            "no gradients of the micro-batches before: something in it has cleared them",
            "no optimizer.zero_grad() in the step function: an update begins by it",
        )


def check_count(found: int, count: int | None) -> None:
    """Check that a window had as many micro-batches as it said.

    Raises:
        DataError: If it had not, or none at all.
    """
    if found != count and (count is not None or not found):
        raise DataError(
            f"a window of {count or 'unknown'} micro-batches",
            f"{found} in it; an iterator can be read once",
            "a window that holds as many micro-batches as its length says, at least one",
        )


def divide_by_weight(state: TrainState) -> None:
    """The gradients of the window become those of the one mean over it."""
    outcome = state.outcome
    alone = outcome.length == 1 and outcome.divide_by is None
    divisor = None if alone else outcome.divisor()
    if divisor is not None and (gradients := state.gradients()):
        with torch.no_grad():
            _divide(state.ranks.local(gradients), divisor)


def _divide(gradients: list[Tensor], divisor: Any) -> None:
    if not isinstance(divisor, Tensor):
        torch._foreach_div_(gradients, divisor)
        return
    for device in {gradient.device for gradient in gradients}:
        held = [gradient for gradient in gradients if gradient.device == device]
        torch._foreach_div_(held, divisor.to(device))


def gather_votes(state: TrainState) -> Tensor | None:
    """Non-zero where any vote says skip; None where nobody voted."""
    votes = state.votes
    if not votes:
        return None
    device = votes[0].device
    for vote in votes:  # to a device nothing waits; from there to the host it does
        device = device if vote.is_cpu else vote.device
    return torch.stack([vote.to(device, non_blocking=True) for vote in votes]).amax()


@attrs.frozen
class WholeUpdate:
    """From the micro-batches to the new weights, in the order of the textbook."""

    gradients: GradientsOf
    unscale: Transform
    transform: Transform
    verdict: Verdict
    apply: Apply

    def __call__(self, state: TrainState, window: MicroBatches) -> bool | Tensor:
        """Update the weights; false where the update was skipped."""
        self.gradients(state, window)
        self.unscale(state)  # loss scale and window weight leave the gradients here
        self.transform(state)  # clip, noise, norms
        state.verdict = self.verdict(state)
        return self.apply(state, self.recompute)

    def recompute(self, state: TrainState) -> Tensor:
        """The gradients of the update once more; returns the loss."""
        self.gradients(state, state.window)
        self.unscale(state)
        self.transform(state)
        return state.loss


COMPOSITE: dict[str, Callable[[Any], Any]] = {
    "gradients": lambda step: Gradients(step.around, step.forward, step.backward),
    "update": lambda step: WholeUpdate(
        step.gradients, step.unscale, step.transform, step.verdict, step.apply
    ),
}
"""The places that are made of others; their owners are made from what stood there."""


def apply_update(state: TrainState, recompute: Recompute) -> bool | Tensor:  # noqa: ARG001
    """Take the optimizer's step, or skip it where the verdict says so.

    An optimizer that takes `found_inf` (the fused ones) decides on the device, and
    the answer is a tensor that nobody has waited for; with others the host asks.
    """
    optimizer: Any = state.optimizer
    verdict = state.verdict
    if verdict is None:
        optimizer.step()
        return True
    if not _skips_on_device(optimizer):
        if verdict.item():
            return False
        optimizer.step()
        return True
    optimizer.grad_scale, optimizer.found_inf = None, verdict
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf
    return verdict == 0


def _skips_on_device(optimizer: Optimizer) -> bool:
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    # Fused SGD allocates its momentum buffer, then skips the kernel that would fill it: a
    # skipped first update leaves garbage for the second (seen with torch 2.13). So wait once.
    return not isinstance(optimizer, SGD) or all(
        optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
        for group in optimizer.param_groups
        if group["momentum"]
        for parameter in group["params"]
        if parameter.grad is not None
    )
