"""How often: when it is time, on any state, and the same after a resume."""

import datetime
import itertools
from fractions import Fraction

import loopkit as lk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from problems import classifier, make_batches, make_state


def due_steps(interval, state=None, step=classifier, batches=8, loop=None, **limits):
    """The updates of a run after which it was time."""
    due = lk.every(interval)
    run = lk.run(
        step, state or make_state(), make_batches(batches), **(limits or {"max_epochs": 3})
    )
    return [state.step for state in run if due(state)]


CASES = {
    5: [5, 10, 15, 20],
    "5 steps": [5, 10, 15, 20],
    "1 update": [*range(1, 25)],
    "epoch": [8, 16, 24],
    "2 epochs": [16],
    "0.25ep": [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24],
    "0.3ep": [3, 5, 8, 10, 12, 15, 17, 20, 22, 24],
    "1.5ep": [12, 24],
    "20 samples": [4, 8, 12, 16, 20, 24],
    "1.2e1 samples": [3, 5, 8, 10, 12, 15, 17, 20, 22, 24],
    datetime.timedelta(microseconds=1): [*range(1, 25)],
    "0.000001s": [*range(1, 25)],
    "10 hours": [],
}


@pytest.mark.parametrize("interval", CASES)
def test_it_is_time_when_one_would_say_so(interval):
    """Over three epochs of eight batches of five, the updates are those counted by hand."""
    assert due_steps(interval) == CASES[interval]


@pytest.mark.parametrize("interval", [5, "epoch", "2ep", "0.25ep", "0.3ep", "20 samples"])
@pytest.mark.parametrize("cut", [1, 7, 8, 13])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_resumed_run_is_answered_as_the_whole(interval, cut, accumulate):
    """Stopped anywhere and restored into a fresh state, the answers are the uninterrupted run's."""
    step = lk.with_grad_accum(3)(classifier) if accumulate else classifier
    whole = due_steps(interval, step=step)
    state, fresh = make_state(), make_state()
    first = due_steps(interval, state, step, max_epochs=3, max_steps=cut)
    fresh.load_state_dict(state.state_dict())
    assert not lk.every("20 samples")(fresh)
    assert first + due_steps(interval, fresh, step, max_epochs=3) == whole


@settings(deadline=None)
@given(
    numerator=st.integers(1, 40), denominator=st.integers(1, 20),
    size=st.integers(1, 5), batches=st.integers(1, 9),
)  # fmt: skip
def test_parts_of_epochs_are_counted_exactly(numerator, denominator, size, batches):
    """With windows of any size, it is time at the first update at or after each multiple."""
    interval = Fraction(numerator, denominator).limit_denominator(8) or Fraction(1, 8)
    text = f"{float(interval)!r}ep"
    exact, length = Fraction(repr(float(interval))), batches
    step, state = lk.with_grad_accum(size)(classifier), make_state()
    due = lk.every(text)
    ends, found = [], []
    for state in lk.run(step, state, make_batches(batches, size=1), max_epochs=4):
        ends.append(Fraction(state.epoch * length + state.batch, length))
        found += [len(ends) - 1] * due(state)
    marks = [exact * k for k in range(1, int(ends[-1] / exact) + 1)]
    wanted = sorted({next(i for i, end in enumerate(ends) if end >= mark) for mark in marks})
    assert found == wanted


def sparse(step, state, by, **limits):
    """A generator of one's own: it yields after every `by`-th update, and at the end."""
    run = lk.run(step, state, make_batches(8), **limits)
    for updated in run:
        if updated.step % by == 0 or updated.step == run.total_steps:
            yield updated


