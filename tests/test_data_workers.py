"""Workers of a loader: hung, killed, raising, or still busy: found out, named, and gone."""

import gc
import os
import re
import signal
import sys
import threading
import time

import loopkit as lk
import pytest
import torch
from loopkit.data.watch import end_workers
from torch.utils.data import DataLoader, Dataset

from feeds import children, mean_output, tiny_state


class Trouble(Dataset):
    """Sample 5 goes wrong, and is written by one worker of two."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 5:
            getattr(self, self.kind)()
        return torch.tensor([float(index)])

    def hangs_for_ever(self):
        while True:
            time.sleep(100)

    def stops(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def is_killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def raises(self):
        raise LookupError("sample 5 is gone")


def marked(worker):
    """A worker_init_fn of the user's own."""
    sys.stdout.write(f"worker {worker} began\n")
    sys.stdout.flush()


def loader(kind, **settings):
    return DataLoader(Trouble(kind), 1, num_workers=2, timeout=1.5, **settings)


def train(data):
    for _ in lk.run(mean_output, tiny_state(), data, max_epochs=1):
        pass


def evaluate(data):
    lk.evaluate(lambda state, x: {"loss": x.mean()}, tiny_state(), data)


@pytest.mark.parametrize("use", [train, evaluate])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_hung_worker_is_named_with_its_stack(use, persistent):
    """No silent waiting: an error with the worker, its process id, and the line where it is."""
    before = children()
    data = loader("hangs_for_ever", persistent_workers=persistent)
    with pytest.raises(lk.DataError, match=r"no batch for 1.5 s") as caught:
        use(data)
    assert re.search(r"Process-\d+ \(pid \d+\), which is at", caught.value.found)
    assert "in hangs_for_ever" in caught.value.found
    assert "test_data_workers.py" in caught.value.found
    assert children() <= before


def test_spawned_workers_are_watched_as_well():
    """What is put into a worker to ask for its stack can be sent to a new interpreter."""
    data = DataLoader([torch.ones(1)] * 3, num_workers=1, multiprocessing_context="spawn")
    train(data)
    assert data.worker_init_fn is None


def test_a_stopped_worker_is_named_and_leaves_no_process():
    """One that cannot even answer a signal: named without a stack, and gone all the same."""
    before = children()
    with pytest.raises(lk.DataError, match="no answer: it is stopped"):
        train(loader("stops"))
    assert children() <= before


# Torch then opens files, to see whether any are left; its error may come within one of the openings
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_worker_that_died_is_not_waited_for():
    """Torch's own error, at once, though the limit of time is far away."""
    before = children()
    data = DataLoader(Trouble("is_killed"), 1, num_workers=2)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* (killed|exited)"):
        train(data)
    assert children() <= before


@pytest.mark.parametrize("part", [False, True])
def test_an_error_in_a_sample_ends_all_workers(part):
    """The sample's own error arrives, and no worker is left; also of a rank's part."""
    before = children()
    data = loader("raises")
    with pytest.raises(LookupError, match="sample 5 is gone"):
        train(lk.sharded(data, 1, 2) if part else data)
    assert children() <= before


class Slow(Trouble):
    """A sample that takes for ever, behind others that come at once."""

    def __getitem__(self, index):
        if index > 1:
            time.sleep(1000)
        return torch.tensor([float(index)])


def fail_within(updates):
    with updates:
        for _ in updates:
            raise KeyError("the loop's own")


def test_busy_workers_are_gone_after_an_error_in_the_loop():
    """A worker in the middle of a long sample is not waited for."""
    before = children()
    updates = lk.run(mean_output, tiny_state(), DataLoader(Slow(""), 1, num_workers=2))
    with pytest.raises(KeyError):
        fail_within(updates)
    assert children() <= before


def test_a_loader_is_left_as_it_was_and_can_be_read_again():
    """Its worker_init_fn is the user's, also after a hang; persistent workers are made anew."""
    data = loader("hangs_for_ever", persistent_workers=True, worker_init_fn=marked)
    for _ in range(2):
        with pytest.raises(lk.DataError, match="no batch for"):
            train(data)
        assert data.worker_init_fn is marked


def test_the_users_own_worker_init_is_called(capfd):
    """What the loader was given for its workers runs in each of them."""
    list_of = [
        *lk.run(
            mean_output,
            tiny_state(),
            DataLoader([torch.ones(1)] * 4, num_workers=2, worker_init_fn=marked),
            max_epochs=1,
        )
    ]
    assert len(list_of) == 4
    assert sorted(capfd.readouterr().out.split("\n"))[-2:] == ["worker 0 began", "worker 1 began"]


COLLECTED = []


class Lost:
    """What only the garbage collector finds, as torch's engine of a training that is over."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        COLLECTED.append(os.getpid())


class Collecting(Dataset):
    """Samples that say how much was collected here."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        gc.collect()
        return torch.tensor([float(len(COLLECTED))])


def test_workers_do_not_collect_what_their_process_lost():
    """Its end may wait for threads that are not there after a fork, and then the worker hangs."""
    gc.collect()
    gc.disable()
    try:
        Lost()
        COLLECTED.clear()
        data = DataLoader(Collecting(), 1, num_workers=1)
        seen = [float(state.loss) for state in lk.run(batch_mean, tiny_state(), data, max_epochs=1)]
    finally:
        gc.enable()
    assert seen == [0.0] * 4
    gc.collect()
    assert [os.getpid()] == COLLECTED


def batch_mean(state, batch):
    return batch.mean() + 0 * state.model(batch).sum()


@pytest.mark.parametrize("persistent", [False, True])
def test_looking_after_workers_leaves_no_threads(persistent):
    """A thread looks after the workers of a loader, and ends with them."""
    before = {*threading.enumerate()}
    data = DataLoader([torch.ones(1)] * 4, num_workers=1, persistent_workers=persistent)
    for epoch in range(1, 4):
        for _ in lk.run(mean_output, tiny_state(), data, max_epochs=1):
            pass
        guards = [t for t in {*threading.enumerate()} - before if "_guard" in t.name]
        assert len(guards) == persistent, epoch
    if persistent:
        end_workers(data._iterator)
    assert not [t for t in {*threading.enumerate()} - before if "_guard" in t.name]
