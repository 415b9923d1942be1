"""Reading what a step function returned."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loopkit.errors import OutputError
from loopkit.outcome import Weight

RETURNS = "a 0-d loss tensor, or a mapping that holds it under \"loss\""


def read_loss(output: Any) -> tuple[Tensor, Weight | None, Mapping[str, Any] | None]:
    """The loss, the weight (or None) and the mapping (or None) of an output.

    Raises:
        OutputError: If there is no loss, or it is no scalar, or has no gradient.
    """
    if isinstance(output, Tensor):
        loss, weight, mapping = output, None, None
    elif isinstance(output, dict | Mapping):  # dict first: asking an ABC takes long
        loss, weight, mapping = output.get("loss"), output.get("weight"), output
    else:
        raise OutputError("a step function's return", f"a {type(output).__name__}", RETURNS)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        _refuse_loss(loss, output)
    return loss, weight if weight is None else read_weight(weight), mapping


def _refuse_loss(loss: Any, output: Any) -> None:
    if not isinstance(loss, Tensor):
        found = sorted(map(str, output)) if loss is None else f'"loss" of type {type(loss).__name__}'
        raise OutputError("a step function that returns a mapping", f"{found}", RETURNS)
    if loss.ndim:
        raise OutputError(
            "a step function's loss", f"a tensor of shape {tuple(loss.shape)}", "loss.mean(), a scalar"
        )
    raise OutputError(
        "a step function's loss",
        "a tensor without a gradient (requires_grad is False)",
        "a loss computed from state.model's parameters, outside no_grad and without detach",
    )


def read_weight(weight: Any) -> Weight:
    """A weight as a number where the host knows it, else as a 0-d tensor.

    Raises:
        OutputError: If it is no scalar, or is known to be negative or not finite.

    Example:
        >>> read_weight(3), read_weight(torch.tensor(4))
        (3, 4)
    """
    if isinstance(weight, Tensor) and weight.ndim == 0:
        if weight.device.type != "cpu":
            return weight.detach()
        weight = weight.item()
    if isinstance(weight, int | float) and 0 <= weight < math.inf:
        return weight
    raise OutputError(
        'a step function that returns {"loss": ..., "weight": ...}',
        f"weight = {weight!r}",
        "the number of things that the loss is a mean over: a number >= 0, or a 0-d tensor",
    )


def shared(loss: Tensor, weight: Weight | None, count: int | None) -> Tensor | None:
    """The loss as it enters the backward pass of a window of `count` micro-batches.

    Without weights: loss / count (or the plain loss where the count is not known yet).
    With weights: loss * weight, to be divided by the total weight later. A single
    micro-batch is its own mean. Where the weight is zero there is no gradient, though
    the loss, a mean over nothing, be NaN: None if the host knows, else a masked loss.

    Example:
        >>> shared(torch.tensor(3.0), None, 2), shared(torch.tensor(3.0), 4, 2)
        (tensor(1.5000), tensor(12.))
    """
    if weight is None:
        return loss if count is None or count == 1 else loss / count
    if isinstance(weight, Tensor):
        whole = loss if count == 1 else loss * weight
        return torch.where(weight > 0, whole, 0)
    if weight == 0:
        return None
    return loss if count == 1 else loss * weight
