"""What a run reads of its data, and when; and that no loader's workers are left behind."""

import itertools

import loopkit as lk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.testing import assert_bitwise_equal
from torch import nn
from torch.utils.data import DataLoader, Dataset

from feeds import (
    Broken,
    Counted,
    Samples,
    Seen,
    SizedStream,
    Stream,
    children,
    finish,
    loader,
    mean_output,
    numbered,
    tiny_state,
)

# Empty data, and data that lies about its length


@pytest.mark.parametrize(
    "data",
    [
        [],
        DataLoader(Samples(3), batch_size=4, drop_last=True),
        Counted([]),
        DataLoader(Stream(0)),
        DataLoader(SizedStream(0)),
        iter([]),
        (x for x in ()),
    ],
    ids=["list", "loader", "iterable", "stream", "sized stream", "iterator", "generator"],
)
@pytest.mark.parametrize("limits", [{}, {"max_epochs": 2}, {"max_steps": 3}, {"limit_batches": 5}])
def test_empty_data_is_an_error(data, limits):
    """No batch at all is a DataError that says so, and never a loop without an end."""
    with pytest.raises(lk.DataError, match=r"no batch.*\n.*at least one batch"):
        finish(lk.run(mean_output, tiny_state(), data, **limits))


@pytest.mark.parametrize("step", [mean_output, lk.with_grad_accum(2)(mean_output)])
def test_a_length_that_is_too_long_is_an_error(step):
    """Data that ends before its length is a DataError with both numbers, after what there was."""
    state = tiny_state()
    with pytest.raises(lk.DataError, match=r"len\(data\) >= 5: found its end after 4 batches"):
        finish(lk.run(step, state, Counted(numbered(4), 5), max_epochs=2))
    assert state.batch == 4


@pytest.mark.parametrize("step", [mean_output, lk.with_grad_accum(2)(mean_output)])
def test_a_length_that_is_too_short_is_an_error(step):
    """Data that goes on after its length is a DataError at the epoch's end."""
    state = tiny_state()
    with pytest.raises(lk.DataError, match=r"len\(data\) = 3: found more batches"):
        finish(lk.run(step, state, Counted(numbered(4), 3), max_epochs=2))
    assert (state.epoch, state.batch, state.epoch_end) == (0, 3, True)


def test_a_limit_forgives_a_length_that_is_too_short():
    """With limit_batches the rest of the data is nobody's concern."""
    state = tiny_state()
    finish(lk.run(mean_output, state, Counted(numbered(4), 3), max_epochs=2, limit_batches=2))
    assert state.step == 4


# Iterators


def test_an_iterator_that_ends_is_no_second_epoch():
    """Where a second epoch was asked for, an iterator that was read is an error with a remedy."""
    for limits in ({"max_epochs": 2}, {"max_steps": 7}):
        state = tiny_state()
        with pytest.raises(lk.DataError, match=r"an iterator, which can be read once.*\n.*anew"):
            finish(lk.run(mean_output, state, iter(numbered(3)), **limits))
        assert state.step == 3


def test_an_iterator_without_limits_runs_to_its_end():
    """Without a limit, or for one epoch, the run ends with the iterator, and says epoch_end."""
    for limits in ({}, {"max_epochs": 1}, {"max_steps": 3}, {"max_time": 60}):
        updates = lk.run(mean_output, tiny_state(), iter(numbered(3)), **limits)
        assert [s.epoch_end for s in updates] == [False, False, True]


def test_limited_epochs_of_an_iterator_follow_each_other():
    """limit_batches cuts one iterator into epochs, without losing a batch at the cut."""
    seen = Seen()
    updates = lk.run(seen, tiny_state(), iter(numbered(9)), max_epochs=3, limit_batches=2)
    assert [(s.epoch, s.epoch_end) for s in updates] == [
        (epoch, end) for epoch in range(3) for end in (False, True)
    ]
    assert seen.numbers == [0, 1, 2, 3, 4, 5]


# Reading ahead


