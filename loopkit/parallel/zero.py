"""Optimizer state in parts, one on each rank (ZeRO stage 1)."""

import functools
import inspect
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from loopkit.errors import CompositionError
from loopkit.nested import map_tensors
from loopkit.parallel.failure import guarded
from loopkit.parts import Part
from loopkit.ranks import Ranks
from loopkit.state import TrainState
from loopkit.types import Apply, Recompute


def owners(parameters: list[nn.Parameter], size: int) -> list[int]:
    """For each parameter the rank that updates it: the largest first, to the least laden rank.

    Example:
        >>> owners([nn.Parameter(torch.zeros(n)) for n in (4, 1, 3)], 2)
        [0, 1, 1]
    """
    return [*_dealt(tuple(map(Tensor.numel, parameters)), size)]


@functools.lru_cache(maxsize=32)
def _dealt(sizes: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    load, owner = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += sizes[i]
    return tuple(owner)


def check_by_parts(optimizer: Any) -> None:
    """Check that an optimizer may update a part of the parameters by itself.

    Raises:
        CompositionError: For one that evaluates the loss, as a function of them all.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise CompositionError(
            'distributed("zero1")',
            f"a {type(optimizer).__name__}, which evaluates the loss for all parameters",
            'distributed("ddp")',
        )


@attrs.frozen
class UpdateOwnPart:
    """A layer of `apply`: each rank updates its part of the parameters, and sends it to the others.

    The optimizer stays the user's, with all its param groups; it holds the state of this rank's
    part only.
    """

    inner: Apply

    def __call__(self, state: TrainState, recompute: Recompute) -> bool | Tensor:
        """Update this rank's part, then take over the other ranks' parts."""
        if not state.ranks.shards_optimizer:
            return self.inner(state, recompute)
        parameters, groups = state.parameters(), state.optimizer.param_groups  # type: ignore[union-attr]
        owner, rank = owners(parameters, state.ranks.size), state.ranks.rank
        of = dict(zip(map(id, parameters), owner, strict=True))
        whole = [group["params"] for group in groups]
        for group in groups:
            group["params"] = [p for p in group["params"] if of[id(p)] == rank]
        try:
            applied = self.inner(state, recompute)
        finally:
            for group, params in zip(groups, whole, strict=True):
                group["params"] = params
        with torch.no_grad():
            sent = [
                dist.broadcast(p, r, async_op=True) for p, r in zip(parameters, owner, strict=True)
            ]
            guarded(_wait_for, "taking the other ranks' updates", sent)
        return applied


def _wait_for(sent: list[Any]) -> None:
    for work in sent:
        work.wait()


def joined(optimizer: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The optimizer's state dict with the parts of all ranks; those of others without contents."""
    mine = map_tensors(_part, optimizer["state"])
    others = ranks.everyone(map_tensors(_without_contents, optimizer["state"]))
    whole = {key: value for other in others for key, value in other.items()}
    return {**optimizer, "state": dict(sorted((map_tensors(_part, whole) | mine).items()))}


def _without_contents(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _part(tensor: Tensor) -> Part:
    return Part(tuple(tensor.shape), (0,) * tensor.ndim, tensor)


def own_part(state: TrainState, optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with the state of the parameters only that this rank updates."""
    mine = dict(enumerate(owners(state.parameters(), state.ranks.size)))
    kept = {i: v for i, v in optimizer["state"].items() if mine.get(i) == state.ranks.rank}
    return {**optimizer, "state": kept}


def forget_others(state: TrainState) -> None:
    """Drop the optimizer state of the parameters that other ranks update."""
    parameters = state.parameters()
    owner = owners(parameters, state.ranks.size)
    for parameter, rank in zip(parameters, owner, strict=True):
        if rank != state.ranks.rank:
            state.optimizer.state.pop(parameter, None)  # type: ignore[union-attr]
