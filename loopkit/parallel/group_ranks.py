"""Ranks that talk through a process group."""

import datetime
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DistributedSampler

from loopkit.data.shard import is_shared_out, sharded
from loopkit.errors import DataError
from loopkit.limits import batch_limit, is_numbered
from loopkit.parallel.decisions import host_device
from loopkit.parallel.failure import explain, guarded
from loopkit.parallel.group import TIMEOUT_S, wait_at_most
from loopkit.parallel.whole import fitted, in_parts, whole
from loopkit.ranks import Ranks
from loopkit.state import TrainState

REMEMBERED = 8  # data whose parts are kept: those of a training, and of its evaluations


@attrs.define(eq=False, kw_only=True)
class GroupRanks(Ranks):
    """Ranks of a process group; strategies derive theirs from it.

    Attributes:
        group: Those among which data is spread; None for all.
        uneven: What ranks do that run out of data before others; see `sharded`.
        stream: How data is shared out that has no numbered samples.
        timeout_s: After the first update, how long a rank waits for another.
        patience_s: How long a thread waits for those of other ranks.
        groups: Others that the strategy's own traffic goes through.
    """

    alone: ClassVar[bool] = False
    group: Any = None
    uneven: str = "exact"
    stream: str | None = None
    timeout_s: float | None = None
    patience_s: float = TIMEOUT_S
    groups: tuple[Any, ...] = ()
    _lowered: bool = False
    _shared: list[tuple[Any, Any]] = attrs.field(factory=list)
    _aside: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process of rank 0 among all."""
        return dist.get_rank() == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks' data, in place."""
        guarded(dist.all_reduce, "a sum over ranks", tensor, dist.ReduceOp.SUM, self.group)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest on any rank, in place."""
        guarded(dist.all_reduce, "a vote of ranks", tensor, dist.ReduceOp.MAX)
        return tensor

    def agree(self, flag: int) -> int:
        """The largest number of any rank, so true on all where it is on any; waits for all."""
        return int(self.largest(torch.tensor(float(flag), device=host_device())))

    def share(self, data: Any) -> Any:
        """This rank's part of some data: of its batches every `size`-th."""
        for known, part in self._shared:
            if known is data:
                return part  # the same for the same data, which a run goes on with
        part = self._part(data, self.uneven)
        self._shared = [(data, part), *self._shared[: REMEMBERED - 1]]
        return part

    def share_once(self, data: Any, limit_batches: float | None = None) -> Any:
        """The same, by itself and with fillers; of the first batches of all ranks."""
        _check_sampler(data)
        if limit_batches is None:
            return self._part(data, "exact")
        first = batch_limit(data, limit_batches)
        if is_shared_out(data, self._stream_of(data)):  # its length is that of this rank's own part
            whole = isinstance(limit_batches, int)
            first = int(limit_batches) if whole else first and first * self.size
        return self._part(data, "exact", first or None)

    def _part(self, data: Any, uneven: str, first: int | None = None) -> Any:
        return sharded(
            data, self.rank, self.size, uneven, first=first, stream=self._stream_of(data),
            count=self._count, share_start=self.from_first,
        )  # fmt: skip

    def _stream_of(self, data: Any) -> str | None:
        return None if is_numbered(data) else self.stream

    def _count(self, flag: bool) -> int:
        return int(self.sum(torch.tensor(float(flag), device=host_device())))

    def from_first(self, value: Any) -> Any:
        """The first rank's value, which has to pickle."""
        held = [value]
        guarded(dist.broadcast_object_list, "taking rank 0's value", held, 0)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on all ranks."""
        held: list[Any] = [None] * self.size
        guarded(dist.all_gather_object, "gathering from all ranks", held, value, self.group)
        return held

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        """The parts of tensors that this process holds."""
        if not self.shards_tensors:
            return tensors
        return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]

    def updated(self) -> None:
        """After the first update there is less to wait for."""
        if self.timeout_s is not None and not self._lowered:
            wait_at_most(self.timeout_s, {None, self.group, *self.groups})
            self._lowered = True

    def explain(self, error: Exception, when: str) -> None:
        """Tell the other ranks of this one's error, or name the rank that it comes from."""
        explain(error, when)

    @property
    def number(self) -> int:
        """Number of this process among all, those that hold the same data too."""
        return dist.get_rank()

    def everyone(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, on each of them."""
        held: list[Any] = [None] * dist.get_world_size()
        guarded(dist.all_gather_object, "gathering from all ranks", held, value)
        return held

    def aside(self) -> Callable[[Any], list[Any]]:
        """What does the same in a thread, beside the training; all have to call this."""
        if self._aside is None:
            patience = datetime.timedelta(seconds=self.patience_s)
            self._aside = dist.new_group(backend="gloo", timeout=patience)
        return functools.partial(_gathered, self._aside)

    def in_parts(self, state: TrainState) -> Any:
        """`state.state_dict()`, with a `Part` for what is spread; all have to call it."""
        return in_parts(state)

    def fitted(self, state: TrainState, state_dict: Mapping[str, Any]) -> Any:
        """A whole state dict as this rank's part of the state takes it."""
        return fitted(state, state_dict)

    def whole(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Tensors that are spread over ranks put together, on the first one; all call it."""
        return {name: whole(tensor, keep=self.is_first) for name, tensor in tensors.items()}

    @contextmanager
    def among(self, flag: bool) -> Iterator[Any]:
        """A process group of the ranks that say True, for those; None for all."""
        mine = tuple(dist.get_process_group_ranks(self.group or dist.group.WORLD))
        said = self.everyone((mine, flag))
        if all(true for _, true in said):
            yield self.group
            return
        # Torch counts groups to name them. So every process makes every one: a name that came
        # again, or was another on each rank, would lead to addresses that nobody listens at.
        made = {}
        for ranks, _ in said:
            if (members := [rank for rank in ranks if said[rank][1]]) and ranks not in made:
                made[ranks] = dist.new_group(members)
        if not flag:
            yield self.group
            return
        if self.timeout_s is not None:
            wait_at_most(self.timeout_s, {made[mine]})
        try:
            yield made[mine]
        finally:
            dist.destroy_process_group(made[mine])

    def evaluating(self, model: nn.Module) -> "BuffersOfFirst":
        """Rank 0's buffers as they are now; in each `with` they stand in for each rank's own."""
        pairs = []
        for buffer in model.buffers():
            value = buffer.clone()
            guarded(dist.broadcast, "taking rank 0's buffers", value, 0)
            if not torch.equal(buffer, value):  # masks and tables are equal
                pairs.append((buffer, value))
        return BuffersOfFirst(pairs)


@attrs.define(eq=False)
class BuffersOfFirst:
    """A context with rank 0's values of what each rank has kept for itself: running statistics.

    Attributes:
        pairs: Buffers that differ on this rank, with rank 0's values.
    """

    pairs: list[tuple[Tensor, Tensor]]
    _own: list[Tensor] = attrs.field(factory=list)

    def __enter__(self) -> None:
        self._own = [buffer.clone() for buffer, _ in self.pairs]
        for buffer, value in self.pairs:
            buffer.copy_(value)

    def __exit__(self, *error: object) -> None:
        for (buffer, _), value in zip(self.pairs, self._own, strict=True):
            buffer.copy_(value)


def _gathered(group: Any, value: Any) -> list[Any]:
    held: list[Any] = [None] * dist.get_world_size()
    guarded(dist.all_gather_object, "writing a checkpoint", held, value, group)
    return held


def _check_sampler(data: Any) -> None:
    sampler = getattr(data, "sampler", None)
    if isinstance(sampler, DistributedSampler) and sampler.total_size != len(sampler.dataset):  # type: ignore[arg-type]
        raise DataError(
            "evaluating data with a DistributedSampler",
            f"{sampler.total_size} samples dealt out of {len(sampler.dataset)}: some twice",  # type: ignore[arg-type]
            "a plain DataLoader(dataset, batch_size): it is dealt out exactly",
        )


def start_equal(model: nn.Module) -> None:
    """Give all ranks the weights and buffers of rank 0."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                guarded(dist.broadcast, "taking rank 0's weights", tensor, 0)
