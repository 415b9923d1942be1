"""All ranks of a world in one process, and loaders of every kind for them."""

import collections
import itertools
import random

import numpy as np
import torch
from hypothesis import strategies as st
from loopkit.data.order import Uneven
from loopkit.data.shard import sharded
from loopkit.position import Position, begun, moved, reopened, set_epoch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

POLICIES = ("exact", "drop", "pad")


class Shuffled:
    """A user's batch sampler, which draws from Python's generator when it begins."""

    def __init__(self, count, size):
        self.count, self.size = count, size

    def __len__(self):
        return len(range(0, self.count, self.size))

    def __iter__(self):
        order = random.sample(range(self.count), self.count)
        for start in range(0, self.count, self.size):
            yield order[start : start + self.size]


class DrawsOnItsWay(Shuffled):
    """Another, which draws as it goes; what a model draws meanwhile changes its order."""

    def __iter__(self):
        left = {*range(self.count)}
        while left:
            batch = random.sample(sorted(left), min(self.size, len(left)))
            np.random.rand()
            left -= {*batch}
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
    own = [b for batches in rounds for b in batches if not (type(b) is Uneven and b.filler)]
    return [b.batch if type(b) is Uneven else b for b in own]


def samples(batches):
    return collections.Counter(itertools.chain.from_iterable(batches))
