"""Tensor parallel: layers computed by several ranks together, with data parallel between groups."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from loopkit.check import at_least_one
from loopkit.errors import UsageError
from loopkit.parallel.ddp import check_optimizer
from loopkit.parallel.fsdp import FSDP
from loopkit.parallel.group_ranks import GroupRanks, start_equal
from loopkit.parallel.repoint import names_of, repoint
from loopkit.rng import rng_state, set_rng_state
from loopkit.state import TrainState


def _check_size(options: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    at_least_one(f"TensorParallel(plan, size={value!r})", "size", value)


@attrs.frozen
class TensorParallel:
    """Options for layers that several ranks compute together; torch's DTensor does the work.

    Ranks of one tensor-parallel group get the same batches; groups share the data, with the
    parameters sharded between them by FSDP.

    Args:
        plan: For names of modules, torch's parallel styles: `{"layers.*.w1": ColwiseParallel()}`.
        size: Ranks of one group; by default all.
        data: How the groups share the data.

    Raises:
        UsageError: For a size that does not divide the number of processes.

    Example:
        >>> TensorParallel({}, size=2).size
        2

    Source: https://docs.pytorch.org/docs/stable/distributed.tensor.parallel.html
    """

    plan: Mapping[str, Any] = attrs.field(eq=id, hash=False)
    size: int | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(_check_size)
    )
    data: FSDP = attrs.field(default=FSDP(), kw_only=True)

    def set_up(self, state: TrainState) -> GroupRanks:
        """Parallelize the layers in place, shard them between groups, point the optimizer there."""
        world = dist.get_world_size()
        size = self.size or world
        if world % size:
            raise UsageError(
                f"TensorParallel(plan, size={size})",
                f"{world} processes, which do not divide by it",
                "a size that divides the number of processes",
            )
        check_optimizer(state)
        start_equal(state.model)
        before = names_of(state.model)
        mesh = init_device_mesh(
            state.device.type, (world // size, size), mesh_dim_names=("data", "model")
        )
        parallelize_module(state.model, mesh["model"], dict(self.plan))
        repoint(state, before)
        if world == size:
            ranks = GroupRanks(rank=0, size=1, group=mesh["data"].get_group(), shards_tensors=True)
        else:
            ranks = self.data.shard(state, mesh["data"])
        ranks.groups = (*mesh.get_all_groups(),)
        _take_one_by_one(state)
        _draw_alike(state, mesh["model"].get_group())
        return ranks


def _draw_alike(state: TrainState, group: Any) -> None:
    """Let the ranks of a group take the batches, and draw the dropout, of its first one."""
    held = [rng_state(state.device)]
    dist.broadcast_object_list(held, group=group, group_src=0)
    set_rng_state(held[0], state.device)


def _take_one_by_one(state: TrainState) -> None:
    """Torch's multi-tensor updates refuse tensors of several meshes; groups of those do without."""
    for group in state.optimizer.param_groups:  # type: ignore[union-attr]
        if len({getattr(p, "device_mesh", None) for p in group["params"]}) > 1:
            group.update({name: False for name in ("foreach", "fused") if name in group})
