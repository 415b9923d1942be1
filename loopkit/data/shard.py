"""Sharding: each rank reads its own part of the data, and all make the same number of updates."""

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import attrs
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from loopkit.check import at_least_one, one_of
from loopkit.data.order import UNEVEN, AtFirst, Order, Part, Share, Uneven, Walk, passed_over
from loopkit.errors import DataError, UsageError
from loopkit.limits import is_numbered, known_length
from loopkit.opening import begun, dealing
from loopkit.plain import is_stateful
from loopkit.position import Position, index_name, sampler_order

Count = Callable[[bool], int]
ShareStart = Callable[[Any], Any]
STREAMS = ("split", "sharded")

# Attributes by which a sampler or a dataset says that it is one of several, and which
_SHARED = (("num_replicas", "rank"), ("world_size", "rank"), ("num_processes", "process_index"))


class Marked(Iterator[Any]):
    """The batches of a rank; those after the `even` ones of its walk are of an uneven round.

    Attributes:
        sources: The iterators that are read.
    """

    def __init__(self, batches: Iterator[Any], walk: Walk, *sources: Iterator[Any]) -> None:
        self._batches, self._walk, self._given, self.sources = batches, walk, 0, sources

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._given += 1
        walk = self._walk
        return batch if self._given <= walk.even else Uneven(batch, walk.missing, walk.filler)


@attrs.define(eq=False)
class Stream(Part):
    """A rank's part of a stream that all ranks read whole: every `world`-th batch."""

    read: Any
    share: Share
    share_start: ShareStart | None = None
    stateful: Any = attrs.field(default=None, init=False)

    @property
    def order(self) -> Order:
        """What a position in it counts: batches of the stream."""
        size = getattr(self.read, "batch_size", None)
        return Order("batches", size, self.share, known_length(self.read))

    def __iter__(self) -> Iterator[Any]:
        return begun(self, Position.beginning(self))

    def opened(self, taken: int, at_first: AtFirst | None = None) -> Iterator[Any]:  # noqa: ARG002
        """An iterator without the first `taken` batches of the stream, which are read now."""
        source = iter(self.read)
        walk = Walk(passed_over(source, taken, self.share.kept), self.share, taken)
        return Marked(walk, walk, source)


class Listed(Stream):
    """A rank's part of batches with a length and numbers: only its own are read."""

    def __len__(self) -> int:
        return self.share.rounds(len(self.read))

    def opened(self, taken: int, at_first: AtFirst | None = None) -> Iterator[Any]:  # noqa: ARG002
        """An iterator without the first `taken` batches."""
        walk = Walk(range(len(self.read)), self.share, taken)
        return Marked(map(self.read.__getitem__, walk), walk)


class Loaded(Stream):
    """A rank's part of a map-style loader: a copy of the loader makes this rank's batches only."""

    @property
    def order(self) -> Order:
        """What a position in it counts: samples, or batches where the sampler makes them."""
        dealt = getattr(self.read, index_name(self.read))
        return sampler_order(dealt.batches, self.read.batch_size, self.share)

    def __len__(self) -> int:
        return len(self.read)

    def opened(self, taken: int, at_first: AtFirst | None = None) -> Iterator[Any]:
        """An iterator without the first `taken` items of the order."""
        dealt = getattr(self.read, index_name(self.read))
        batches = dealt.opened(self.read, taken, at_first)
        return Marked(batches, dealt.walk, batches)


@attrs.define(eq=False)
class Own(Stream):
    """What the user shared out: each rank reads all that it was given.

    The ranks agree before each batch, so that none waits for one that ran dry.
    """

    count: Count | None = None
    stateful: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.stateful = self.read if is_stateful(self.read) else None

    @property
    def order(self) -> Order:
        """What a position in it counts: batches of this rank."""
        size = getattr(self.read, "batch_size", None)
        return Order("share", size, self.share, known_length(self.read))

    def __iter__(self) -> Iterator[Any]:
        return Agreed(self, iter(self.read), [])

    def opened(self, taken: int, at_first: AtFirst | None = None) -> Iterator[Any]:  # noqa: ARG002
        """An iterator without the first `taken` batches of this rank."""
        batches = iter(self.read)
        first = [*itertools.islice(batches, min(1, taken))]
        for _ in itertools.islice(batches, max(0, taken - 1)):
            pass
        return Agreed(self, batches, first)


