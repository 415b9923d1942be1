"""Seeding every source of random numbers."""

import os
import random

import loopkit as lk
import numpy as np
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from torch.utils.data import DataLoader, Dataset


class Random(Dataset):
    """Samples with a number from each source, in whatever process they are made."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index, torch.rand(()), random.random(), np.random.rand()


def drawn():
    return torch.rand(3), random.random(), np.random.rand(3).tolist()


def epochs(generator, workers=0, between=0):
    """Two epochs of a shuffled loader, with numbers drawn by a model between the batches."""
    data = DataLoader(Random(), 2, shuffle=True, num_workers=workers, generator=generator)
    batches = []
    for _ in range(2):
        for batch in data:
            batches.append(batch)
            torch.rand(between)
    return batches


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_the_same_seed_gives_the_same_numbers(seed):
    """Python, NumPy and torch draw again what they drew."""
    lk.seed_everything(seed)
    first = drawn()
    lk.seed_everything(seed)
    assert_bitwise_equal(drawn(), first)
    lk.seed_everything(seed ^ 1)
    assert not torch.equal(drawn()[0], first[0])


@pytest.mark.parametrize("workers", [True, False])
def test_loader_workers_are_seeded(workers):
    """With two workers shuffling and samples repeat, and no two samples or epochs are alike."""
    runs = [epochs(lk.seed_everything(7, workers=workers), workers=2) for _ in range(2)]
    assert_bitwise_equal(*runs)
    for source in (1, 2, 3):
        numbers = torch.cat([batch[source] for batch in runs[0]])
        assert len(numbers.unique()) == 16
    orders = torch.cat([batch[0] for batch in runs[0]]).view(2, 8)
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders.sort(dim=1).values, torch.arange(8).expand(2, 8))


def test_the_generator_makes_shuffling_independent_of_the_models_draws():
    """With it the order is the seed's alone, however much the model draws; without it is not."""
    orders = {
        (own, between): torch.cat(
            [batch[0] for batch in epochs(lk.seed_everything(7) if own else None, between=between)]
        )
        for own in (True, False)
        for between in (0, 5)
    }
    assert torch.equal(orders[True, 0], orders[True, 5])
    assert not torch.equal(orders[False, 0], orders[False, 5])


def test_the_generator_makes_worker_samples_independent_of_the_models_draws():
    """What workers draw follows from the generator as well."""
    assert_bitwise_equal(
        *(epochs(lk.seed_everything(7), workers=2, between=between) for between in (0, 5))
    )


def test_without_workers_there_is_no_generator():
    """A generator comes only where it was asked for."""
    assert isinstance(lk.seed_everything(0), torch.Generator)
    assert lk.seed_everything(0, workers=False) is None


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "0", None, True])
def test_a_seed_that_numpy_cannot_take_is_refused(seed):
    """Outside 0 to 2**32 - 1, or not whole: nothing is seeded, and the error says the range."""
    torch.manual_seed(1)
    with pytest.raises(lk.UsageError, match=r"seed = .*\n.*from 0 to 2\*\*32 - 1"):
        lk.seed_everything(seed)
    assert torch.initial_seed() == 1


@pytest.fixture
def settings_back(monkeypatch):
    """The process's settings, put back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize("wanted", [True, "warn", False])
def test_deterministic_sets_what_torch_needs_for_it(wanted, settings_back):
    """True makes operations without a deterministic kernel an error, "warn" a warning."""
    torch.backends.cudnn.benchmark = True
    lk.seed_everything(0, deterministic=wanted)
    assert torch.are_deterministic_algorithms_enabled() == bool(wanted)
    assert torch.is_deterministic_algorithms_warn_only_enabled() == (wanted == "warn")
    assert torch.backends.cudnn.benchmark != bool(wanted)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)


def test_deterministic_is_left_alone_unless_asked_for(settings_back):
    """Seeding alone changes no setting; another word is an error before anything is seeded."""
    torch.use_deterministic_algorithms(True)
    lk.seed_everything(0)
    assert torch.are_deterministic_algorithms_enabled()
    before = torch.get_rng_state()
    with pytest.raises(lk.UsageError, match="deterministic = 'yes'"):
        lk.seed_everything(1, deterministic="yes")
    assert torch.equal(torch.get_rng_state(), before)
