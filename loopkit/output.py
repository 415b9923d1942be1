"""Reading what a step function returned."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from loopkit.errors import OutputError
from loopkit.outcome import Scalar, Weight

_NO_SCALARS: Mapping[str, Scalar] = {}
RETURNS = 'a 0-d loss tensor, or a mapping that holds it under "loss"'


def read_output(
    output: Any,
) -> tuple[Tensor, Weight | None, Mapping[str, Scalar], Mapping[str, Any] | None]:
    """The loss, the weight or None, the other numbers, and the mapping or None.

    Raises:
        OutputError: If there is no loss, or it is no scalar, or has no gradient.
    """
    if isinstance(output, Tensor):
        if output.requires_grad and not output.ndim:
            return output, None, _NO_SCALARS, None
        _refuse_loss(output, output)
    if not isinstance(output, dict | Mapping):  # dict first: asking an ABC takes long
        raise OutputError("a step function's return", f"a {type(output).__name__}", RETURNS)
    loss, weight = output.get("loss"), output.get("weight")
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        _refuse_loss(loss, output)
    return loss, None if weight is None else read_weight(weight), scalars_of(output), output


def scalars_of(output: Mapping[str, Any]) -> dict[str, Scalar]:
    """The numbers of a step function's mapping, less loss and weight.

    0-d tensors, detached, or Python's and NumPy's own. Vectors are no numbers, and are left out.

    Example:
        >>> scalars_of({"loss": torch.tensor(1.0), "accuracy": torch.tensor(0.5), "n": 3})
        {'accuracy': tensor(0.5000), 'n': 3}
    """
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in output.items()
        if (value.ndim == 0 if isinstance(value, Tensor) else isinstance(value, Real))
        and name not in {"loss", "weight"}
    }


def _refuse_loss(loss: Any, output: Any) -> NoReturn:
    if not isinstance(loss, Tensor):
        found = (
            sorted(map(str, output)) if loss is None else f'"loss" of type {type(loss).__name__}'
        )
        raise OutputError("a step function that returns a mapping", f"{found}", RETURNS)
    if loss.ndim:
        raise OutputError(
            "a step function's loss",
            f"a tensor of shape {tuple(loss.shape)}",
            "loss.mean(), a scalar",
        )
    off = "" if torch.is_grad_enabled() else ", within torch.no_grad()"
    raise OutputError(
        "a step function's loss",
        f"a tensor without a gradient (requires_grad is False){off}",
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
        if weight.device.type != "cpu" or torch.compiler.is_compiling():
            return weight.detach()
        weight = weight.item()
    if isinstance(weight, int | float) and 0 <= weight < math.inf:
        return weight
    raise OutputError(
        'a step function that returns {"loss": ..., "weight": ...}',
        f"weight = {weight!r}",
        "the number of things that the loss is a mean over: a number >= 0, or a 0-d tensor",
    )


def shared(loss: Tensor, weight: Weight | None, count: int | None, ranks: int = 1) -> Tensor | None:
    """The loss as it enters the backward pass of a window of `count` micro-batches.

    Without weights: loss / count (or the plain loss where the count is not known yet).
    With weights: loss * weight, to be divided by the total weight later. A single
    micro-batch is its own mean, unless other `ranks` have theirs. Where the weight is zero
    there is no gradient, though the loss, a mean over nothing, be NaN: None if the host
    knows, else a masked loss.

    Example:
        >>> shared(torch.tensor(3.0), None, 2), shared(torch.tensor(3.0), 4, 2)
        (tensor(1.5000), tensor(12.))
    """
    if weight is None:
        return loss if count is None or count == 1 else loss / count
    whole = loss if count == 1 and ranks == 1 else loss * weight
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, whole, 0)
    if weight == 0:
        return None
    return whole
