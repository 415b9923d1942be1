"""Going on within an epoch: the very batches that were left, and the same training, bit for bit."""

import contextlib
import copy
import random

import loopkit as lk
import numpy as np
import pytest
import torch
from loopkit.rng import rng_state, set_rng_state
from loopkit.testing import assert_bitwise_equal
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from problems import mlp

CPU = torch.device("cpu")
COUNT, SIZE = 23, 4


class Samples(Dataset):
    """Numbered samples; it notes which were loaded."""

    def __init__(self, *, noisy=False):
        self.noisy, self.loaded, self.count = noisy, [], COUNT

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.loaded.append(index)
        noise = torch.randn(4) + random.random() + np.random.rand() if self.noisy else 0
        return torch.full((4,), index / COUNT) + noise, index % 3, index


class Stream(IterableDataset):
    def __init__(self, *, noisy=False):
        self.noisy = noisy

    def __iter__(self):
        dataset = Samples(noisy=self.noisy)
        return (dataset[i] for i in range(COUNT))


class Evens:
    """A user's sampler, which asks to be told the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return COUNT

    def __iter__(self):
        return iter(np.random.RandomState(self.epoch).permutation(COUNT).tolist())


def generator():
    return torch.Generator().manual_seed(5)


LOADERS = {
    "in order": lambda: DataLoader(Samples(), SIZE),
    "shuffled": lambda: DataLoader(Samples(), SIZE, shuffle=True),
    "shuffled, own generator": lambda: DataLoader(
        Samples(), SIZE, shuffle=True, generator=generator()
    ),
    "shuffled, two workers": lambda: DataLoader(Samples(), SIZE, shuffle=True, num_workers=2),
    "random in the samples": lambda: DataLoader(Samples(noisy=True), SIZE, shuffle=True),
    "a sampler's generator": lambda: DataLoader(
        Samples(), SIZE, sampler=RandomSampler(Samples(), generator=generator())
    ),
    "with replacement": lambda: DataLoader(
        Samples(), SIZE, sampler=RandomSampler(Samples(), replacement=True, num_samples=COUNT)
    ),
    "a subset": lambda: DataLoader(Samples(), SIZE, sampler=SubsetRandomSampler(range(3, 20))),
    "weighted": lambda: DataLoader(
        Samples(), SIZE, sampler=WeightedRandomSampler([1.0] * COUNT, 17)
    ),
    "batches by the dataset": lambda: DataLoader(Samples(), None, shuffle=True, collate_fn=single),
    "a user's sampler": lambda: DataLoader(Samples(), SIZE, sampler=Evens()),
    "a stream": lambda: DataLoader(Stream(), SIZE),
    "random in a stream": lambda: DataLoader(Stream(noisy=True), SIZE),
    "a list": lambda: [*DataLoader(Samples(), SIZE)],
}


def single(sample):
    inputs, label, index = sample
    return inputs[None], torch.tensor([label]), torch.tensor([index])


@lk.with_ema(0.9)
@lk.with_clip(1.0)
def step(state, batch):
    inputs, labels, indices = batch
    state.extras["seen"] = [*state.extras["seen"], *indices.tolist()]
    return F.cross_entropy(state.model(inputs), labels)


def fresh():
    torch.manual_seed(0)
    model = mlp(dropout=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return lk.TrainState(model, optimizer, seen=[])


def seeded():
    lk.seed_everything(1)


def resumed(state, make):
    """What a new process makes of a saved state: nothing lives on but what was saved."""
    saved = copy.deepcopy((state.state_dict(), rng_state(CPU)))
    seeded()
    torch.rand(100)
    again, data = fresh(), make()
    again.load_state_dict(saved[0])
    set_rng_state(saved[1], CPU)
    return again, data


def without_data(state):
    return {k: v for k, v in state.state_dict().items() if k != "data"}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", LOADERS)
def test_resumed_training_equals_uninterrupted_training_wherever_it_was_cut(kind, window):
    """Saved at any update, and again at the next but one, two epochs end in the same bits."""
    make = LOADERS[kind]
    if "workers" in kind:
        cuts = (2, 7)
    else:
        cuts = range(1, 13, 1 if window is None else 2)
    stepped = step if window is None else lk.with_grad_accum(window)(step)
    seeded()
    whole = fresh()
    for _ in lk.run(stepped, whole, make(), max_epochs=2):
        pass
    for cut in cuts:
        seeded()
        state, data = fresh(), make()
        for stop in (cut, cut + 2):
            for _ in lk.run(stepped, state, data, max_steps=stop, max_epochs=2):
                pass
            state, data = resumed(state, make)
        for _ in lk.run(stepped, state, data, max_epochs=2):
            pass
        assert state.extras["seen"] == whole.extras["seen"], cut
        assert_bitwise_equal(without_data(state), without_data(whole), f"cut at {cut}:")


@pytest.mark.parametrize(
    "kind", ["shuffled", "shuffled, own generator", "weighted", "a stream", "random in a stream"]
)
def test_going_on_in_the_same_process_equals_uninterrupted_training(kind):
    """A break within an epoch, and another run on the same data, change nothing."""
    seeded()
    whole = fresh()
    for _ in lk.run(step, whole, LOADERS[kind](), max_epochs=2):
        pass
    seeded()
    state, data = fresh(), LOADERS[kind]()
    for stop in (2, 3, 8):
        for _ in lk.run(step, state, data, max_epochs=2):
            if state.step == stop:
                break
    for _ in lk.run(step, state, data, max_epochs=2):
        pass
    assert_bitwise_equal(without_data(state), without_data(whole))


def test_batches_that_were_taken_are_not_loaded_again():
    """Going on passes over the samples of the epoch in the sampler, not in the dataset."""
    state, data = fresh(), LOADERS["shuffled"]()
    for _ in lk.run(step, state, data, max_steps=4):
        pass
    state, data = resumed(state, LOADERS["shuffled"])
    for _ in lk.run(step, state, data, max_epochs=1):
        pass
    assert len(data.dataset.loaded) == COUNT - 4 * SIZE
    assert sorted(state.extras["seen"]) == [*range(COUNT)]


def opened_only(state, size):
    """The state, when an epoch was opened with this batch size and left before an update."""
    with lk.run(step, state, DataLoader(Samples(), size, shuffle=True), max_steps=state.step):
        pass
    for _ in lk.run(step, state, DataLoader(Samples(), size, shuffle=True), max_time=1e-9):
        pass
    return state


@pytest.mark.parametrize(("before", "after"), [(4, 5), (4, 8), (6, 1), (3, COUNT)])
def test_an_epoch_goes_on_with_another_batch_size(before, after):
    """The position is one in samples: the rest of the epoch has each of the others once."""
    state = fresh()
    for _ in lk.run(step, state, DataLoader(Samples(), before, shuffle=True), max_steps=3):
        pass
    state, _ = resumed(state, LOADERS["shuffled"])
    state, _ = resumed(opened_only(state, 23), LOADERS["shuffled"])
    data = DataLoader(Samples(), after, shuffle=True)
    updates = lk.run(step, state, data, max_epochs=1)
    assert updates.total_steps is not None
    ends = [state.epoch_end for state in updates]
    assert len(ends) == -(-(COUNT - 3 * before) // after)
    assert ends == [False] * (len(ends) - 1) + [True]
    assert sorted(state.extras["seen"]) == [*range(COUNT)]
    assert len(data.dataset.loaded) == COUNT - 3 * before
    for _ in lk.run(step, state, data, max_epochs=2):
        pass
    assert sorted(state.extras["seen"][COUNT:]) == [*range(COUNT)]


def test_batches_of_another_size_that_cannot_be_found_again_are_refused():
    """Where the batches are a sampler's or a stream's own: an error, and the state stays."""
    state = fresh()
    next(lk.run(step, state, LOADERS["a stream"]()))
    state, _ = resumed(state, LOADERS["a stream"])
    for other in (DataLoader(Stream(), 5), LOADERS["shuffled"]()):
        with pytest.raises(lk.DataError, match=r"batches of \d samples .*where they were of 4"):
            next(lk.run(step, state, other))
    assert state.step == 1


def test_an_iterator_goes_on_where_it_is_and_says_so():
    """It cannot be begun anew; a run that was restored does not know how much of it is gone."""
    state = fresh()
    next(lk.run(step, state, LOADERS["a list"]()))
    for batch, told in ((1, pytest.warns(lk.CheckpointWarning, match="after batch 1 of epoch 0")),
                        (0, contextlib.nullcontext())):  # fmt: skip
        again, data = resumed(state, LOADERS["a list"])
        again.batch = batch
        with told:
            next(lk.run(step, again, iter(data)))
        assert again.extras["seen"] == [0, 1, 2, 3] * 2


def test_a_dataset_that_has_grown_is_refused_within_an_epoch():
    """Its samples have another order: some would come twice, and some never."""
    state = fresh()
    next(lk.run(step, state, LOADERS["shuffled"]()))
    state, _ = resumed(state, LOADERS["shuffled"])
    data = LOADERS["shuffled"]()
    data.dataset.count = COUNT + 1
    with pytest.raises(lk.DataError, match=r"in all: 24.* in all: 23"):
        next(lk.run(step, state, data))


def test_samplers_are_told_the_epoch():
    """A sampler with set_epoch, such as a distributed one, shuffles each epoch anew."""
    sampler, orders = Evens(), []
    state = fresh()
    for _ in lk.run(step, state, DataLoader(Samples(), SIZE, sampler=sampler), max_epochs=2):
        if state.epoch_end:
            orders.append(state.extras.pop("seen"))
            state.extras["seen"] = []
    assert orders[0] != orders[1]
    assert sampler.epoch == 1


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("cut", [3, 6, 8, 14])
def test_persistent_workers_go_on_with_what_was_left(cut, own):
    """Within an epoch, at its end, in the next one: the same samples in the same order."""

    def make():
        return DataLoader(
            Samples(), SIZE, shuffle=True, num_workers=1, persistent_workers=True,
            generator=generator() if own else None,
        )  # fmt: skip

    seeded()
    whole = fresh()
    for _ in lk.run(step, whole, make(), max_epochs=3):
        pass
    seeded()
    state, data = fresh(), make()
    for _ in lk.run(step, state, data, max_steps=cut, max_epochs=3):
        pass
    for _ in lk.run(step, state, data, max_steps=cut + 1, max_epochs=3):  # in the same process
        pass
    state, data = resumed(state, make)
    for _ in lk.run(step, state, data, max_steps=cut + 2, max_epochs=3):
        pass
    for _ in lk.run(step, state, data, max_epochs=3):
        pass
    assert state.extras["seen"] == whole.extras["seen"]
    assert_bitwise_equal(without_data(state), without_data(whole), f"cut at {cut}:")


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Samples, Stream])
def test_a_loader_with_its_own_state_is_asked_for_it(dataset, workers):
    """Torchdata's StatefulDataLoader goes on where it says that it was."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def make():
        shuffle = None if dataset is Stream else True
        return stateful(dataset(), SIZE, shuffle=shuffle, num_workers=workers)

    if dataset is Stream and workers:
        pytest.skip("each worker would give the whole stream")
    seeded()
    whole = fresh()
    for _ in lk.run(step, whole, make(), max_epochs=2):
        pass
    for cut in (2, 6, 8):
        seeded()
        state, data = fresh(), make()
        for _ in lk.run(step, state, data, max_steps=cut):
            pass
        state, data = resumed(state, make)
        for _ in lk.run(step, state, data, max_epochs=2):
            pass
        assert state.extras["seen"] == whole.extras["seen"], cut
        assert_bitwise_equal(without_data(state), without_data(whole), f"cut at {cut}:")