class OwnSized(Own):
    """The same of ranks that have equally many, as DistributedSampler gives them."""

    def __len__(self) -> int:
        return len(self.read)


class Agreed(Iterator[Any]):
    """The batches of a rank, with fillers or repeats once it ran dry while others have some."""

    def __init__(self, part: Own, batches: Iterator[Any], first: list[Any]) -> None:
        self._part, self._read, self._first = part, batches, first
        rank, world, first_of_all = part.share.rank, part.share.world, part.share.first
        own = None if first_of_all is None else len(range(rank, first_of_all, world))
        self._batches = itertools.islice(batches, own)
        self._repeats: Iterator[Any] = iter(())

    def __next__(self) -> Any:
        found = [*itertools.islice(self._batches, 1)]
        share, count = self._part.share, self._part.count
        having = int(bool(found)) if count is None else count(bool(found))
        missing = 0 if count is None else share.world - having
        if not having or (missing and share.uneven == "drop"):
            raise StopIteration
        self._first = self._first or found
        if not found:
            return self._instead(missing)
        return Uneven(found[0], missing, False) if missing and share.uneven == "exact" else found[0]

    def _instead(self, missing: int) -> Any:
        share = self._part.share
        self._first = self._first or [*itertools.islice(self._read, 1)]  # beyond a limit
        if not self._first:
            raise DataError(
                f"the share of rank {share.rank} of {share.world}",
                "no batch in it, while other ranks have some",
                'data with at least one batch on each rank, or uneven="drop"',
            )
        if share.uneven == "exact":
            return Uneven(self._first[0], missing, True)
        for batch in self._repeats:
            return batch
        self._repeats = iter(self._part.read)
        return next(self._repeats, self._first[0])

    @property
    def sources(self) -> list[Iterator[Any]]:
        """The iterators that are read."""
        return [self._read, self._repeats]


class Once(Part, Iterator[Any]):
    """A rank's part of an iterator, which is read once."""

    def __init__(self, part: Stream) -> None:
        self.read, self.share, self._part = part.read, part.share, part
        self._batches = part.opened(0)

    @property
    def order(self) -> Order:
        """What a position in it counts."""
        return self._part.order

    def __next__(self) -> Any:
        return next(self._batches)

    def opened(self, taken: int, at_first: AtFirst | None = None) -> Iterator[Any]:  # noqa: ARG002
        """Itself: it goes on where it is."""
        return self


_PARTS: "weakref.WeakKeyDictionary[Any, list[Part]]" = weakref.WeakKeyDictionary()


def sharded(
    data: Any,
    rank: int,
    world: int,
    uneven: str = "exact",
    *,
    first: int | None = None,
    stream: str | None = None,
    count: Count | None = None,
    share_start: ShareStart | None = None,
) -> Any:
    """This rank's part of `data`: of its batches, in their order, every `world`-th.

    A loader's batch sampler makes the batches of the whole epoch, in the same order on all
    ranks, and the rank takes numbers rank, rank + world, ...: an update of all ranks takes the next
    `world` batches, so that those that were taken after u updates are the first u * world,
    whatever the number of ranks. The loader's batch size is that of one process, as with DDP.

    What is shared out already is left alone: a DistributedSampler, and any sampler, batch sampler
    or dataset that has `num_replicas` and `rank` (or `world_size` and `rank`, or `num_processes`
    and `process_index`), also in its `_distributed`, as Hugging Face's streams do.

    Args:
        data: A DataLoader, a list or other numbered batches; with `stream` any iterable.
        rank: From 0 to world - 1.
        world: Number of ranks; for 1 the data itself comes back.
        uneven: For ranks that run out in the last round: `"exact"` gives them fillers (see
            `Uneven`), `"drop"` leaves the round out, `"pad"` repeats batches from the start.
        first: Deal only so many batches of an epoch, over all ranks; for a part of an evaluation
            that does not depend on the number of ranks.
        stream: For data without numbered samples: `"split"`, every rank reads it all and keeps its
            part, or `"sharded"`, it differs on each rank already.
        count: How many ranks say True; called before each batch of what was shared out by
            others, where ranks may have unequal numbers of batches.
        share_start: Gives all ranks the random states that rank 0 calls it with. Without it
            all have to begin an epoch with equal ones.

    Returns:
        Something to iterate over, of the same length on all ranks.

    Raises:
        UsageError: For a rank, or a policy, that cannot be.
        DataError: For a stream without a policy, or data that was shared out to other ranks.

    Example:
        >>> list(sharded([0, 1, 2, 3, 4], 0, 2))
        [0, 2, Uneven(batch=4, missing=1, filler=False)]
        >>> list(sharded([0, 1, 2, 3, 4], 1, 2))
        [1, 3, Uneven(batch=0, missing=1, filler=True)]
    """
    share = _checked(rank, world, uneven, stream, first)
    if world == 1:
        return data
    found = _shared_out(data)
    if found is not None:
        _check_shared(found, share)
    if found is not None or stream == "sharded":
        return _own(data, share, count)
    kind = _kind(data, share, stream)
    if kind is not Loaded:
        part = kind(data, share, share_start)
        return Once(part) if isinstance(data, Iterator) else part
    return _loaded(data, share, share_start)


