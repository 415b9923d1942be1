"""What ranks decide and sum up together, for loops of one's own."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loopkit.check import one_of
from loopkit.errors import UsageError
from loopkit.parallel.failure import guarded


def host_device() -> torch.device:
    """Where a number of the host has to be for a collective: on the CPU, unless all is NCCL."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def agree(flag: bool) -> bool:
    """True on all ranks where it is true on any, so that all stop, save or skip together.

    Every rank has to call it; it waits for all. On one process it is the flag.

    Args:
        flag: What this rank says.

    Raises:
        RankError: Where another rank failed.

    Example:
        >>> agree(True)
        True
    """
    if _alone():
        return bool(flag)
    held = torch.tensor(float(flag), device=host_device())
    guarded(dist.all_reduce, "lk.agree(flag)", held, dist.ReduceOp.MAX)
    return bool(held)


def reduce(
    values: Mapping[str, Any], *, op: str = "mean", weight: float | Tensor | None = None
) -> dict[str, float]:
    """Named numbers over all ranks, equal on all: their mean, sum, largest or smallest.

    `mean = sum_r(weight_r * value_r) / sum_r(weight_r)`, in one exchange of float64. Every rank
    has to call it, with the same names; it waits for the device and for all ranks.
    `lk.reduce(state.metrics)` gives the mean of the ranks' losses, where `state.metrics` is this
    rank's; with `weight=state.outcome.total_weight()` that over all that they counted.

    Args:
        values: By name, numbers or 0-d tensors.
        op: `"mean"`, `"sum"`, `"max"` or `"min"`.
        weight: For the mean, how many things this rank's values are means over; by default 1.

    Raises:
        UsageError: For another `op`, or a value that is no number.
        RankError: Where another rank failed.

    Example:
        >>> reduce({"loss": torch.tensor(0.5)})
        {'loss': 0.5}
    """
    one_of(f"lk.reduce(values, op={op!r})", "op", op, ("mean", "sum", "max", "min"))
    numbers = [_number(name, value) for name, value in values.items()]
    share = 1.0 if weight is None else float(weight)
    if op == "mean":
        numbers = [n * share if share else 0.0 for n in numbers]
    held = torch.tensor([*numbers, share], dtype=torch.float64)
    if not _alone():
        held = held.to(host_device())
        how = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM)
        guarded(dist.all_reduce, "lk.reduce(values)", held, how)
    found = held / held[-1] if op == "mean" else held
    return dict(zip(values, found.tolist(), strict=False))


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    raise UsageError(
        f"lk.reduce({{{name!r}: ...}})",
        f"a {type(value).__name__}"
        + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""),
        "numbers or 0-d tensors, by name",
    )