@given(
    count=st.integers(1, 9), window=st.integers(1, 4), limit=st.integers(1, 12), sized=st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_nothing_is_read_ahead_but_one_batch_of_unsized_data(count, window, limit, sized):
    """At each update as much was read as was taken; without a length one batch more."""
    data = Counted(numbered(count), count if sized else None)
    step = lk.with_grad_accum(window)(mean_output)
    for state in lk.run(step, tiny_state(), data, max_epochs=1, limit_batches=limit):
        more = not sized and state.batch < min(count, limit)
        assert data.read == state.batch + more
    assert data.read == min(count, limit)


def test_a_micro_batch_of_sized_data_is_read_when_its_turn_comes():
    """A window is not gathered before the step: one micro-batch at a time is in memory."""
    data, found = Counted(numbered(6), 6), []

    def step(state, batch):
        found.append(data.read)
        return mean_output(state, batch)

    finish(lk.run(lk.with_grad_accum(3)(step), tiny_state(), data, max_epochs=1))
    assert found == [1, 2, 3, 4, 5, 6]


class Noise(Dataset):
    """Samples drawn from the global generator when they are read."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return torch.rand(3) + index


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_random_numbers_are_drawn_in_the_order_of_the_plain_loop(window, shuffle):
    """Shuffling, samples and dropout take the same numbers as in a loop by hand, bit for bit."""

    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        return model, torch.optim.Adam(model.parameters()), DataLoader(Noise(), 2, shuffle=shuffle)

    model, optimizer, data = fresh()
    for _ in range(2):
        batches = iter(data)
        for left in range(6, 0, -window):
            optimizer.zero_grad()
            for batch in itertools.islice(batches, window):
                loss = model(batch).square().mean()
                (loss / min(window, left) if min(window, left) > 1 else loss).backward()
            optimizer.step()
        assert next(batches, None) is None
    drawn = torch.rand(3)

    ours, optimizer, data = fresh()

    @lk.with_grad_accum(window)
    def step(state, batch):
        return state.model(batch).square().mean()

    finish(lk.run(step, lk.TrainState(ours, optimizer), data, max_epochs=2))
    assert_bitwise_equal(ours.state_dict(), model.state_dict())
    assert torch.equal(torch.rand(3), drawn)


# Workers


class Wrapped:
    """A loader within the user's own iterable."""

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        for batch in self.inner:
            yield batch * 1


def stop_by_break(start):
    for state in start():
        if state.step == 2:
            break


def stop_by_exception_in_the_body(start):
    for state in start():
        if state.step == 2:
            raise RuntimeError("body")


def stop_by_close(start):
    updates = start()
    next(updates)
    updates.close()


def stop_in_a_block(start):
    with start() as updates:
        for _ in updates:
            raise RuntimeError("body")


def stop_by_a_limit(start):
    finish(start())


def failing(state, batch):
    if state.step == 2:
        raise RuntimeError("step")
    return mean_output(state, batch)


@pytest.mark.parametrize("wrap", [lambda data: data, Wrapped], ids=["loader", "wrapped"])
@pytest.mark.parametrize(
    ("step", "limits", "stop"),
    [
        (mean_output, {}, stop_by_break),
        (mean_output, {}, stop_by_exception_in_the_body),
        (mean_output, {}, stop_by_close),
        (mean_output, {}, stop_in_a_block),
        (mean_output, {"max_steps": 2}, stop_by_a_limit),
        (mean_output, {"max_epochs": 1, "limit_batches": 2}, stop_by_a_limit),
        (mean_output, {"max_epochs": 1}, stop_by_a_limit),
        (failing, {}, stop_by_a_limit),
        (lk.with_grad_accum(2)(mean_output), {}, stop_by_break),
        (lk.with_grad_accum(2)(failing), {}, stop_by_a_limit),
    ],
)
def test_no_worker_is_left_behind(step, limits, stop, wrap):
    """However a run ends, its loader's workers have ended, though a traceback be kept."""
    before, kept = children(), None
    try:
        stop(lambda: lk.run(step, tiny_state(), wrap(loader(8, 1)), **limits))
    except RuntimeError as error:
        kept = error
    assert children() <= before
    del kept


def test_a_run_that_is_held_ends_its_workers_when_it_is_dropped():
    """After a break a run that has a name waits to go on; without one it is gone."""
    before = children()
    updates = lk.run(mean_output, tiny_state(), loader(8, 1))
    for _ in updates:
        break
    assert len(children() - before) == 1
    assert next(updates).step == 2
    del updates
    assert children() <= before


def test_a_sample_that_cannot_be_read_ends_the_workers():
    """A worker's error comes through, and no worker stays."""
    before = children()
    with pytest.raises(LookupError, match="sample 3 is gone") as kept:
        finish(lk.run(mean_output, tiny_state(), loader(8, 1, kind=Broken)))
    assert children() <= before
    del kept


def test_persistent_workers_stay_their_loaders():
    """Workers that were asked to persist outlive the run, and serve the next one."""
    before, data, seen = children(), loader(4, 1, persistent_workers=True), Seen()
    state = tiny_state()
    for state in lk.run(seen, state, data):
        if state.step == 2:
            break
    workers = children() - before
    assert len(workers) == 1
    finish(lk.run(seen, state, data, max_epochs=2))
    assert children() - before == workers
    assert seen.numbers == [0, 1, 2, 3, 0, 1, 2, 3]


def test_an_iterator_that_was_given_stays_its_owners():
    """A loader's iterator that the user made is not ended by a break; it goes on."""
    batches, seen = iter(loader(4, 1)), Seen()
    state = tiny_state()
    for state in lk.run(seen, state, batches, max_epochs=1):
        if state.step == 2:
            break
    finish(lk.run(seen, state, batches, max_epochs=1))
    assert seen.numbers == [0, 1, 2, 3]
