"""A state that is spread over ranks as one, for checkpoints, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from loopkit.nested import map_tensors
from loopkit.parallel.repoint import like
from loopkit.parallel.zero import forget_others, gathered
from loopkit.state import TrainState


def whole(state: TrainState) -> dict[str, Any] | None:
    """`state.state_dict()` as one process would have it, on the first rank; None on the others.

    All ranks have to call it. The first one's host memory takes the sharded tensors, one by one.
    """
    parts, first = state.state_dict(), state.ranks.is_first
    if state.ranks.shards_optimizer:
        parts["optimizer"] = gathered(state, parts["optimizer"])
    of_this_rank = parts["rng"], parts["data"], parts["clock"]["samples"]
    rng, data, samples = zip(*state.ranks.gather(of_this_rank), strict=True)

    def put_together(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        full = tensor.full_tensor()
        return full.cpu() if first else full.new_empty(0)

    found = {name: map_tensors(put_together, part) for name, part in parts.items()}
    if not first:
        return None
    found["rng"] = {**parts["rng"], "ranks": [*rng]}
    found["clock"] = {**parts["clock"], "ranks": [*samples]}
    if parts["data"]["counts"] == "share":  # each rank has data, and a place in it, of its own
        found["data"] = {**parts["data"], "ranks": [*data]}
    return found


def fitted(state: TrainState, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state dict, or parts of one, with each tensor as the state has its part of it."""
    parts = dict(state_dict)
    if "model" in parts:
        parts["model"] = _fit(parts["model"], state.model.state_dict())
    if "features" in parts:
        parts["features"] = _fit(parts["features"], _features(state))
    if parts.get("optimizer") is not None and state.optimizer is not None:
        parts["optimizer"] = _fit_optimizer(parts["optimizer"], state.parameters())
    return parts


def _features(state: TrainState) -> dict[str, Any]:
    return {
        name: kept.state_dict()
        for name, kept in state.features.items()
        if hasattr(kept, "state_dict")
    }


def _fit(value: Any, current: Any) -> Any:
    if isinstance(current, DTensor):
        return like(value, current)
    if isinstance(value, Mapping) and isinstance(current, Mapping):
        return {k: _fit(v, current[k]) if k in current else v for k, v in value.items()}
    return value


def _fit_optimizer(saved: Mapping[str, Any], parameters: list[Any]) -> dict[str, Any]:
    kept = {
        index: {k: like(v, parameters[index]) for k, v in values.items()}
        if isinstance(index, int) and index < len(parameters)
        else values
        for index, values in saved["state"].items()
    }
    return {**saved, "state": kept}


def settle(state: TrainState) -> None:
    """What follows loading a state dict: each rank lets go of what others keep."""
    if state.ranks.shards_optimizer:
        forget_others(state)
