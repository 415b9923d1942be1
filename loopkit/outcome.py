"""What the micro-batches of one update gave: losses, weights, and the user's own numbers."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from loopkit.errors import OutputError

Weight = float | Tensor
Scalar = float | Tensor
"""What a step function's mapping may hold beside the loss: a number, or a 0-d tensor."""

Part = tuple[Tensor, Weight | None, Mapping[str, Scalar]]
"""One micro-batch: its detached loss, its weight or None, and its other numbers."""


@attrs.define
class Outcome:
    """Losses, weights and numbers of the micro-batches of one update.

    Nothing is computed before it is asked for: an update that nobody looks at
    costs a list append.

    Attributes:
        length: Micro-batches in the window, where that was known beforehand.
        parts: What each micro-batch gave.
        samples: Samples in the micro-batches.
        missing: Micro-batches that are lacking, over all ranks, to as many on each.
        divide_by: What the gradients are still to be divided by, where ranks have agreed on it.
    """

    length: int | None = 1
    parts: list[Part] = attrs.field(factory=list)
    samples: int = 0
    missing: int = 0
    divide_by: Weight | None = None

    def total_weight(self) -> Weight | None:
        """The number of things of the whole window; None where no weights were given.

        Raises:
            OutputError: If some micro-batches gave a weight and others did not.
        """
        given = [weight for _, weight, _ in self.parts if weight is not None]
        if not given:
            return None
        if len(given) < len(self.parts):
            raise OutputError(
                'a step function that returns {"loss": ..., "weight": ...}',
                f"a weight in {len(given)} of the {len(self.parts)} micro-batches of a window",
                'a "weight" for each micro-batch, or for none',
            )
        return sum(given[1:], start=given[0])

    def divisor(self) -> Weight | None:
        """What the gradients still have to be divided by; None where they are the mean already.

        A total weight of zero divides by one: the gradient of nothing is zero.
        """
        if self.divide_by is not None:
            return self.divide_by
        if self.length == 1:
            return None
        total = self.total_weight()
        if total is None:
            return len(self.parts) if self.length is None else None
        return torch.where(total > 0, total, 1) if isinstance(total, Tensor) else total or 1

    def is_empty(self) -> bool:
        """Whether it is known to be a mean over nothing: all weights are the number zero."""
        return all(isinstance(w, int | float) and w == 0 for _, w, _ in self.parts)

    def mean(self) -> Tensor:
        """The weighted mean loss, 0-d and detached; NaN before the first update."""
        return _mean([(loss, weight) for loss, weight, _ in self.parts])

    def means(self) -> dict[str, Tensor]:
        """The weighted means of the loss and of each of the user's numbers."""
        names = dict.fromkeys(name for _, _, scalars in self.parts for name in scalars)
        return {"loss": self.mean()} | {
            name: _mean([(s[name], weight) for _, weight, s in self.parts if name in s])
            for name in names
        }


def _mean(values: list[tuple[Scalar, Weight | None]]) -> Tensor:
    if len(values) < 2:
        return _tensors(values)[0] if values else torch.tensor(float("nan"))
    stacked = torch.stack(_tensors(values))
    stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))  # of counts, of bf16
    if values[0][1] is None:
        return stacked.mean()
    kind, device = stacked.dtype, stacked.device
    weights = torch.stack([on_device(weight, kind, device) for _, weight in values])
    return torch.where(weights > 0, stacked * weights, 0).sum() / weights.sum()


def on_device(weight: Weight | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight as a tensor there; a number is filled in, as to copy it would wait for the device.

    Example:
        >>> on_device(3, torch.float64, torch.device("cpu"))
        tensor(3., dtype=torch.float64)
    """
    if isinstance(weight, Tensor):
        return weight.to(device, dtype)
    return torch.full((), weight or 0, dtype=dtype, device=device)


def _tensors(values: list[tuple[Scalar, Weight | None]]) -> list[Tensor]:
    """The values; those that are numbers as tensors on the device of the others, or of weights."""
    tensors = (x for pair in values for x in pair if isinstance(x, Tensor))
    device = next((x.device for x in tensors), torch.device("cpu"))
    wide = torch.float32 if device.type == "mps" else torch.float64
    # Filled on the device: a copy of a number from the host would wait for it
    return [
        v if isinstance(v, Tensor) else torch.full((), float(v), dtype=wide, device=device)
        for v, _ in values
    ]
