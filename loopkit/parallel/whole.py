"""A state that is spread over ranks: what each has of it, for checkpoints, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from loopkit.nested import map_tensors
from loopkit.parallel.failure import guarded
from loopkit.parallel.repoint import like, region
from loopkit.parallel.zero import joined, own_part
from loopkit.parts import Part
from loopkit.state import TrainState


def in_parts(state: TrainState) -> dict[str, Any]:
    """`state.state_dict()` with a `Part` for each tensor of which no rank need have all.

    With the random states of all ranks, their samples and their places in the data. All ranks
    have to call it; no tensor travels.
    """
    found, ranks = state.state_dict(), state.ranks
    of_this_rank = found["rng"], found["data"], found["clock"]["samples"]
    rng, data, samples = zip(*ranks.gather(of_this_rank), strict=True)
    if ranks.shards_tensors:
        found = {name: map_tensors(_part, part) for name, part in found.items()}
    if ranks.shards_optimizer:
        found["optimizer"] = joined(found["optimizer"], ranks)
    if found["data"]["counts"] == "share":  # each rank has data, and a place in it, of its own
        found["data"] = {**found["data"], "ranks": [*data]}
    found["clock"] = {**found["clock"], "ranks": [*samples]}
    return {**found, "rng": {**found["rng"], "ranks": [*rng]}}


def _part(tensor: Tensor) -> Any:
    if not isinstance(tensor, DTensor):
        return tensor
    return Part(tuple(tensor.shape), region(tensor)[0], tensor.to_local())


def whole(tensor: Any, *, keep: bool) -> Any:
    """A tensor with the parts of all ranks, in host memory; only its name where it is not kept."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = guarded(tensor.full_tensor, "putting a tensor together")
    return full.cpu() if keep else full.new_empty(0)


def fitted(state: TrainState, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state dict, or parts of one, with each tensor as the state has its part of it."""
    parts = dict(state_dict)
    if "model" in parts:
        parts["model"] = _fit(parts["model"], state.model.state_dict())
    if "features" in parts:
        parts["features"] = _fit(parts["features"], _features(state))
    if parts.get("optimizer") is not None and state.optimizer is not None:
        if state.ranks.shards_optimizer:
            parts["optimizer"] = own_part(state, parts["optimizer"])
        parts["optimizer"] = _fit_optimizer(parts["optimizer"], state.parameters())
    return parts


def _features(state: TrainState) -> dict[str, Any]:
    weights = dict(state.model.named_parameters())  # as they are, averages that begin later will be
    return {
        name: weights | kept.state_dict()
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
