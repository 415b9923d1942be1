"""Losses and gradients that are not finite."""

import functools
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from loopkit.check import one_of
from loopkit.compose import Decorator, wrap
from loopkit.errors import NonFiniteError
from loopkit.state import TrainState
from loopkit.types import Apply, Recompute, Transform


@attrs.frozen
class VoteOnFinite:
    """A vote to skip where the loss or a gradient is not finite."""

    inner: Transform

    def __call__(self, state: TrainState) -> None:
        """Vote, then go on."""
        # The largest element: unlike the 2-norm it does not overflow where no gradient did.
        largest = get_total_norm(state.gradients(), norm_type=float("inf"))
        state.skip_if(~(torch.isfinite(largest) & torch.isfinite(state.loss).to(largest.device)))
        self.inner(state)


@attrs.frozen
class RaiseOnVote:
    """An error in place of the update that would be skipped."""

    inner: Apply

    def __call__(self, state: TrainState, recompute: Recompute) -> bool | Tensor:
        """Raise before the optimizer has changed anything."""
        if state.verdict is not None and state.verdict.item():
            raise NonFiniteError(
                f'with_nonfinite("raise") at update {state.step + 1}',
                f"loss {state.loss.item()}, and non-finite gradients in {_culprits(state)}",
                "a lower learning rate, with_clip, or bf16; with_nonfinite('skip') to go on; the"
                " weights are as they were after the update before",
            )
        return self.inner(state, recompute)


def _culprits(state: TrainState) -> str:
    names = {id(p): name for name, p in state.model.named_parameters()}
    bad: list[Any] = [
        names.get(id(p), "a parameter outside the model")
        for p in state.parameters_with_grad()
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    return f"{len(bad)} parameters ({', '.join([*bad[:3], '...'][: len(bad)])})" if bad else "none"


def with_nonfinite(policy: str) -> Decorator:
    """Skip updates whose loss or gradients are not finite, or raise an error instead.

    A skipped update leaves weights, optimizer, schedule and averages as they were;
    `state.applied` is false. All ranks skip or raise together. Skipping does not wait
    for the device where the optimizer takes `found_inf` (`fused=True`); raising must.

    Args:
        policy: `"skip"` or `"raise"`.

    Raises:
        UsageError: For another policy.
        NonFiniteError: With `"raise"`, before the optimizer's step; names the update.

    Example:
        >>> with_nonfinite("skip")
        with_nonfinite('skip')
    """
    name = f"with_nonfinite({policy!r})"
    if one_of(name, "policy", policy, ("skip", "raise")) == "skip":
        return wrap(name=name, transform=VoteOnFinite)
    return wrap(name=name, transform=VoteOnFinite, apply=functools.partial(RaiseOnVote))
