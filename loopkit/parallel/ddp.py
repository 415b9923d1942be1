"""Data parallel: a replica on each rank, gradients averaged while the backward pass runs."""

import inspect
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loopkit.check import one_of
from loopkit.errors import UsageError
from loopkit.parallel.group_ranks import GroupRanks
from loopkit.parallel.zero import check_by_parts, forget_others
from loopkit.state import TrainState

HOOKS = ("bf16", "fp16")
_NEW = "forward_sync_buffers"  # as torch calls it from 2.13 on
_SYNC_BUFFERS = (
    _NEW if _NEW in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"
)


class Whole(nn.Module):
    """The user's step function as the forward of a module that holds the model.

    DistributedDataParallel has to see each forward begin and end. Round the whole step function
    it does, whatever of the model the function calls, and how often; and the model
    itself is not touched: its class, keys, attributes and methods stay the user's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[Any, Any], Any], state: Any, batch: Any) -> Any:
        """Run the step function."""
        return function(state, batch)


@attrs.define(eq=False, kw_only=True)
class Replicas(GroupRanks):
    """Ranks with a replica of the model each.

    Attributes:
        engine: What averages the gradients.
        sync_every: Gradients are averaged after each micro-batch.
    """

    engine: DistributedDataParallel
    sync_every: bool

    def forward(self, function: Callable[[Any, Any], Any], state: Any, batch: Any) -> Any:
        """The forward, within what averages the gradients of its backward pass."""
        if not torch.is_grad_enabled():
            return function(state, batch)
        try:
            return self.engine(function, state, batch)
        except RuntimeError as error:
            if "Expected to have finished reduction in the prior iteration" in str(error):
                _refuse_unused(error, state)
            raise

    def unsynced(self) -> AbstractContextManager[Any]:
        """Gradients add up on each rank by itself."""
        return nullcontext() if self.sync_every else self.engine.no_sync()


def _refuse_unused(error: RuntimeError, state: TrainState) -> None:
    names = [name for name, p in state.model.named_parameters() if p.requires_grad]
    said = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
    lacking = [names[int(i)] for i in said[1].split()] if said else ["on another rank"]
    raise UsageError(
        f"distributed(...) at update {state.step + 1}",
        "parameters that got no gradient in a backward pass before, where ranks wait for those of"
        f" all: {', '.join([*lacking[:3], '...'][: len(lacking)])}",
        "lk.distributed(lk.DDP(find_unused_parameters=True)); or requires_grad_(False) for what"
        " is never used",
    ) from error


def _check_hook(options: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    if isinstance(value, str):
        one_of(f"DDP(comm_hook={value!r})", "comm_hook", value, HOOKS)


@attrs.frozen(kw_only=True)
class DDP:
    """Options of `distributed("ddp")`; torch's DistributedDataParallel does the work.

    Args:
        find_unused_parameters: For step functions that do not use all parameters each time.
        static_graph: The same parameters are used, in the same way, at each update. Gradients
            are then averaged after each micro-batch.
        sync_buffers: Each forward begins with rank 0's buffers (BatchNorm's statistics).
        sync_batchnorm: BatchNorm over the batches of all ranks together (on accelerators).
        bucket_cap_mb: Megabytes of gradients that travel together.
        comm_hook: Compress gradients on their way: `"bf16"`, `"fp16"`, or a hook
            `(group, bucket) -> future` of torch.
        shard_optimizer: Each rank holds the optimizer state of a part of the parameters, and
            updates that part (ZeRO stage 1).

    Example:
        >>> DDP(static_graph=True).find_unused_parameters
        False

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """

    find_unused_parameters: bool = False
    static_graph: bool = False
    sync_buffers: bool = True
    sync_batchnorm: bool = False
    bucket_cap_mb: float = 25.0
    comm_hook: str | Callable[..., Any] | None = attrs.field(default=None, validator=_check_hook)
    shard_optimizer: bool = False

    def set_up(self, state: TrainState) -> GroupRanks:
        """Make the ranks replicas of each other."""
        check_optimizer(state)
        if self.shard_optimizer:
            check_by_parts(state.optimizer)
        if self.sync_batchnorm:
            _check_accelerator(state.device)
            state.model = nn.SyncBatchNorm.convert_sync_batchnorm(state.model)  # type: ignore[no-untyped-call]
        buffers: dict[str, Any] = {} if self.sync_buffers else {_SYNC_BUFFERS: False}
        engine = DistributedDataParallel(
            Whole(state.model),
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            bucket_cap_mb=self.bucket_cap_mb,
            **buffers,
        )
        if self.comm_hook is not None:
            _compress(engine, self.comm_hook)
        ranks = state.ranks = Replicas(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            engine=engine,
            # no_sync on a static graph ends in an internal assertion (torch 2.13, reducer.cpp)
            sync_every=self.static_graph,
            shards_optimizer=self.shard_optimizer,
        )
        if self.shard_optimizer:
            forget_others(state)
        return ranks


def _check_accelerator(device: torch.device) -> None:
    if device.type == "cpu":
        raise UsageError(
            "DDP(sync_batchnorm=True)",
            "a model on cpu, where torch's SyncBatchNorm does not run",
            "a model on accelerators; or torch.nn.GroupNorm, which needs no other samples",
        )


def _compress(engine: DistributedDataParallel, hook: str | Callable[..., Any]) -> None:
    try:
        engine.register_comm_hook(None, _hook(hook))
    except (TypeError, ValueError, AttributeError) as error:  # it asks for a __name__, too
        raise UsageError(
            f"DDP(comm_hook={hook!r:.80})",
            f"that torch refuses it: {error}",
            'DDP(comm_hook="fp16"), or a function (group, bucket) -> future of a tensor',
        ) from error


def _hook(given: str | Callable[..., Any]) -> Callable[..., Any]:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    named = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
    return named[given] if isinstance(given, str) else given


def check_optimizer(state: TrainState) -> None:
    """Check that the optimizer updates parameters of the model only: others are not averaged.

    Raises:
        UsageError: If it has others.
    """
    own = {id(p) for p in state.model.parameters()}
    if others := sum(id(p) not in own for p in state.parameters()):
        raise UsageError(
            "distributed(...) on a step",
            f"{others} parameters in the optimizer that are not the model's; their gradients"
            " would differ on each rank",
            "one module that holds all that is trained: torch.nn.ModuleDict({...}) as the model",
        )