def _checked(rank: int, world: int, uneven: str, stream: str | None, first: int | None) -> Share:
    call = f"sharded(data, {rank!r}, {world!r})"
    if not (type(rank) is type(world) is int and 0 <= rank < world):
        raise UsageError(call, f"rank {rank!r} of {world!r}", "0 <= rank < world")
    one_of(call, "uneven", uneven, UNEVEN)
    if stream is not None:
        one_of(call, "stream", stream, STREAMS)
    return Share(rank, world, uneven, None if first is None else at_least_one(call, "first", first))


def _kind(data: Any, share: Share, stream: str | None) -> type[Stream]:
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        if not getattr(data, "in_order", True) and share.uneven == "exact":
            raise DataError(
                "DataLoader(..., in_order=False) on several ranks",
                "batches in the order of their workers, so that fillers could not be told",
                'in_order=True, or uneven="drop"',
            )
        return Loaded
    if is_numbered(data):
        return Listed
    if stream == "split":
        return Stream
    raise DataError(
        f"data of type {type(data).__name__} on {share.world} ranks",
        "a stream, which may give the same samples on all ranks",
        'stream="split" (each rank reads it all and keeps its part), stream="sharded" (each rank'
        " has its own already), or a map-style DataLoader",
    )


def _loaded(data: DataLoader[Any], share: Share, share_start: ShareStart | None) -> Loaded:
    """Always the same for the same loader: its copy may have workers that persist."""
    parts = _PARTS.setdefault(data, [])
    for part in parts:
        if part.share == share and part.share_start == share_start:
            return part  # type: ignore[return-value]
    part = Loaded(dealing(data, share)[0], share, share_start)
    parts.append(part)
    return part


def _own(data: Any, share: Share, count: Count | None) -> Part:
    equal = isinstance(getattr(data, "sampler", None), DistributedSampler) or count is None
    sized = equal and known_length(data) is not None and share.first is None
    part = (OwnSized if sized else Own)(data, share, count=None if sized else count)
    return Once(part) if isinstance(data, Iterator) else part


def is_shared_out(data: Any, stream: str | None = None) -> bool:
    """Whether each rank has data of its own already, by what the data or the user says.

    Example:
        >>> is_shared_out([1, 2]), is_shared_out([1, 2], "sharded")
        (False, True)
    """
    return stream == "sharded" or _shared_out(data) is not None


def _shared_out(data: Any) -> tuple[int, int] | None:
    """Of how many shares this one is which; None where nothing says so."""
    batch_sampler, dataset = getattr(data, "batch_sampler", None), getattr(data, "dataset", None)
    parts = [data, getattr(data, "sampler", None), batch_sampler, dataset]
    parts += [getattr(batch_sampler, "sampler", None)]
    parts += [getattr(part, "_distributed", None) for part in (data, dataset)]
    for part in parts:
        for count, which in _SHARED:
            found = getattr(part, count, None), getattr(part, which, None)
            if all(type(number) is int for number in found):
                return found  # type: ignore[return-value]
    return None


def _check_shared(found: tuple[int, int], share: Share) -> None:
    if found != (share.world, share.rank):
        raise DataError(
            f"data that was shared out, on rank {share.rank} of {share.world}",
            f"the share of rank {found[1]} of {found[0]}",
            f"num_replicas={share.world}, rank={share.rank}, or a plain loader: run shards it",
        )