@pytest.mark.parametrize("interval", [5, 50, "2ep", "0.3ep", "37 samples"])
@pytest.mark.parametrize("by", [7, 16])
@pytest.mark.parametrize("cut", [0, 21])
@pytest.mark.parametrize("with_run", [False, True])
def test_a_save_is_due_when_a_multiple_lies_among_the_updates_of_a_look(
    interval, by, cut, with_run, tmp_path
):
    """Looked at every so many updates, what is saved is the first look after each multiple.

    So it is when it was stopped at a look and restored into a fresh state; parts of epochs may
    be saved once more then, where the iterator does not say which state it will yield.
    """
    cut = cut // by * by
    units = {"2ep": 16, "0.3ep": Fraction(24, 10)}
    size = units.get(interval, Fraction(37, 5) if interval == "37 samples" else interval)
    looks = sorted({*range(by, 41, by), 40})
    wanted = [n for o, n in itertools.pairwise([0, *looks]) if n // size > o // size]
    found = []

    class Noting(lk.Checkpointer):
        def save(self, state, scores=None):
            found.append(state.step)
            return super().save(state, scores)

    for end in sorted({cut, 40} - {0}):
        state = make_state()
        with Noting(tmp_path, every=interval, keep_last=None) as checkpoints:
            checkpoints.restore(state)
            states = sparse(classifier, state, by, max_steps=end)
            if with_run:
                states = lk.adaptor(lambda run: sparse(classifier, run.state, by, max_steps=end))(
                    lk.run(classifier, state, make_batches(8))
                )
            for _ in checkpoints.wrap(states):
                pass
    extra = {*found} - {*wanted, cut, 40}
    assert sorted({*found} - extra) == sorted({*wanted, cut, 40} - {0})
    if not with_run and cut and interval == "0.3ep":
        assert extra <= {next(look for look in looks if look > cut)}
    else:
        assert not extra


@pytest.mark.parametrize("interval", ["50 steps", "3ep", "260 samples"])
def test_asked_rarely_it_answers_for_all_updates_since_the_moment_it_is_given(interval):
    """Asked after each 7th: without a moment where a multiple lies on one of those, else rarely."""
    due, since, state = lk.every(interval), lk.Moment(), make_state()
    alone, found = [], []
    for state in lk.run(classifier, state, make_batches(8), max_steps=420):
        if state.step % 7 == 0:
            alone += [state.step] * due(state)
            found += [state.step] * due(state, since)
            since = lk.Moment.of(state)
    every = {"50 steps": 50, "3ep": 24, "260 samples": 52}[interval]
    assert alone == [n for n in range(7, 421, 7) if n % every == 0]
    assert found == [-(-n // 7) * 7 for n in range(every, 421, every)]


def test_a_log_is_due_when_a_multiple_lies_among_the_updates_of_a_look(tmp_path):
    """Looked at every 7th update, a log of every 10 has the first look after each ten."""
    state = make_state()
    with lk.Log(tmp_path, "csv") as log:
        for _ in log.wrap(sparse(classifier, state, 7, max_steps=42), every=10):
            pass
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [14, 21, 35, 42]


def test_a_limited_epoch_is_the_epoch():
    """With limit_batches the parts are those of the batches that are taken."""
    assert due_steps("0.5ep", max_epochs=2, limit_batches=4) == [2, 4, 6, 8]


def test_asking_twice_gives_one_answer_and_serves_any_number_of_states():
    """What is read off the clock has no memory: one `every` answers for two states at once."""
    due, states = lk.every("20 samples"), [make_state(), make_state()]
    runs = [lk.run(classifier, state, make_batches(8), max_epochs=1) for state in states]
    for _ in zip(*runs, strict=True):
        assert [due(states[0]), due(states[1])] == [due(states[1]), due(states[0])]
        assert due(states[0]) == (states[0].step % 4 == 0)


@pytest.mark.parametrize("interval", [5, "20 samples"])
def test_it_serves_a_loop_by_hand(interval):
    """Updates and samples count where no run is."""
    state, step, due = make_state(), lk.train_step(classifier), lk.every(interval)
    found = [state.step for batch in make_batches(12) if due(step(state, batch))]
    assert found == ([5, 10] if interval == 5 else [4, 8, 12])


def test_the_first_update_can_count():
    """first=True adds the first update of all, and not that of a resumed run."""
    due, state = lk.every(4, first=True), make_state()
    batches = make_batches(8)
    assert [s.step for s in lk.run(classifier, state, batches, max_epochs=1) if due(s)] == [1, 4, 8]
    assert [s.step for s in lk.run(classifier, state, batches, max_epochs=2) if due(s)] == [12, 16]


def test_nothing_is_due_before_the_first_update():
    """A state that has seen no update has come to no multiple."""
    state = make_state()
    assert not any(lk.every(i)(state) for i in (1, "epoch", "1 sample"))


def test_time_counts_from_when_it_was_last_due(monkeypatch):
    """It is time when the interval has passed, then not again before it has passed anew."""
    now = itertools.count(4, 4)
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    due, state = lk.every("10s"), make_state()
    assert [due(state) for _ in range(7)] == [False, False, True] * 2 + [False]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("1.5 min", 90), ("2h", 7200), ("1 day", 86400), ("3 Minutes", 180)]
)  # fmt: skip
def test_units_of_time(text, seconds):
    """Times are read as they are written."""
    assert lk.every(text).count == seconds


def test_it_prints_as_it_was_written():
    """What is shown can be written."""
    assert repr(lk.every("0.25ep", first=True)) == "every('0.25ep', first=True)"


U = lk.UsageError
WRONG = {
    "a number as text, without a unit": (lambda: lk.every("500"), U, "without a unit", '"500 steps"'),
    "a fraction, without a unit": (lambda: lk.every(0.25), U, "0.25, without a unit", '"0.25ep"'),
    "a unit that is misspelt": (lambda: lk.every("10 minuts"), U, "'minuts'", "'minute'; known are"),
    "another unit that is misspelt": (lambda: lk.every("2 epohcs"), U, "'epohcs'", "'epoch'; known are"),
    "a unit that is none": (lambda: lk.every("3 blocks"), U, "'blocks'", "one of d, day"),
    "no interval at all": (lambda: lk.every("now and then"), U, "'now and then'", '"epoch"'),
    "nothing": (lambda: lk.every(""), U, "''", '"epoch"'),
    "two points": (lambda: lk.every("1.2.3 ep"), U, "'1.2.3'", '"0.25ep"'),
    "zero": (lambda: lk.every(0), U, "= 0", "1 or more"),
    "zero epochs": (lambda: lk.every("0ep"), U, "no interval above 0", '"0.25ep"'),
    "negative time": (lambda: lk.every("-5min"), U, "no interval above 0", '"10min"'),
    "a negative timedelta": (
        lambda: lk.every(datetime.timedelta(-1)), U, "no interval above 0", "a timedelta",
    ),
    "half a sample": (lambda: lk.every("2.5 samples"), U, "2.5 samples", "a whole number"),
    "a bool": (lambda: lk.every(True), U, "bool", "an int"),
    "something else": (lambda: lk.every([3]), U, "list", "an int"),
    "parts of an epoch by hand": (
        lambda: lk.every("0.5ep")(lk.train_step(classifier)(make_state(), make_batches(1)[0])),
        lk.DataError, "no run gives", 'lk.every("epoch")',
    ),
    "parts of an epoch of data without a length": (
        lambda: [lk.every("0.5ep")(s) for s in lk.run(classifier, make_state(), iter(make_batches(2)))],
        lk.DataError, "data with a length", "lk.every(500)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_interval_is_an_error_that_teaches(case):
    """What is no interval says what was found, the near match, and what to write."""
    wrong, kind, found, remedy = WRONG[case]
    with pytest.raises(kind) as caught:
        wrong()
    assert found in caught.value.wrote + " " + caught.value.found
    assert remedy in caught.value.instead
