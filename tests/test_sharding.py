"""Sharding: ranks take each batch once between them, in one order, however many they are."""

import collections
import itertools
import random

import loopkit as lk
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.data.order import Filler
from loopkit.data.shard import sharded
from loopkit.feed import reading
from loopkit.limits import known_length
from loopkit.position import Position, begun, moved, reopened, set_epoch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from feeds import children

POLICIES = ("exact", "drop", "pad")


class Shuffled:
    """A user's batch sampler, which draws from Python's and NumPy's generators on its way."""

    def __init__(self, count, size):
        self.count, self.size = count, size

    def __len__(self):
        return -(-self.count // self.size)

    def __iter__(self):
        order = [*range(self.count)]
        random.shuffle(order)
        for start in range(0, self.count, self.size):
            np.random.rand()
            batch = order[start : start + self.size]
            random.shuffle(batch)
            yield batch


class Numbers(IterableDataset):
    """A stream of numbers; each worker takes its share."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        return iter(range(first, self.count, stride))


def plain(items):
    return items


LOADERS = {
    "in order": lambda n, size: DataLoader(range(n), size, collate_fn=plain),
    "shuffled": lambda n, size: DataLoader(range(n), size, shuffle=True, collate_fn=plain),
    "its own generator": lambda n, size: DataLoader(
        range(n), size, shuffle=True, collate_fn=plain, generator=torch.Generator().manual_seed(4)
    ),
    "the last one dropped": lambda n, size: DataLoader(
        range(n), size, shuffle=True, drop_last=True, collate_fn=plain
    ),
    "a batch sampler": lambda n, size: DataLoader(
        range(n), batch_sampler=Shuffled(n, size), collate_fn=plain
    ),
    "no batches": lambda n, size: DataLoader(
        range(n), None, shuffle=True, collate_fn=lambda i: [i]
    ),
    "with replacement": lambda n, size: DataLoader(
        range(n), size, collate_fn=plain, sampler=RandomSampler(range(n), replacement=True)
    ),
    "a subset": lambda n, size: DataLoader(
        range(2 * n), size, collate_fn=plain, sampler=SubsetRandomSampler(range(0, 2 * n, 2))
    ),
    "weighted": lambda n, size: DataLoader(
        range(n), size, collate_fn=plain, sampler=WeightedRandomSampler([1.0] * n, n)
    ),
    "a list": lambda n, size: [[*range(i, min(n, i + size))] for i in range(0, n, size)],
}
SIZED = st.tuples(
    st.sampled_from(sorted(LOADERS)), st.integers(1, 30), st.integers(1, 5), st.integers(1, 5)
)


class Ranks:
    """All ranks of a world in one process, each with random states of its own."""

    def __init__(self, make, world, uneven="exact", **settings):
        self.world, self.starts, self.states = world, [], []
        self.parts = [
            sharded(make(), r, world, uneven, share_start=self.share, **settings)
            for r in range(world)
        ]
        self.positions = [Position() for _ in range(world)]

    def share(self, start):
        """What a broadcast from rank 0 does; the ranks come in their order."""
        if len(self.starts) % self.world == 0:
            self.common = start
        self.starts.append(start)
        return self.common

    def begin(self, epoch=0):
        self.iterators = []
        for rank, part in enumerate(self.parts):
            seed_all(100 * epoch + rank)
            set_epoch(part, epoch)
            self.positions[rank] = Position.beginning(part)
            self.iterators.append(begun(part, self.positions[rank]))
        return self

    def take(self, updates=None):
        """Batches of each update: those of rank 0, 1, ..."""
        updates = len(self.parts[0]) if updates is None else updates
        return [[next(batches, None) for batches in self.iterators] for _ in range(updates)]

    def go_on(self, saved, batch):
        """Open the rest of the epoch from rank 0's saved position, as after a restore."""
        self.iterators = []
        for rank, part in enumerate(self.parts):
            seed_all(9 + rank)
            self.positions[rank] = Position(**saved)
            at = moved(part, self.positions[rank], batch)
            self.iterators.append(reopened(part, self.positions[rank], at))
        return at


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def alone(make):
    """The epoch on one process."""
    seed_all(0)
    data = make()
    return [*begun(data, Position.beginning(data))]


def real(rounds):
    return [batch for batches in rounds for batch in batches if type(batch) is not Filler]


def samples(batches):
    return collections.Counter(itertools.chain.from_iterable(batches))


@settings(deadline=None)
@given(SIZED)
def test_ranks_take_the_batches_of_one_process_in_their_order(drawn):
    """Rank r has batches r, r + w, ... of the order on one process; fillers come last, and few."""
    kind, count, size, world = drawn
    make = lambda: LOADERS[kind](count, size)
    whole, ranks = alone(make), Ranks(make, world)
    if whole == []:
        assert [[*part] for part in ranks.parts] == [[] for _ in range(world)]
        return
    rounds = ranks.begin().take()
    assert real(rounds) == whole
    assert len(rounds) == -(-len(whole) // world)
    assert all(None not in row for row in rounds)
    assert [next(batches, None) for batches in ranks.iterators] == [None] * world
    fillers = [b.batch for row in rounds for b in row if type(b) is Filler]
    assert fillers == [whole[0]] * (len(rounds) * world - len(whole))


@settings(deadline=None)
@given(SIZED, st.sampled_from(POLICIES))
def test_all_ranks_have_equally_many_batches_and_say_so(drawn, uneven):
    """The length of a part is the number of its batches, the same on all ranks."""
    kind, count, size, world = drawn
    ranks = Ranks(lambda: LOADERS[kind](count, size), world, uneven)
    lengths = [len(part) for part in ranks.parts]
    assert lengths == [len([*batches]) for batches in ranks.begin().iterators]
    assert len({*lengths}) == 1


@settings(deadline=None)
@given(SIZED)
def test_the_uneven_end_is_dropped_or_padded_from_the_start(drawn):
    """`drop` leaves out the last, incomplete round; `pad` repeats from the epoch's start."""
    kind, count, size, world = drawn
    make = lambda: LOADERS[kind](count, size)
    whole = alone(make)
    full = len(whole) // world * world
    assert real(Ranks(make, world, "drop").begin().take()) == whole[:full]
    padded = -(-len(whole) // world) * world
    expected = [*itertools.islice(itertools.cycle(whole), padded)]
    assert real(Ranks(make, world, "pad").begin().take()) == expected


@settings(deadline=None)
@given(SIZED, st.integers(0, 30), st.sampled_from(POLICIES))
def test_an_epoch_goes_on_with_the_very_batches(drawn, cut, uneven):
    """Cut after any update, the other updates have the batches that they would have had."""
    kind, count, size, world = drawn
    make = lambda: LOADERS[kind](count, size)
    whole = Ranks(make, world, uneven).begin().take()
    first = Ranks(make, world, uneven).begin()
    cut = min(cut, len(whole))
    rounds = first.take(cut)
    saved = first.positions[0].now(first.parts[0])
    again = Ranks(make, world, uneven)
    assert again.go_on(saved, cut) == cut
    assert rounds + again.take(len(whole) - cut) == whole
    assert [next(batches, None) for batches in again.iterators] == [None] * world


WORLDS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=2, max_size=4)


@settings(deadline=None)
@given(SIZED, WORLDS)
def test_an_epoch_goes_on_with_another_number_of_ranks(drawn, worlds):
    """Two ranks, then one, then four, ...: each sample of the epoch once, and none twice."""
    kind, count, size, _ = drawn
    make = lambda: LOADERS[kind](count, size)
    seen, saved, batch = [], None, 0
    for number, (world, updates) in enumerate(worlds):
        ranks = Ranks(make, world)
        if saved is None or not batch:
            ranks.begin()
            seen, batch = [], 0
        else:
            batch = ranks.go_on(saved, batch)
        left = len(ranks.parts[0]) - batch
        assert left >= 0
        updates = left if number == len(worlds) - 1 else min(updates, left)
        seen += real(ranks.take(updates))
        batch += updates
        saved = ranks.positions[0].now(ranks.parts[0])
    assert [next(batches, None) for batches in ranks.iterators] == [None] * world
    assert seen == alone(make)


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(0, 4)), min_size=2, max_size=4
    ),
)
def test_an_epoch_goes_on_with_another_batch_size(count, parts):
    """Where torch cuts the batches the position is one in samples: any size, any ranks."""
    seen, saved, batch = [], None, 0
    for number, (world, size, updates) in enumerate(parts):
        ranks = Ranks(lambda: LOADERS["shuffled"](count, size), world)
        if not batch:
            ranks.begin()
            seen = []
        else:
            batch = ranks.go_on(saved, batch)
        left = len(ranks.parts[0]) - batch
        updates = left if number == len(parts) - 1 else min(updates, left)
        seen += real(ranks.take(updates))
        batch += updates
        saved = ranks.positions[0].now(ranks.parts[0])
    assert samples(seen) == dict.fromkeys(range(count), 1)
