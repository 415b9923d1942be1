"""Giving an optimizer the parameters that sharding has put in the place of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from loopkit.parts import Part, Scattered
from loopkit.state import TrainState


def names_of(model: nn.Module) -> dict[int, str]:
    """The name of each parameter, by its identity."""
    return {id(p): name for name, p in model.named_parameters()}


def repoint(state: TrainState, before: Mapping[int, str]) -> None:
    """Have the optimizer update the model's present parameters; its state is sharded like them.

    Args:
        state: Its model has been sharded.
        before: `names_of` the model before that.
    """
    now = dict(state.model.named_parameters(remove_duplicate=False))
    optimizer: Any = state.optimizer
    for group in optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            new = group["params"][i] = now[before[id(old)]]
            if new is not old and old in optimizer.state:
                kept = optimizer.state.pop(old)
                optimizer.state[new] = {k: like(value, new) for k, value in kept.items()}


def region(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this rank's part of a tensor begins, and its sizes."""
    # Torch's protocol for checkpoints, by which tensors say which part of the whole they hold
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return tuple(chunk.offsets), tuple(tensor.to_local().shape)


def like(value: Any, parameter: Tensor) -> Any:
    """What belongs to a parameter, sharded as it is; what has another shape stays."""
    if (
        not isinstance(parameter, DTensor)
        or not isinstance(value, Tensor | Scattered)
        or isinstance(value, DTensor)
        or value.shape != parameter.shape
    ):
        return value
    if isinstance(value, Scattered):
        # Not from_local, which copies memory of the host to the device of the mesh: parameters that
        # FSDP keeps on the host have such a mesh, and it is this memory that is to be filled
        made: Any = torch.empty_like(parameter.detach(), dtype=value.dtype)
        value.wanted.append(Part(value.shape, region(parameter)[0], made.to_local()))
        return made
    # Each rank holds the whole, so each takes its own part of it, without any traffic.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None).to(parameter.device)
