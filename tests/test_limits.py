"""Limits: what users write, as numbers."""

import datetime
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.errors import DataError, UsageError
from loopkit.limits import Limits, batch_limit, known_length, seconds

from feeds import Counted, SizedStream, loader


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (90, 90.0),
        (0.5, 0.5),
        (math.inf, math.inf),
        (datetime.timedelta(minutes=2), 120.0),
        ("00:00:01:30", 90.0),
        ("02:03:04:05.5", 2 * 86400 + 3 * 3600 + 4 * 60 + 5.5),
        ({"hours": 2}, 7200.0),
        ({"days": 1, "minutes": 1.5, "seconds": 1}, 86491.0),
    ],
)
def test_a_time_can_be_written_in_four_ways(written, meant):
    """Seconds, a timedelta, "DD:HH:MM:SS" and a dict of units all become seconds."""
    assert seconds(written) == meant


@pytest.mark.parametrize(
    "written",
    [0, -1, math.nan, True, None, "", "90", "1:30", "a:b:c:d", "00:00:00:00", "1:2:3:4:5",
     {}, {"years": 1}, {"hours": -1}, {"hours": math.nan}, {"hours": math.inf},
     {"days": 10**12}, {"hours": "2"}, datetime.timedelta(0), [1]],
)  # fmt: skip
def test_a_time_that_cannot_be_right_says_how_to_write_one(written):
    """What is no time above zero is an error that shows all four ways."""
    with pytest.raises(UsageError, match=r"max_time=.*\n.*timedelta, \"DD:HH:MM:SS\", or a dict"):
        seconds(written)


def test_a_length_is_taken_only_where_it_is_certain():
    """A loader over an iterable dataset estimates its length, and a TypeError means none."""
    assert known_length([1, 2]) == 2
    assert known_length(loader(5)) == 5
    assert known_length(loader(5, kind=SizedStream)) is None
    assert known_length(Counted([1])) is None
    assert known_length(x for x in [1]) is None


@given(length=st.integers(1, 10_000), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_fraction_k_of_n_is_k_batches(length, data):
    """limit_batches=k/n takes k of n batches, whatever the floats round to."""
    k = data.draw(st.integers(1, length))
    assert batch_limit(range(length), k / length) == k


@given(length=st.integers(0, 300), fraction=st.floats(0.0001, 1), number=st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_a_limit_never_exceeds_the_data(length, fraction, number):
    """Of n batches a fraction takes at least one if there is one, and a number at most n."""
    assert min(1, length) <= batch_limit(range(length), fraction) <= length
    assert batch_limit(range(length), number) == min(number, length)
    assert batch_limit(range(length), None) == length


@pytest.mark.parametrize("limit", [0, -1, 0.0, 1.5, -0.1, math.nan, math.inf, True, "3"])
def test_a_limit_of_batches_that_cannot_be_right_is_refused(limit):
    """What is neither a fraction in (0, 1] nor a number of batches is an error that shows it."""
    with pytest.raises(UsageError, match="limit_batches="):
        batch_limit(range(10), limit)


def test_a_fraction_needs_a_length():
    """A fraction of data without a length is an error that proposes a number."""
    with pytest.raises(UsageError, match=r"without a length \(Counted\)\n.*limit_batches=100"):
        batch_limit(Counted([1, 2]), 0.5)
    assert batch_limit(Counted([1, 2]), 5) == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, value) for n in ("max_epochs", "max_steps") for value in (0, -1, math.nan, "3", True)]
    + [("max_steps", 2.0)],
)
def test_epochs_and_steps_that_cannot_be_right_are_refused(name, value):
    """The error names the limit and shows its value, when the run is made."""
    written = {"max_epochs": None, "max_steps": None} | {name: value}
    with pytest.raises(UsageError, match=name):
        Limits.of([1], **written, max_time=None, limit_batches=None)


@pytest.mark.parametrize("limit", [None, 3, 0.5])
def test_data_of_length_zero_is_refused_at_once(limit):
    """Empty sized data is a DataError before anything runs, whatever the limit."""
    with pytest.raises(DataError, match=r"no batches in it.*\n.*drop_last"):
        Limits.of([], 1, None, None, limit)


@given(
    epochs=st.integers(1, 8), parts=st.integers(1, 64), batches=st.integers(1, 64), data=st.data()
)
@settings(max_examples=200, deadline=None)
def test_a_fractional_limit_takes_its_share_of_the_last_epoch(epochs, parts, batches, data):
    """K / n epochs of n batches are k batches, the last of them in a shorter epoch."""
    k = data.draw(st.integers(1, epochs * batches))
    limits = Limits.of(range(batches), k / batches, None, None, None)
    taken = [limits.batches_in(epoch) for epoch in range(epochs + 1)]
    assert sum(taken) == k
    assert all(t == batches for t in taken[: k // batches])


def test_a_fraction_of_an_epoch_needs_a_length():
    """max_epochs=1.5 of data without a length is an error; of limited data it is not."""
    with pytest.raises(UsageError, match=r"max_epochs=1.5.*without a length"):
        Limits.of(Counted([1]), 1.5, None, None, None)
    assert Limits.of(Counted([1]), 1.5, None, None, 4).batches_in(1) == 2
    assert Limits.of(Counted([1]), 2.0, None, None, None).batches_in(1) is None
