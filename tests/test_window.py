"""Windows: the micro-batches of one update."""

import loopkit as lk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.window import Ahead


@given(items=st.lists(st.integers(), max_size=30), n=st.integers(1, 12), lazy=st.booleans())
@settings(max_examples=100, deadline=None)
def test_windows_hold_everything_once_and_in_order(items, n, lazy):
    """No item is lost or repeated, no window is empty, and only the last may be shorter."""
    cut = [list(w.batches) for w in lk.windows(iter(items) if lazy else items, n)]
    assert [item for window in cut for item in window] == items
    assert all(len(window) == n for window in cut[:-1])
    assert all(1 <= len(window) <= n for window in cut)


def test_windows_read_no_further_than_their_end():
    """The batches of the next window are not read before it is asked for."""
    items = iter(range(10))
    windows = lk.windows(items, 3)
    assert next(windows).length == 3
    assert next(items) == 3


@pytest.mark.parametrize("n", [0, -1, 1.5, float("nan"), True, "2", None])
def test_windows_of_no_whole_number_are_refused(n):
    """N below 1 or not whole is an error when it is written, not when it is read."""
    with pytest.raises(lk.UsageError, match=r"windows\(data"):
        lk.windows([1, 2, 3], n)


def test_an_empty_window_is_refused():
    """An update over nothing is an error that says to skip it."""
    with pytest.raises(lk.UsageError, match="at least one micro-batch"):
        lk.Window([])


def test_the_length_of_a_lazy_window_may_be_given():
    """Where it is given, the micro-batches are passed on as they are; else one is read ahead."""
    assert lk.Window(iter("ab"), 2).micro_batches()[1] == 2
    assert lk.Window(iter("ab")).length is None
    ahead, length = lk.Window(iter("ab")).micro_batches()
    assert (list(ahead), length) == (["a", "b"], None)


@given(items=st.lists(st.integers(), max_size=8), asks=st.booleans())
@settings(max_examples=50, deadline=None)
def test_an_iterator_that_looks_ahead_knows_its_last_item(items, asks):
    """at_end is true exactly after the last item, and asking loses nothing."""
    ahead, given_out = Ahead(iter(items)), []
    assert not asks or ahead.at_end == (not items)
    for item in ahead:
        given_out.append(item)
        assert not asks or ahead.at_end == (len(given_out) == len(items))
    assert given_out == items


def test_looking_ahead_reads_one_item_and_only_when_asked():
    """An item is read at the latest possible moment, and never two beyond the one given out."""
    source = iter(range(5))
    ahead = Ahead(source)
    assert next(ahead) == 0
    assert next(source) == 1
    assert not ahead.at_end
    assert not ahead.at_end
    assert next(source) == 3
    assert list(ahead) == [2, 4]
