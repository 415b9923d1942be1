"""Going on where a run stopped: nothing is repeated, and nothing is lost."""

import loopkit as lk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from feeds import (
    LIMITS,
    WINDOWS,
    Counted,
    Seen,
    Stream,
    clock,
    finish,
    loader,
    mean_output,
    numbered,
    stepped,
    tiny_state,
)


@given(length=st.integers(1, 9), window=WINDOWS, limits=LIMITS, stop=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_a_run_that_goes_on_ends_where_the_first_would(length, window, limits, stop):
    """Broken off anywhere and run again, the same batches come in the same order, once each."""
    data, straight, broken = numbered(length), Seen(), Seen()
    for _ in lk.run(stepped(window, straight), tiny_state(), data, **limits):
        pass
    state = tiny_state()
    for state in lk.run(stepped(window, broken), state, data, **limits):
        if state.step == stop:
            break
    resumed = lk.run(stepped(window, broken), state, data, **limits)
    expected = resumed.total_steps
    finish(resumed)
    assert broken.numbers == straight.numbers
    assert state.step == expected


def test_going_on_with_the_same_data_continues_the_epoch():
    """After a break the rest of the epoch follows; nothing is repeated and nothing is lost."""
    for data in (numbered(5), loader(5), loader(5, kind=Stream), Counted(numbered(5))):
        state, seen = tiny_state(), Seen()
        for state in lk.run(seen, state, data, max_epochs=2):
            if state.step == 3:
                break
        ends = [s.epoch_end for s in lk.run(seen, state, data, max_epochs=2)]
        assert seen.numbers == [0, 1, 2, 3, 4] * 2
        assert ends == [False, True, False, False, False, False, True]


def test_going_on_with_an_iterator_loses_nothing():
    """The batch that was read ahead of a break is the first one after it."""
    for window in (None, 2):
        data, state, seen = iter(numbered(9)), tiny_state(), Seen()
        for stop in (1, 3, 4):
            for state in lk.run(stepped(window, seen), state, data, max_epochs=1):
                if state.step == stop:
                    break
        finish(lk.run(stepped(window, seen), state, data, max_epochs=1))
        assert seen.numbers == [*range(9)]


def test_other_data_begins_anew():
    """Data that is another object starts at its first batch, in the same epoch."""
    state, seen = tiny_state(), Seen()
    next(lk.run(seen, state, numbered(4)))
    updates = lk.run(seen, state, numbered(2, start=10), max_epochs=1)
    assert updates.total_steps == 3
    assert [clock(s)[:3] for s in updates] == [(2, 0, 1), (3, 0, 2)]
    assert seen.numbers == [0, 10, 11]


def test_equal_data_is_other_data():
    """Which data it is, is a matter of identity: the batches are never compared."""
    batches = numbered(3, size=2)
    state, seen = tiny_state(), Seen()
    next(lk.run(seen, state, [*batches]))
    assert len([*lk.run(seen, state, [b.clone() for b in batches], max_epochs=1)]) == 3
    next(lk.run(seen, state, [1 * batches[0]]))


def test_other_data_after_the_end_of_an_epoch_is_the_next_epoch():
    """A break at an epoch's end finishes the epoch."""
    state = tiny_state()
    for state in lk.run(mean_output, state, numbered(3)):
        if state.epoch_end:
            break
    assert (state.epoch, state.epoch_end) == (0, True)
    assert [s.epoch for s in lk.run(mean_output, state, numbered(2), max_epochs=2)] == [1, 1]


def test_a_restored_state_goes_on_with_whatever_data_comes():
    """A state that was loaded mid-epoch skips the batches that it has been trained on."""
    state, again, seen = tiny_state(), tiny_state(), Seen()
    finish(lk.run(mean_output, state, numbered(5), max_steps=7))
    again.load_state_dict(state.state_dict())
    updates = lk.run(seen, again, loader(5), max_epochs=2)
    assert updates.total_steps == 10
    assert len([*updates]) == 3
    assert seen.numbers == [2, 3, 4]


def test_an_exception_in_the_step_leaves_a_state_to_go_on_from():
    """The failed update is not counted; its batch comes again."""
    seen, fail = Seen(), [True]

    def fragile(state, batch):
        if int(batch[0, 0]) == 2 and fail.pop() if fail else False:
            raise RuntimeError("once")
        return seen(state, batch)

    state, data = tiny_state(), numbered(4)
    with pytest.raises(RuntimeError, match="once"):
        for _ in lk.run(fragile, state, data, max_epochs=1):
            pass
    assert clock(state) == (2, 0, 2, 2, False)
    for _ in lk.run(fragile, state, data, max_epochs=1):
        pass
    assert seen.numbers == [0, 1, 2, 3]


def test_a_run_with_nothing_left_to_do_says_so_in_the_log():
    """One line where the state has come to the end already, and none where it trains."""
    lines, data = [], numbered(3)
    logger.enable("loopkit")
    sink = logger.add(lines.append, format="{message}", level="INFO")
    try:
        state = tiny_state()
        lk.run(Seen(), state, data, max_epochs=2).finish()
        assert lines == []
        assert [*lk.run(Seen(), state, data, max_epochs=2)] == []
        assert len(lines) == 1
        assert "step=6, epoch=2" in lines[0]
        assert "no update is left" in lines[0]
        lk.run(Seen(), state, numbered(3), max_steps=4).finish()
        assert len(lines) == 2
    finally:
        logger.remove(sink)
        logger.disable("loopkit")


def test_other_data_with_the_same_epochs_is_warned_of():
    """Where a run over other data makes no update by its epochs, and training was made before."""
    state, seen = tiny_state(), Seen()
    lk.run(seen, state, numbered(3), max_epochs=2).finish()
    with pytest.warns(UserWarning, match=r"max_epochs=2\) over other data .* max_epochs=3") as told:
        assert [*lk.run(seen, state, loader(4), max_epochs=2)] == []
    assert told[0].filename == __file__
    assert [s.step for s in lk.run(seen, state, loader(4), max_epochs=3)] == [7, 8, 9, 10]


def test_a_finished_training_that_is_run_again_is_not_warned_of():
    """Restored at its end, in two phases or one, over parts with a total of updates: all fine."""

    def train(state):
        for epochs in (1, 2):  # two phases
            lk.run(mean_output, state, numbered(3), max_epochs=epochs).finish()
        for _ in range(3):  # parts of the data
            lk.run(mean_output, state, numbered(3), max_steps=8).finish()
        return state

    first, again = train(tiny_state()), tiny_state()
    again.load_state_dict(first.state_dict())
    assert train(again).step == first.step == 8
