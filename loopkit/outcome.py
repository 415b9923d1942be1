"""What the micro-batches of one update gave: losses, weights, and the user's own numbers."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.errors import OutputError

Weight = float | Tensor

NOT_METRICS = frozenset({"loss", "weight"})


@attrs.define
class Outcome:
    """Losses, weights and 0-d tensors of the micro-batches of one update.

    Nothing is computed before it is asked for: an update that nobody looks at
    costs a list append.

    Attributes:
        losses: One detached 0-d loss for each micro-batch.
        weights: What each is a mean over; None for each where the step gives no weight.
        scalars: The other 0-d tensors that the step function's mapping held.
        length: Micro-batches in the window, where that was known beforehand.
        samples: Samples in the micro-batches.
    """

    losses: list[Tensor] = attrs.field(factory=list)
    weights: list[Weight | None] = attrs.field(factory=list)
    scalars: list[dict[str, Tensor]] = attrs.field(factory=list)
    length: int | None = None
    samples: int = 0

    def add(self, loss: Tensor, weight: Weight | None, output: Mapping[str, Any] | None) -> None:
        """Note one micro-batch."""
        self.losses.append(loss.detach())
        self.weights.append(weight)
        self.scalars.append({} if output is None else scalars_of(output))

    def total_weight(self) -> Weight | None:
        """The number of things of the whole window; None where no weights were given.

        Raises:
            OutputError: If some micro-batches gave a weight and others did not.
        """
        given = [weight for weight in self.weights if weight is not None]
        if not given:
            return None
        if len(given) < len(self.weights):
            raise OutputError(
                'a step function that returns {"loss": ..., "weight": ...}',
                f"a weight in {len(given)} of the {len(self.weights)} micro-batches of a window",
                'a "weight" for each micro-batch, or for none',
            )
        return sum(given[1:], start=given[0])

    def divisor(self) -> Weight | None:
        """What the gradients still have to be divided by; None where they are the mean already.

        A total weight of zero divides by one: the gradient of nothing is zero.
        """
        if self.length == 1:
            return None
        total = self.total_weight()
        if total is None:
            return len(self.losses) if self.length is None else None
        return torch.where(total > 0, total, 1) if isinstance(total, Tensor) else total or 1

    def mean(self) -> Tensor:
        """The weighted mean loss, 0-d and detached; NaN before the first update."""
        return self._mean(self.losses, self.weights)

    def means(self) -> dict[str, Tensor]:
        """The weighted means of the loss and of each of the user's numbers."""
        means = {"loss": self.mean()}
        for name in dict.fromkeys(name for found in self.scalars for name in found):
            there = [(f[name], w) for f, w in zip(self.scalars, self.weights, strict=True) if name in f]
            means[name] = self._mean([v for v, _ in there], [w for _, w in there])
        return means

    @staticmethod
    def _mean(values: list[Tensor], weights: list[Weight | None]) -> Tensor:
        if len(values) == 1:
            return values[0]
        if not values:
            return torch.tensor(float("nan"))
        stacked = torch.stack(values)
        if weights[0] is None:
            return stacked.mean()
        shares = torch.stack([torch.as_tensor(w).to(stacked) for w in weights])  # one device
        return torch.where(shares > 0, stacked * shares, 0).sum() / shares.sum()


def scalars_of(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """The 0-d tensors of a step function's mapping, detached, less loss and weight.

    Example:
        >>> scalars_of({"loss": torch.tensor(1.0), "accuracy": torch.tensor(0.5), "n": 3})
        {'accuracy': tensor(0.5000)}
    """
    return {
        name: value.detach()
        for name, value in output.items()
        if isinstance(value, Tensor) and value.ndim == 0 and name not in NOT_METRICS
    }
