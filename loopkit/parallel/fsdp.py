"""Sharded data parallel: parameters, gradients and optimizer state in parts, one on each rank."""

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from loopkit.check import at_least_one
from loopkit.errors import UsageError
from loopkit.parallel.ddp import check_optimizer
from loopkit.parallel.gathered import Gathered
from loopkit.parallel.group_ranks import GroupRanks, start_equal
from loopkit.parallel.repoint import names_of, repoint
from loopkit.state import TrainState

Blocks = tuple[type[nn.Module] | str, ...] | None


def _check_replicas(options: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    if value != "hosts":
        at_least_one(f"FSDP(replicas={value!r})", "replicas", value)


@attrs.define(eq=False, kw_only=True)
class Shards(GroupRanks):
    """Ranks with a part of each parameter.

    Attributes:
        units: The sharded model, and the blocks of it that are sharded by themselves.
        gathered: What frees what its forwards have gathered.
        sync_every: Gradients are averaged after each micro-batch.
    """

    units: tuple[FSDPModule, ...]
    gathered: Gathered
    sync_every: bool
    shards_tensors: bool = True

    def forward(self, function: Callable[[Any, Any], Any], state: Any, batch: Any) -> Any:
        """The forward, kept for its backward pass; an error where it went round the model's."""
        gathered = self.gathered
        gathered.kept = torch.is_grad_enabled()
        try:
            return function(state, batch)
        except BaseException as error:
            gathered.free()
            _explain_sharded(error, state)
            raise
        finally:
            gathered.kept = False

    def unsynced(self) -> AbstractContextManager[Any]:
        """Gradients add up whole on each rank by itself, unless memory is dearer than time."""
        return nullcontext() if self.sync_every else self._unsynced()

    @contextmanager
    def _unsynced(self) -> Iterator[None]:
        for unit in self.units:  # which torch would look for among all modules, each time
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in self.units:
                unit.set_requires_gradient_sync(True, recurse=False)


@attrs.frozen(kw_only=True)
class FSDP:
    """Options of `distributed("fsdp")`; torch's `fully_shard` (FSDP2) does the work.

    All ranks have to use the same parameters in each micro-batch, or gradients of unequal size
    meet, which ends gloo's processes; `lk.DDP(find_unused_parameters=True)` is for others.

    Args:
        blocks: What is gathered and freed together: module types, or names (`"layers.0"`);
            by default each member of each `nn.ModuleList`.
        reshard_after_forward: Free gathered parameters after the forward, to gather them
            again in the backward (ZeRO stage 3); False keeps them (stage 2).
        precision: `"bf16"` or `"fp16"` for forward and backward, with gradients summed in
            float32; or torch's MixedPrecisionPolicy.
        cpu_offload: Parameters, gradients and optimizer state in host memory.
        replicas: Copies of the sharded model, each over `world_size / replicas` ranks (HSDP);
            `"hosts"` for one on each host.
        sync_every: Average gradients after each micro-batch of a window rather than at its
            end: more traffic, but no whole gradient in memory.
        methods: Methods of the model that run its forward, beside `forward`.

    Example:
        >>> FSDP(replicas=2).reshard_after_forward
        True

    Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """

    blocks: Blocks = None
    reshard_after_forward: bool = True
    precision: Any = None
    cpu_offload: bool = False
    replicas: int | str = attrs.field(default=1, validator=_check_replicas)
    sync_every: bool = False
    methods: tuple[str, ...] = ()

    def set_up(self, state: TrainState) -> GroupRanks:
        """Shard the model in place, and point the optimizer at the shards."""
        check_optimizer(state)
        start_equal(state.model)
        return self.shard(state, self._mesh(self._computes_on(state.device)))

    def shard(self, state: TrainState, mesh: DeviceMesh) -> GroupRanks:
        """The same over a given mesh, of a model that is equal on all ranks."""
        before = names_of(state.model)
        settings: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": _policy(self.precision),
            "offload_policy": _offload(mesh.device_type) if self.cpu_offload else OffloadPolicy(),
        }
        blocks: list[Any] = blocks_of(state.model, self.blocks)
        for block in blocks:
            fully_shard(block, **settings)
        # The backward pass begins with the root, so resharding it first would be for nothing
        model: Any = fully_shard(state.model, **settings | {"reshard_after_forward": False})
        for method in self.methods:
            _check_method(model, method)
        units = (model, *blocks)
        gathered = Gathered(units[:1] if self.reshard_after_forward else units)
        gathered.watch(model, self.methods)
        repoint(state, before)
        group = mesh.get_group() if mesh.ndim == 1 else None
        rank, size = (dist.get_rank(group), dist.get_world_size(group))
        return Shards(
            rank=rank, size=size, group=group, groups=(*mesh.get_all_groups(),), units=units,
            gathered=gathered, sync_every=self.sync_every,
            device=_current(mesh) if self.cpu_offload else None,
        )  # fmt: skip

    def _computes_on(self, device: torch.device) -> str:
        """The kind of device; parameters that are kept on the host may lie there from the start."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        offloads = self.cpu_offload and device.type == "cpu" and accelerator is not None
        return accelerator.type if offloads else device.type  # type: ignore[union-attr]

    def _mesh(self, device: str) -> DeviceMesh:
        world = dist.get_world_size()
        copies = _hosts() if isinstance(self.replicas, str) else self.replicas
        if copies == 1:
            return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
        if world % copies:
            raise UsageError(
                f"FSDP(replicas={self.replicas!r})",
                f"{world} processes, which do not divide by {copies}",
                "replicas that divide the number of processes",
            )
        shape = (copies, world // copies)
        return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def _current(mesh: DeviceMesh) -> torch.device | None:
    if mesh.device_type == "cpu":
        return None
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def _offload(device: str) -> CPUOffloadPolicy:
    return CPUOffloadPolicy(pin_memory=device != "cpu")  # there, pinning is for a copy to elsewhere


# What torch says of a parameter that is used without having been gathered
_NOT_GATHERED = ("got mixed torch.Tensor and DTensor", "has already been lazily initialized")


def _explain_sharded(error: BaseException, state: TrainState) -> None:
    if isinstance(error, RuntimeError) and any(s in str(error) for s in _NOT_GATHERED):
        raise UsageError(
            f"a step function on a {type(state.model).__name__.removeprefix('FSDP')} in shards",
            "parameters in use that only the model's forward gathers: a method of the model, or of"
            " a part of it, that runs layers by itself",
            'lk.distributed(lk.FSDP(methods=("its_name",))); or a step function that calls'
            " state.model(...)",
        ) from error


def _hosts() -> int:
    """On how many hosts the processes are; by their names, which every launcher has."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return len({*names})


