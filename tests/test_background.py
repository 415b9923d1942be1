"""Loading in the background: overlap, order, errors, and an end without threads left."""

import copy
import threading

import loopkit as lk
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from problems import classifier, make_batches, make_state, train


def threads():
    return [t for t in threading.enumerate() if t.name == "lk.background"]


def test_batches_are_loaded_while_the_step_computes():
    """The second batch is being loaded before the first was handed back: nothing waits in turn."""
    loading_second = threading.Event()

    def data():
        yield 1
        loading_second.set()
        yield 2

    batches = iter(lk.background(data(), ahead=1))
    assert next(batches) == 1
    assert loading_second.wait(30)  # set while the loop still "computes" on the first
    assert list(batches) == [2]


def test_no_more_than_asked_for_is_read_ahead():
    """With ahead=2, at most two wait and one is in the thread's hand."""
    read = []
    batches = iter(lk.background((read.append(i) or i for i in range(100)), ahead=2))
    for taken in range(20):
        assert next(batches) == taken
        assert len(read) <= taken + 1 + 2 + 1
    batches.close()


def test_training_in_the_background_is_the_same_training():
    """Same batches, same order, same length, several epochs: the same bits."""
    ours, theirs = make_state(), make_state()
    train(classifier, ours, lk.background(make_batches()), max_epochs=3)
    train(classifier, theirs, make_batches(), max_epochs=3)
    assert all(map(torch.equal, ours.model.parameters(), theirs.model.parameters()))
    assert threads() == []


def test_an_error_while_loading_surfaces_where_its_batch_would_have_come():
    """What the loader raised is raised in the loop, after the batches before it."""

    def broken():
        yield from make_batches(2)
        raise OSError("disk gone")

    state = make_state()
    with pytest.raises(OSError, match="disk gone"):
        train(classifier, state, lk.background(broken()))
    assert state.step == 2
    assert threads() == []


def test_leaving_the_loop_ends_the_thread():
    """A break, and an iterator that is dropped, leave no thread behind."""
    state = make_state()
    with lk.run(classifier, state, lk.background(make_batches()), max_epochs=9) as updates:
        for _ in updates:
            break
    assert threads() == []


def test_a_loader_with_workers_is_ended_with_the_thread():
    """Workers of a DataLoader that is read in the background end with it."""
    inputs, labels = make_batches(1, 12)[0]
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=3, num_workers=1)
    state = make_state()
    with lk.run(classifier, state, lk.background(loader), max_steps=2) as updates:
        assert len(list(updates)) == 2
    assert threads() == []


def test_length_and_samplers_stay_visible():
    """What run and others ask data for is that of the data; without a length it has none."""
    loader = DataLoader(TensorDataset(torch.zeros(9, 4)), batch_size=3)
    data = lk.background(loader)
    assert len(data) == 3
    assert data.sampler is loader.sampler
    assert copy.copy(data) == data
    with pytest.raises(TypeError):
        len(lk.background(iter([])))


def test_reading_nothing_ahead_is_an_error():
    """A number of batches below 1 is refused when it is written."""
    with pytest.raises(lk.UsageError, match="ahead = 0"):
        lk.background([], ahead=0)
