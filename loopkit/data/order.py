"""The order of an epoch's batches, and how it is dealt to the ranks."""

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

UNEVEN = ("exact", "drop", "pad")

# They draw from the global generators at their beginning only, if they do
_DRAW_AT_FIRST = {
    DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler,
    WeightedRandomSampler, list, tuple, range,
}  # fmt: skip


@attrs.frozen
class Uneven:
    """A batch of a round in which not every rank has one of its own: the last of an epoch.

    The ranks that ran out take part with a filler, a batch that another rank has as its own:
    a forward and a backward run on it, so that nobody waits for them in vain, its loss counts
    with weight 0, and its outputs are dropped.

    Attributes:
        batch: What the loader gave.
        missing: How many ranks have none of their own in this round.
        filler: Whether this rank is one of them.

    Example:
        >>> Uneven([1, 2], missing=1, filler=True).batch
        [1, 2]
    """

    batch: Any
    missing: int
    filler: bool


@attrs.frozen
class Share:
    """Which of the batches a rank takes: of each `world` that follow each other, the `rank`-th.

    Attributes:
        rank: From 0 to world - 1.
        world: Number of ranks.
        uneven: What ranks do that run out in the last round: `"exact"` gives them fillers,
            `"drop"` leaves the round out, `"pad"` repeats batches from the epoch's start.
        first: How many batches of an epoch are dealt in all; None for all.
    """

    rank: int = 0
    world: int = 1
    uneven: str = "exact"
    first: int | None = None

    def rounds(self, count: int) -> int:
        """How many batches each rank takes of `count`: ceil(count / world), floor for `"drop"`.

        Example:
            >>> Share(0, 4).rounds(9), Share(0, 4, "drop").rounds(9)
            (3, 2)
        """
        count = count if self.first is None else min(count, self.first)
        return count // self.world if self.uneven == "drop" else -(-count // self.world)

    def after(self, batches: int) -> "Share":
        """The share of what is left when these batches are gone."""
        return attrs.evolve(
            self, first=None if self.first is None else max(0, self.first - batches)
        )

    @property
    def kept(self) -> int:
        """How many of the epoch's first batches may be needed again, in the last round."""
        return {"exact": min(1, self.rank), "drop": 0, "pad": self.rank}[self.uneven]

    def dealt(self, batches: Iterator[Any], head: list[Any]) -> Iterator[tuple[Any, int, bool]]:
        """This rank's batches, each with the ranks that miss theirs, and whether this one does.

        Args:
            batches: All that are left, in order.
            head: The first `kept` batches of the epoch.
        """
        while True:
            count, mine = 0, None
            for count, batch in enumerate(itertools.islice(batches, self.world), 1):
                mine = batch if count == self.rank + 1 else mine
            if count == 0 or (count < self.world and self.uneven == "drop"):
                return
            missing = self.world - count if self.uneven == "exact" else 0
            if self.rank < count:
                yield mine, missing, False
            elif missing:
                yield head[0], missing, True
            else:
                yield head[(self.rank - count) % len(head)], 0, False


SINGLE = Share()


