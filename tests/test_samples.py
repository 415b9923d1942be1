"""Samples with random states of their own: the same, whoever loads them, and when."""

import pickle
import random

import loopkit as lk
import numpy as np
import pytest
import torch
from loopkit.rng import rng_state
from loopkit.testing import assert_bitwise_equal
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from test_position import fresh, resumed, without_data

COUNT, SIZE = 16, 2


class Augmented(Dataset):
    """Samples that draw from all three generators, and from one of their own."""

    def __init__(self):
        self.own = np.random.default_rng(3)

    def reseed(self, seed):
        self.own = np.random.default_rng(seed)

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        noise = [random.gauss(0, 1), np.random.randn(), torch.randn(()), self.own.normal()]
        return torch.tensor([float(number) for number in noise]) + index / COUNT, index % 3, index


def augmented(seed=7):
    dataset = Augmented()
    return lk.seeded(dataset, seed=seed, also=dataset.reseed)


def loader(workers=0, dataset=None, size=SIZE, **settings):
    settings = {"persistent_workers": False} | settings
    if workers == 0:
        settings["persistent_workers"] = False
    return DataLoader(dataset or augmented(), size, num_workers=workers, **settings)


def drawn(data, epoch=0):
    """Each sample of an epoch, by its index."""
    lk.position.set_epoch(data, epoch)
    return {int(i): x for inputs, _, indices in data for x, i in zip(inputs, indices, strict=True)}


HOW = {
    "one worker": lambda: loader(1),
    "two workers": lambda: loader(2),
    "two that persist": lambda: loader(2, persistent_workers=True),
    "two that are spawned": lambda: loader(2, multiprocessing_context="spawn"),
    "another batch size": lambda: loader(size=5),
    "shuffled": lambda: loader(shuffle=True),
    "a subset": lambda: loader(dataset=Subset(augmented(), [*range(COUNT)][::-1])),
    "a pickled copy": lambda: loader(dataset=pickle.loads(pickle.dumps(augmented()))),
}


@pytest.mark.parametrize("how", HOW)
def test_a_sample_is_the_same_whoever_loads_it(how):
    """Its numbers follow from the seed, the epoch and its index alone, bit for bit."""
    data = HOW[how]()
    for epoch in (0, 1, 0):
        torch.rand(7)
        found, expected = drawn(data, epoch), drawn(loader(), epoch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[i], expected[i]) for i in expected)


def test_samples_epochs_and_seeds_differ():
    """Each sample draws other numbers, in each epoch, and under each seed."""
    data = augmented()
    seen = set()
    for epoch in range(4):
        data.set_epoch(epoch)
        for other in (data, augmented(8)):
            other.set_epoch(epoch)
            seen |= {tuple((other[i][0] - i / COUNT).tolist()) for i in range(COUNT)}
    assert len(seen) == 4 * 2 * COUNT


def test_the_main_process_draws_as_if_no_sample_had_been_loaded():
    """The generators that the model draws from are where they were, also after an error."""
    data = augmented()
    np.random.seed(4)
    before = rng_state(torch.device("cpu"))
    data[3]
    with pytest.raises(TypeError):
        data["no index"]
    assert_bitwise_equal(rng_state(torch.device("cpu")), before)


def test_datasets_within_others_are_told_the_epoch():
    """`run` reaches a seeded dataset in a Subset, a ConcatDataset, and one around another."""
    inner = [augmented(1), augmented(2)]
    outer = lk.seeded(Subset(ConcatDataset(inner), range(20)), seed=3)
    lk.position.set_epoch(DataLoader(outer), 5)
    assert [data.epoch for data in (*inner, outer)] == [5, 5, 5]


def step(state, batch):
    inputs, labels, _ = batch
    state.extras["seen"] = [*state.extras["seen"], *inputs.flatten().tolist()]
    return F.cross_entropy(state.model(inputs), labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_training_goes_on_bit_for_bit(workers):
    """Cut at every update of an epoch, or with another number of workers: the same bits."""

    def make():
        return loader(workers, shuffle=True)

    lk.seed_everything(1)
    whole = fresh()
    for _ in lk.run(step, whole, make(), max_epochs=2):
        pass
    for cut in range(1, 17, 5 if workers else 1):
        lk.seed_everything(1)
        state, data = fresh(), make()
        for _ in lk.run(step, state, data, max_steps=cut):
            pass
        state, data = resumed(state, make if cut % 2 else lambda: loader(2 - workers, shuffle=True))
        for _ in lk.run(step, state, data, max_epochs=2):
            pass
        assert state.extras["seen"] == whole.extras["seen"], cut
        assert_bitwise_equal(without_data(state), without_data(whole), f"cut at {cut}:")


def test_persistent_workers_draw_the_same_after_a_resume():
    """Also in later epochs, whose numbers would else come from the workers' own history."""

    def make():
        return loader(1, shuffle=True, persistent_workers=True)

    lk.seed_everything(1)
    whole = fresh()
    for _ in lk.run(step, whole, make(), max_epochs=3):
        pass
    for cut in (5, 8, 13):
        lk.seed_everything(1)
        state, data = fresh(), make()
        for _ in lk.run(step, state, data, max_steps=cut):
            pass
        state, data = resumed(state, make)
        for _ in lk.run(step, state, data, max_epochs=3):
            pass
        assert state.extras["seen"] == whole.extras["seen"], cut


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda: lk.seeded(Stream(), seed=0), "samples have no index"),
        (lambda: lk.seeded(3, seed=0), "a int"),
        (lambda: lk.seeded(Augmented(), seed=0.5), "seed = 0.5"),
        (lambda: lk.seeded(Augmented(), seed=True), "seed = True"),
    ],
)
def test_a_wrong_use_is_an_error_that_teaches(wrong, found):
    """A stream, or a seed that is no int, is refused at once."""
    with pytest.raises(lk.UsageError, match=found):
        wrong()
