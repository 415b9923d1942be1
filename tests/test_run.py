"""The loop: its clock, its end, and going on where it stopped."""

import inspect
import itertools
import math
import time
from pathlib import Path

import attrs
import loopkit as lk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.testing import assert_bitwise_equal
from torch import nn

from feeds import (
    LIMITS,
    WINDOWS,
    Counted,
    Seen,
    SizedStream,
    Stream,
    clock,
    finish,
    loader,
    mean_output,
    numbered,
    stepped,
    tiny_state,
)


class Endless:
    """Batches without an end."""

    def __iter__(self):
        return map(torch.ones, itertools.repeat((1, 1)))


# The clock


KINDS = {
    "list": numbered,
    "tuple": lambda n: tuple(numbered(n)),
    "loader": loader,
    "loader with workers": lambda n: loader(n, 2),
    "iterable without length": lambda n: Counted(numbered(n)),
    "stream": lambda n: loader(n, kind=Stream),
    "stream with workers": lambda n: loader(n, 2, kind=Stream),
    "sized stream": lambda n: loader(n, kind=SizedStream),
    "sized stream with workers": lambda n: loader(n, 2, kind=SizedStream),
    "bare stream": Stream,
    "bare sized stream": SizedStream,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_clock_is_right_at_every_update(kind):
    """Step, epoch, batch, samples and epoch_end are those of a count by hand, for any data."""
    state = tiny_state()
    found = [clock(s) for s in lk.run(mean_output, state, KINDS[kind](3), max_epochs=2)]
    by_hand = [(3 * e + b, e, b, 3 * e + b, b == 3) for e in range(2) for b in range(1, 4)]
    assert found == by_hand
    assert clock(state) == (6, 2, 0, 6, False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_clock_counts_micro_batches_of_windows(kind):
    """With windows of 2 over 5 batches the third update ends the epoch, at batch 5."""
    state, step = tiny_state(), lk.with_grad_accum(2)(mean_output)
    found = [clock(s) for s in lk.run(step, state, KINDS[kind](5), max_epochs=2)]
    assert found[:3] == [(1, 0, 2, 2, False), (2, 0, 4, 4, False), (3, 0, 5, 5, True)]
    assert found[3:] == [(4, 1, 2, 7, False), (5, 1, 4, 9, False), (6, 1, 5, 10, True)]


def test_samples_are_counted_whatever_the_size_of_a_batch():
    """Samples add up over batches of unequal size."""
    data = [torch.ones(size, 1) for size in (4, 4, 1)]
    assert [s.samples for s in lk.run(mean_output, tiny_state(), data, max_epochs=1)] == [4, 8, 9]


@attrs.frozen
class Halves:
    """A batch cut in two, for less memory."""

    def __call__(self, state, batch):
        return batch.chunk(2), 2


def test_a_batch_that_a_step_cuts_up_counts_once():
    """state.batch counts what came from the data, however many forwards the step makes of it."""
    step = lk.own(split=Halves())(mean_output)
    updates = lk.run(step, tiny_state(), numbered(3, size=4), max_epochs=2)
    assert [s.batch for s in updates] == [1, 2, 3, 1, 2, 3]


# Where it ends


@given(length=st.integers(1, 9), window=WINDOWS, limits=st.lists(LIMITS, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_total_steps_is_what_happens(length, window, limits):
    """Over sized data total_steps is state.step at the end, also where a run goes on mid-epoch."""
    state, data = tiny_state(), numbered(length)
    for written in limits:
        updates = lk.run(stepped(window), state, data, **written)
        expected = updates.total_steps
        for _ in updates:
            assert updates.total_steps == expected
        assert state.step == expected


@given(
    length=st.integers(1, 7),
    window=WINDOWS,
    limit=st.one_of(st.none(), st.integers(1, 9)),
    stop=st.integers(1, 12),
)
@settings(max_examples=80, deadline=None)
def test_data_without_a_length_is_run_as_data_with_one(length, window, limit, stop):
    """The same updates, clock and order come from a list and from what has no length."""
    found = []
    for data in (numbered(length), Counted(numbered(length))):
        state, seen, clocks = tiny_state(), Seen(), []
        for _ in range(2):
            run = lk.run(stepped(window, seen), state, data, max_epochs=3, limit_batches=limit)
            for s in run:
                clocks.append(clock(s))
                if s.step == stop:
                    break
        found.append((seen.numbers, clocks, clock(state), state.model.weight.item()))
    assert found[0] == found[1]


def test_limits_are_totals_of_the_clock():
    """A second run with the same limits has nothing left to do, and one with more goes on."""
    state, data = tiny_state(), numbered(4)
    for limits, step in (({"max_steps": 3}, 3), ({"max_steps": 3}, 3), ({"max_epochs": 2.5}, 10),
                         ({"max_epochs": 1}, 10), ({"max_epochs": 3}, 12)):  # fmt: skip
        updates = lk.run(mean_output, state, data, **limits)
        assert updates.total_steps == step
        assert [s.step for s in updates][-1:] in ([], [step])
        assert state.step == step


def test_a_limit_that_shrinks_below_the_position_ends_the_epoch():
    """After 4 of 6 batches, a limit of 3 batches begins the next epoch."""
    for data in (numbered(6), Counted(numbered(6))):
        state, seen = tiny_state(), Seen()
        next(lk.run(lk.with_grad_accum(4)(seen), state, data))
        assert [clock(s)[:3] for s in lk.run(seen, state, data, max_epochs=2, limit_batches=3)] == [
            (2, 1, 1), (3, 1, 2), (4, 1, 3)
        ]  # fmt: skip
        assert seen.numbers == [0, 1, 2, 3, 0, 1, 2]


def test_a_fraction_that_rounds_up_to_the_whole_epoch_is_one():
    """0.9 epochs of 3 batches are all 3, so the epoch ends, and the next run begins another."""
    state, data = tiny_state(), numbered(3)
    assert [s.epoch_end for s in lk.run(mean_output, state, data, max_epochs=0.9)][-1]
    assert [s.epoch for s in lk.run(mean_output, state, data, max_epochs=2)] == [1, 1, 1]


def test_a_fraction_ends_an_epoch_that_is_shorter_than_its_limit():
    """Limited data that turns out shorter than the limit ends its epochs itself."""
    data = Counted(numbered(1))
    updates = lk.run(mean_output, tiny_state(), data, max_epochs=1.5, limit_batches=4)
    assert [(s.epoch, s.epoch_end) for s in updates] == [(0, True), (1, True)]


def test_max_time_ends_a_run_after_the_update_that_passes_it():
    """The run ends soon after its time, at an update's end, and another may go on."""
    state, data = tiny_state(), Endless()
    for max_time in (0.05, {"seconds": 0.05}, "00:00:00:0.05"):
        begun, before = time.monotonic(), state.step
        for _ in lk.run(mean_output, state, data, max_time=max_time):
            time.sleep(0.01)
        assert time.monotonic() - begun >= 0.05
        assert before < state.step <= before + 6  # however slow the machine, each takes 10 ms
    updates = lk.run(mean_output, state, data, max_time=3600, max_steps=state.step + 2)
    assert len([*updates]) == 2


def test_time_runs_from_the_first_update_on():
    """Between making a run and starting it no time is lost; one update is always made."""
    updates = lk.run(mean_output, tiny_state(), numbered(5), max_time=0.01, max_epochs=1)
    time.sleep(0.02)
    assert next(updates).step == 1


def test_total_steps_is_unknown_where_only_a_break_ends_it():
    """Without a length, or without a limit, total_steps is None; with max_steps it is that."""
    state, endless = tiny_state(), Endless()
    assert lk.run(mean_output, state, numbered(3)).total_steps is None
    assert lk.run(mean_output, state, numbered(3), max_time=1).total_steps is None
    assert lk.run(mean_output, state, numbered(3), max_epochs=math.inf).total_steps is None
    assert lk.run(mean_output, state, endless, max_epochs=3).total_steps is None
    assert lk.run(mean_output, state, endless, max_epochs=3, max_steps=7).total_steps == 7
    assert lk.run(mean_output, state, endless, max_epochs=3, limit_batches=5).total_steps == 15


@pytest.mark.timeout(10)
def test_total_steps_of_epochs_without_end_is_found_at_once():
    """Epochs that max_steps cuts off are not counted one by one."""
    run = lk.run(mean_output, tiny_state(), numbered(3), max_epochs=10**12, max_steps=100)
    assert run.total_steps == 100


# The iterator


def test_a_run_is_an_iterator_and_a_context_manager():
    """next(run) is one update, a for loop goes on from there, and the block's end closes it."""
    state = tiny_state()
    with lk.run(mean_output, state, numbered(5), max_epochs=2) as updates:
        assert next(updates) is state
        assert iter(updates) is iter(updates)
        assert [s.step for s in itertools.islice(updates, 3)] == [2, 3, 4]
        for s in updates:
            assert s is state
            break
    assert [*updates] == []
    assert state.step == 5


def test_interleaved_runs_do_not_disturb_each_other():
    """Two runs in turns train as each alone, bit for bit, over one loader or two."""
    shared = loader(6)

    def both(*pairs):
        runs = (lk.run(step, state, data, max_epochs=2) for step, state, data in pairs)
        finish(itertools.zip_longest(*runs))
        saved = [state.state_dict() for _, state, _ in pairs]
        return [{k: v for k, v in part.items() if k not in {"data", "rng"}} for part in saved]

    one = lk.compose(lk.with_grad_accum(2), lk.with_ema(0.9))(mean_output)
    two = lk.with_clip(0.1)(mean_output)
    for data in ((shared, shared), (numbered(6), numbered(4))):
        alone = both((one, tiny_state(1), data[0])) + both((two, tiny_state(2), data[1]))
        together = both((one, tiny_state(1), data[0]), (two, tiny_state(2), data[1]))
        assert_bitwise_equal(together, alone)


def by_a_for_loop(step):
    """The usual way."""
    for _ in lk.run(step, tiny_state(), numbered(4), max_epochs=1):
        pass


def by_next(step):
    """The run's updates one by one, by hand."""
    updates = lk.run(step, tiny_state(), numbered(4), max_epochs=1)
    while next(updates, None) is not None:
        pass


def by_calls(step):
    """The step itself, by hand."""
    state = tiny_state()
    for window in lk.windows(numbered(4), 2):
        step(state, window)


@pytest.mark.parametrize("loop", [by_a_for_loop, by_next, by_calls])
def test_at_most_six_library_frames_lie_between_loop_and_step_function(loop):
    """A traceback from the step function of a fully decorated step stays readable."""
    depths = []

    @lk.with_amp("bf16")
    @lk.with_grad_accum(2)
    @lk.with_clip(1.0)
    @lk.with_ema(0.9)
    @lk.with_schedule(lr=lambda n: 0.1, weight_decay=lambda n: 0.0)
    @lk.with_freeze(())
    def step(state, batch):
        between = itertools.takewhile(lambda f: f.function != loop.__name__, inspect.stack()[1:])
        files = [Path(frame.filename) for frame in between]
        assert all(Path(lk.__file__).parent in file.parents for file in files)
        depths.append(len(files))
        return mean_output(state, batch)

    loop(step)
    assert len(depths) == 4
    assert max(depths) <= 6


def test_what_is_no_state_is_refused_when_the_run_is_made():
    """Arguments in the wrong order are an error at once."""
    with pytest.raises(lk.UsageError, match="a state of type Linear"):
        lk.run(mean_output, nn.Linear(1, 1), numbered(1))
