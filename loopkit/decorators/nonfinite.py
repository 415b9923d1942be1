"""Losses and gradients that are not finite."""

import functools
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.check import at_least_one, one_of
from loopkit.compose import Decorator, wrap
from loopkit.errors import NonFiniteError
from loopkit.state import RAISE, TrainState
from loopkit.types import Apply, Recompute, Transform

MOST = 1000


@attrs.frozen
class VoteOnFinite:
    """A vote where the loss or a gradient is not finite, before anything can hide it."""

    inner: Transform
    policy: str

    def __call__(self, state: TrainState) -> None:
        """Let the gradients become those of the loss, then vote."""
        self.inner(state)
        if state.outcome.is_empty():
            return
        loss = ~torch.isfinite(state.loss)
        gradients = ~_are_finite(state.ranks.local(state.gradients()))
        if self.policy == "skip":
            state.skip_if(loss.to(gradients.device) | gradients)
            return
        for explained in state.votes:  # an overflow that a loss scale is adapting to
            gradients = gradients & (explained == 0).to(gradients.device)
        state.raise_if(loss.to(gradients.device) | gradients)


@attrs.frozen
class LimitSkips:
    """An error where too many updates in a row were skipped."""

    inner: Transform
    most: int

    def __call__(self, state: TrainState) -> None:
        """Go on, then count."""
        self.inner(state)
        if state.applied is not True and state.skips.count(state) >= self.most:
            raise NonFiniteError(
                f'with_nonfinite("skip", most={self.most}) at update {state.step}',
                f"{state.skips.in_a_row} updates in a row skipped: loss {state.loss.item()}, and"
                f" non-finite gradients in {_culprits(state)}",
                "data without NaN, or a checkpoint from before; with_nonfinite('raise') stops at"
                " the first; most=None skips for ever",
            )


def _are_finite(gradients: list[Tensor]) -> Tensor:
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    filled = [g for g in dense if g.numel()]
    if not filled:
        return torch.tensor(True)
    # The largest element: unlike the 2-norm it does not overflow where no gradient did.
    norms = torch._foreach_norm(filled, float("inf"))  # noqa: SLF001
    return torch.isfinite(torch.stack([norm.to(norms[0].device).float() for norm in norms])).all()


@attrs.frozen
class RaiseOnVote:
    """An error in place of the update that would be skipped."""

    inner: Apply

    def __call__(self, state: TrainState, recompute: Recompute) -> bool | Tensor:
        """Raise before the optimizer has changed anything."""
        if state.verdict is not None and state.verdict.item() >= RAISE:
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


def with_nonfinite(policy: str, *, most: int | None = MOST) -> Decorator:
    """Skip updates whose loss or gradients are not finite, or raise an error instead.

    A skipped update leaves weights, optimizer, schedule and averages as they were;
    `state.applied` is false; a thousand in a row are an error, as nothing is learned any more.
    All ranks skip or raise together. Skipping does not wait
    for the device where the optimizer takes `found_inf` (`fused=True`); raising must.
    Overflows that fp16's loss scale adapts to are skipped under either policy, and so is an
    update over nothing (a weight of zero), whose loss is no error.

    Args:
        policy: `"skip"` or `"raise"`.
        most: Skipped updates in a row, from any cause but a weight of zero, that are too many to
            go on; None for no limit. What a device decided is read up to 128 updates later.

    Raises:
        UsageError: For another policy, or a limit below 1.
        NonFiniteError: With `"raise"`, before the optimizer's step; names the update. With
            `"skip"` after `most` in a row.

    Example:
        >>> with_nonfinite("skip")
        with_nonfinite('skip')
    """
    name = f"with_nonfinite({policy!r}{'' if most == MOST else f', most={most!r}'})"
    vote = functools.partial(VoteOnFinite, policy=one_of(name, "policy", policy, ("skip", "raise")))
    if policy == "skip" and most is None:
        return wrap(name=name, unscale=vote)
    if policy == "skip":
        limit = functools.partial(LimitSkips, most=at_least_one(name, "most", most))
        return wrap(name=name, unscale=vote, after=limit)
    return wrap(name=name, unscale=vote, apply=RaiseOnVote)
