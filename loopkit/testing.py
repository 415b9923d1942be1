"""For tests: the loop written by hand as an oracle, exact comparison, and checks of decorators."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.checking import Problem, check_decorator, small_problem
from loopkit.decorators.amp import DTYPES
from loopkit.exact import assert_bitwise_equal
from loopkit.state import TrainState
from loopkit.types import StepFunction

__all__ = [
    "ByHand",
    "Problem",
    "assert_bitwise_equal",
    "check_decorator",
    "small_problem",
    "train_by_hand",
]


@attrs.define
class ByHand:
    """What the loop written by hand found, beside the weights and the optimizer.

    Attributes:
        losses: One for each update, the weighted mean over its window.
        applied: For each update, whether it was made.
        norms: For each update the norm before clipping, where asked for.
        averages: The averaged weights by name, where asked for.
        scaler: The loss scaler of fp16.
    """

    losses: list[float] = attrs.field(factory=list)
    applied: list[bool] = attrs.field(factory=list)
    norms: list[float] = attrs.field(factory=list)
    averages: dict[str, Tensor] = attrs.field(factory=dict)
    scaler: torch.amp.GradScaler | None = None


def train_by_hand(  # noqa: PLR0912, PLR0913
    function: StepFunction,
    state: TrainState,
    batches: Iterable[Any],
    *,
    accumulate: int = 1,
    amp: str | None = None,
    init_scale: float = 2.0**16,
    clip: float | None = None,
    clip_value: float | None = None,
    lr: Callable[[int], float] | None = None,
    ema: float | None = None,
    skip_nonfinite: bool = False,
) -> ByHand:
    """Train as one writes it by hand in plain PyTorch: the oracle for what decorators do.

    It is long and flat on purpose: it can be checked against the PyTorch manual line by
    line, and uses nothing of loopkit but the state that the function is given.

    Args:
        function: The step function, returning a loss or a mapping with "loss" and "weight".
        state: Its model and optimizer are trained; its clock stays.
        batches: The batches of one epoch; the last window may be short.
        accumulate: Micro-batches for each update.
        amp: "bf16" or "fp16".
        init_scale: First loss scale, for fp16.
        clip: Largest norm of the gradients.
        clip_value: Largest element of the gradients.
        lr: Learning rate as a function of the applied updates so far.
        ema: Decay of the averaged weights.
        skip_nonfinite: Skip updates with a loss or gradient that is not finite.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> found = train_by_hand(lambda s, x: s.model(x).mean(), state, [torch.ones(1, 2)] * 3)
        >>> len(found.losses), found.applied
        (3, [True, True, True])
    """
    model, optimizer = state.model, state.optimizer
    assert optimizer is not None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device.type
    found = ByHand(scaler=torch.amp.GradScaler(device, init_scale) if amp == "fp16" else None)
    if ema is not None:
        found.averages = {name: p.detach().clone() for name, p in model.named_parameters()}

    batches = iter(batches)
    while window := list(itertools.islice(batches, accumulate)):
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr(sum(found.applied))

        optimizer.zero_grad()
        losses: list[Tensor] = []
        weights: list[float] = []
        for batch in window:
            with torch.autocast(device, DTYPES[amp]) if amp else nullcontext():
                output = function(state, batch)
            if not isinstance(output, Mapping):
                losses.append(output.detach())
                share = output / len(window) if len(window) > 1 else output
            else:
                losses.append(output["loss"].detach())
                weights.append(output.get("weight", 1.0))
                share = output["loss"] * weights[-1] if len(window) > 1 else output["loss"]
            (found.scaler.scale(share) if found.scaler else share).backward()

        if found.scaler is not None:
            found.scaler.unscale_(optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if weights and len(window) > 1:
            for gradient in gradients:
                gradient.div_(sum(weights))
        shares = torch.tensor(weights or [1.0] * len(window)).to(losses[0])
        loss = (torch.stack(losses) * shares).sum() / shares.sum()
        found.losses.append(loss.item())

        finite = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients)
        if clip is not None:
            found.norms.append(nn.utils.clip_grad_norm_(parameters, clip).item())
        if clip_value is not None:
            nn.utils.clip_grad_value_(parameters, clip_value)

        found.applied.append(finite or not (found.scaler or skip_nonfinite))
        if found.applied[-1]:
            optimizer.step()
            with torch.no_grad():
                for name, parameter in model.named_parameters() if ema is not None else ():
                    found.averages[name].lerp_(parameter, 1 - (ema or 0))
        if found.scaler is not None:
            found.scaler.update()
    return found