def blocks_of(model: nn.Module, wanted: Blocks) -> list[nn.Module]:
    """The modules that are sharded as units, inner ones first.

    Raises:
        UsageError: For a type or a name that no module has.
    """
    modules = [(name, module) for name, module in model.named_modules() if name]
    if wanted is None:
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        return [child for held in reversed(lists) for child in held if [*child.parameters()]]
    for entry in wanted:
        if not any(_matches(entry, name, module) for name, module in modules):
            raise UsageError(
                f"FSDP(blocks=(..., {entry!r}, ...))",
                "no module of the model that it names",
                f"module types, or names such as {[name for name, _ in modules[:5]]}",
            )
    found = [m for name, m in modules if any(_matches(entry, name, m) for entry in wanted)]
    return found[::-1]


def _check_method(model: nn.Module, name: str) -> None:
    if not callable(getattr(model, name, None)):
        raise UsageError(
            f"FSDP(methods=(..., {name!r}, ...))",
            f"no such method of {type(model).__name__.removeprefix('FSDP')}",
            "names of methods of the model itself, beside forward",
        )


def _matches(entry: type[nn.Module] | str, name: str, module: nn.Module) -> bool:
    return name == entry if isinstance(entry, str) else isinstance(module, entry)


def _policy(precision: Any) -> MixedPrecisionPolicy:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision is None:
        return MixedPrecisionPolicy()
    if isinstance(precision, str) and precision in dtypes:
        return MixedPrecisionPolicy(param_dtype=dtypes[precision], reduce_dtype=torch.float32)
    if isinstance(precision, MixedPrecisionPolicy):
        return precision
    raise UsageError(
        f"FSDP(precision={precision!r})",
        "no precision that it knows",
        '"bf16", "fp16", or torch.distributed.fsdp.MixedPrecisionPolicy(...)',
    )
