"""Data of every kind, and a state that shows which batches it was trained on."""

import os
from pathlib import Path

import loopkit as lk
import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset


def tiny_state(seed=0, dtype=torch.float32):
    """One weight, so that an update costs next to nothing."""
    torch.manual_seed(seed)
    model = nn.Linear(1, 1).to(dtype)
    return lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.01))


def numbered(count, size=1, start=0):
    """Batches that carry their number."""
    return [torch.full((size, 1), float(i)) for i in range(start, start + count)]


class Seen:
    """A step function that notes the numbers of its batches, in order."""

    def __init__(self):
        self.numbers = []

    def __call__(self, state, batch):
        self.numbers.append(int(batch[0, 0]))
        return state.model(batch / 100).mean()


def stepped(window, function=None):
    function = function or mean_output
    return function if window is None else lk.with_grad_accum(window)(function)


def clock(state):
    return state.step, state.epoch, state.batch, state.samples, state.epoch_end


def finish(updates):
    for _ in updates:
        pass


def mean_output(state, batch):
    return state.model(batch).mean()


class Counted:
    """Counts the batches that were read; without a length unless one is given."""

    def __init__(self, batches, length=None):
        self.batches, self.length, self.read = batches, length, 0

    def __len__(self):
        if self.length is None:
            raise TypeError("no length")
        return self.length

    def __iter__(self):
        for batch in self.batches:
            self.read += 1
            yield batch


class Samples(Dataset):
    """Numbered samples, for a loader that makes the batches."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.tensor([float(index)])


class Stream(IterableDataset):
    """The same without a length; each worker takes its share."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        return (torch.tensor([float(i)]) for i in range(first, self.count, stride))


class SizedStream(Stream):
    """A stream that claims a length."""

    def __len__(self):
        return self.count


class Broken(Samples):
    """A sample that cannot be read."""

    def __getitem__(self, index):
        if index == 3:
            raise LookupError("sample 3 is gone")
        return super().__getitem__(index)


def loader(count, workers=0, kind=Samples, **settings):
    return DataLoader(kind(count), batch_size=1, num_workers=workers, **settings)


def children():
    """The ids of this process's children that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            status, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and status != "Z":
            found.add(int(stat.parent.name))
    return found


WINDOWS = st.one_of(
    st.none(),
    st.integers(1, 5),
    st.dictionaries(st.integers(1, 4), st.integers(1, 5), max_size=3).map(lambda d: {0: 2, **d}),
)
LIMITS = st.fixed_dictionaries(
    {
        "max_epochs": st.one_of(st.none(), st.integers(1, 4), st.floats(0.05, 4.0)),
        "max_steps": st.one_of(st.none(), st.integers(1, 30)),
        "limit_batches": st.one_of(st.none(), st.integers(1, 12), st.floats(0.05, 1.0)),
    }
).filter(lambda limits: limits["max_epochs"] or limits["max_steps"])