@attrs.frozen
class Order:
    """What a position in some data counts, and how much there is of it.

    Attributes:
        counts: `"samples"`, `"batches"`, or `"share"`: batches of one rank's own share.
        size: Samples in a batch, if known.
        share: Of which the data gives the batches.
        total: Samples or batches in an epoch; None if unknown.
        drop_last: Whether a last batch of fewer samples is left out.
    """

    counts: str = "batches"
    size: int | None = None
    share: Share = SINGLE
    total: int | None = None
    drop_last: bool = False

    @property
    def world(self) -> int:
        """Ranks that the order is dealt to; what a rank has as its own is not dealt."""
        return 1 if self.counts == "share" else self.share.world

    def rounds_after(self, taken: int) -> int | None:
        """Batches that each rank still takes when `taken` items of the order are gone.

        Example:
            >>> Order("samples", 4, Share(0, 2), total=23).rounds_after(8)
            2
        """
        if self.total is None:
            return None
        left, each = max(0, self.total - taken), 1
        if self.counts == "samples":
            each = self.size or 1
            left = left // each if self.drop_last else -(-left // each)
        return left if self.counts == "share" else self.share.after(taken // each).rounds(left)


AtFirst = Callable[[], object]


class Part(abc.ABC):
    """What one rank reads of some data: an iterable of its batches.

    Attributes:
        read: The data itself, or a loader of this rank's batches, with the generators and samplers.
        share: Which batches it takes.
        share_start: Gives all ranks the random states that the first one calls it with.
        stateful: The data, where its own `state_dict` holds the position.
    """

    read: Any
    share: Share
    share_start: Callable[[Any], Any] | None = None
    stateful: Any = None

    @property
    @abc.abstractmethod
    def order(self) -> Order:
        """What a position in it counts."""

    @abc.abstractmethod
    def opened(self, taken: int, at_first: AtFirst | None = None) -> Iterator[Any]:
        """An iterator without the first `taken` items of the order; see `Walk` for `at_first`."""

    @property
    def persistent_workers(self) -> bool:
        """Whether the workers of its loader outlive an epoch."""
        return bool(getattr(self.read, "persistent_workers", False))


def sample_order(batches: Any) -> bool:
    """Whether this batch sampler is torch's own: samples of its sampler, cut into batches."""
    return type(batches) is BatchSampler


class Walk:
    """An iterator over a rank's batches (of indices), which begins when it is first asked.

    Not before: a loader draws the seed of its workers between making the sampler's
    iterator and asking it, and the order of draws has to stay.

    Args:
        batches: Of all ranks: a batch sampler, a sampler, or batches.
        share: Those to give.
        skip: Items of the order to pass over.
        at_first: Called when it begins, before numbers are drawn for the order.

    Attributes:
        even: How many it has given of rounds in which no rank misses its own; those come first.
        missing: How many ranks miss theirs in the last round.
        filler: Whether this one does.
    """

    def __init__(
        self, batches: Any, share: Share, skip: int, at_first: AtFirst | None = None
    ) -> None:
        self._dealt = _walked(batches, share, skip, at_first)
        self._first: list[tuple[Any, int, bool]] = []
        self.even, self.missing, self.filler = 0, 0, False

    def __iter__(self) -> "Walk":
        return self

    def __next__(self) -> Any:
        batch, self.missing, self.filler = self._first.pop() if self._first else next(self._dealt)
        self.even += not self.missing
        return batch

    def begin(self) -> None:
        """Draw the order and pass over what was taken, now."""
        if not self._first:
            self._first.extend(itertools.islice(self._dealt, 1))


def _walked(
    batches: Any, share: Share, skip: int, at_first: AtFirst | None
) -> Iterator[tuple[Any, int, bool]]:
    if at_first is not None:
        at_first()
    grouped = sample_order(batches)
    source = batches.sampler if grouped else batches
    items = iter(source if share.world == 1 else _drawn(source))
    each = batches.batch_size if grouped else 1
    head = [*itertools.islice(items, share.kept * each)]
    later = itertools.islice(items, max(0, skip - len(head)), None)
    rest: Iterator[Any] = itertools.chain(head[skip:], later)
    if grouped:
        head, rest = [*_cut(batches, head)], _cut(batches, rest)
    share = share.after(skip // each)
    yield from share.dealt(itertools.islice(rest, share.first), head)


def passed_over(items: Iterator[Any], taken: int, kept: int) -> Iterator[Any]:
    """The items, the first `taken` of which are read now: of those `kept` stay, others are None.

    Read later they would draw from the random states that belong to what comes next.

    Example:
        >>> items = iter("abcdef")
        >>> rest = passed_over(items, 3, 1); next(items)
        'd'
        >>> [*rest]
        ['a', None, None, 'e', 'f']
    """
    head = [*itertools.islice(items, min(taken, kept))]
    gone = sum(1 for _ in itertools.islice(items, taken - len(head)))
    return itertools.chain(head, itertools.repeat(None, gone), items)


def _cut(batches: BatchSampler, samples: Iterable[int]) -> Iterator[Any]:
    return iter(BatchSampler(samples, batches.batch_size, batches.drop_last))


def _drawn(source: Any) -> Iterable[Any]:
    """The order, drawn at once where it may depend on numbers that are drawn on the way.

    Those would be others on each rank: all ranks begin with the random states of the
    first, but go on with their own.
    """
    try:
        len(source)
    except TypeError:  # it may not end
        return source  # type: ignore[no-any-return]
    return source if type(source) in _DRAW_AT_FIRST else [*source]


class Dealt:
    """Stands in a loader's place of a batch sampler, and gives it one rank's batches.

    Attributes:
        batches: The loader's own batch sampler, or sampler where it makes no batches.
        share: The rank's share.
        sampler: The sampler within it.
        walk: The iterator that was made last.
    """

    def __init__(self, batches: Any, share: Share) -> None:
        self.batches, self.share = batches, share
        self.sampler = getattr(batches, "sampler", None)
        self._skip = 0
        self._at_first: AtFirst | None = None
        self.walk = Walk((), share, 0)

    def __len__(self) -> int:
        return self.share.rounds(len(self.batches))

    def __iter__(self) -> Walk:
        self.walk = Walk(self.batches, self.share, self._skip, self._at_first)
        return self.walk

    def opened(self, loader: Any, skip: int, at_first: AtFirst | None = None) -> Iterator[Any]:
        """An iterator over the loader that this stands in, without the first `skip` items."""
        self._skip, self._at_first = skip, at_first
        try:
            batches: Iterator[Any] = iter(loader)
            self.walk.begin()
        finally:
            self._skip, self._at_first = 0, None
        return batches

    def set_epoch(self, epoch: int) -> None:
        """Tell the batch sampler, if it asks for it."""
        if callable(getattr(self.batches, "set_epoch", None)):
            self.batches.set_epoch(epoch)
