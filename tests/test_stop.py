"""Early stopping: when it stops, why, and that it goes on where it was."""

import math

import loopkit as lk
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from problems import classifier, make_batches, make_state

numbers = st.floats(-3, 3).map(lambda x: round(x, 1))
scores_of = st.lists(numbers | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=12)
settings = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "patience": st.integers(1, 4),
        "min_delta": st.sampled_from([0.0, 0.25, 1.0]),
        "stopping_threshold": st.none() | numbers,
        "divergence_threshold": st.none() | numbers,
        "check_finite": st.booleans(),
    }
)


def by_hand(scores, mode, patience, min_delta, **options):
    """The decisions as a careful person would write them, on scores of which low is good."""
    sign = 1 if mode == "min" else -1
    good, hopeless = options["stopping_threshold"], options["divergence_threshold"]
    best, waited = math.inf, 0
    for score in scores:
        value = sign * score
        if (
            (options["check_finite"] and not math.isfinite(score))
            or (good is not None and value < sign * good)
            or (hopeless is not None and value > sign * hopeless)
        ):
            yield True
        elif value + min_delta < best:
            best, waited = value, 0
            yield False
        else:
            waited += 1
            yield waited >= patience


@hypothesis_settings(deadline=None)
@given(scores=scores_of, options=settings)
def test_it_stops_as_one_would_by_hand(scores, options):
    """Every decision over any sequence of scores, NaN and infinity included, is the oracle's."""
    stop = lk.EarlyStopping("loss", **options)
    assert [stop({"loss": score}) for score in scores] == [*by_hand(scores, **options)]


@pytest.fixture(scope="module")
def callback():
    """Lightning's, where it is installed."""
    return pytest.importorskip("lightning.pytorch.callbacks").EarlyStopping


@hypothesis_settings(deadline=None)
@given(scores=scores_of, options=settings)
def test_it_stops_where_lightning_does(callback, scores, options):
    """Every decision is that of Lightning's callback with the same settings."""
    theirs = callback("loss", **options)
    theirs.best_score = theirs.best_score.double()
    stop = lk.EarlyStopping("loss", **options)
    for score in scores:
        current = torch.tensor(score, dtype=torch.float64)
        assert stop({"loss": score}) == theirs._evaluate_stopping_criteria(current)[0]


@hypothesis_settings(deadline=None)
@given(scores=scores_of, options=settings, cut=st.integers(0, 12))
def test_a_restored_one_goes_on(scores, options, cut):
    """Saved and restored anywhere, it decides as the one that was never interrupted."""
    whole, first, second = (lk.EarlyStopping("loss", **options) for _ in range(3))
    wanted = [whole({"loss": score}) for score in scores]
    found = [first({"loss": score}) for score in scores[:cut]]
    second.load_state_dict(first.state_dict())
    assert found + [second({"loss": score}) for score in scores[cut:]] == wanted
    assert second == whole


def test_it_is_an_extra_of_the_state(tmp_path):
    """What it has seen is in a checkpoint, and comes back into a fresh one."""
    states = []
    for _ in range(2):
        state = make_state()
        state.extras["stop"] = lk.EarlyStopping("loss", patience=2)
        states.append(state)
    states[0].extras["stop"]({"loss": 0.5})
    states[0].extras["stop"]({"loss": 0.7})
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(states[0])
        assert checkpoints.restore(states[1])
    stop = states[1].extras["stop"]
    assert (stop.best, stop.waited) == (0.5, 1)
    assert stop({"loss": 0.6})


def test_it_ends_a_run():
    """A loss that has no reason to fall further ends the loop well before its limit."""
    state, batches = make_state(), make_batches(3)
    stop = lk.EarlyStopping("loss", patience=2, min_delta=0.5)
    for state in lk.run(classifier, state, batches, max_epochs=50):
        if state.epoch_end and stop(lk.evaluate(classifier, state, batches)):
            break
    assert (state.epoch, state.step) == (2, 9)
    assert stop.reason.startswith("loss has not fallen below")


REASONS = {
    "patience": ({"patience": 1}, [1.0, 1.0], "loss has not fallen below 1 in 1 evaluation"),
    "delta": (
        {"patience": 2, "min_delta": 0.5}, [1.0, 0.8, 0.7],
        "loss has not fallen below 1 by more than 0.5 in 2 evaluations",
    ),
    "max": (
        {"mode": "max", "patience": 1}, [1.0, 0.5], "loss has not risen above 1 in 1 evaluation",
    ),
    "good": ({"stopping_threshold": 0.1}, [0.05], "loss has reached 0.05, beyond 0.1"),
    "hopeless": ({"divergence_threshold": 9}, [12.5], "loss has got to 12.5, worse than 9"),
    "NaN": ({}, [math.nan], "loss is nan"),
    "only NaN": (
        {"check_finite": False, "patience": 1}, [math.nan],
        "loss has not been a finite number in 1 evaluation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_it_says_why(case):
    """The reason names the score, the bound, and how long it waited."""
    options, scores, reason = REASONS[case]
    stop = lk.EarlyStopping("loss", **options)
    assert [stop({"loss": score}) for score in scores][-1] is True
    assert stop.reason == reason


def test_a_tensor_is_a_score():
    """A 0-d tensor counts as its number."""
    stop = lk.EarlyStopping("loss")
    stop({"loss": torch.tensor(0.5)})
    assert stop.best == 0.5


WRONG = {
    "a monitor that evaluate did not return": (
        lambda: lk.EarlyStopping("acuracy")({"accuracy": 1.0, "loss": 0.1}),
        "['accuracy', 'loss']", "'accuracy'",
    ),
    "a monitor that was a vector": (
        lambda: lk.EarlyStopping("accuracy")({"loss": 0.1}), "['loss']", "a vector is none",
    ),
    "a bare score": (lambda: lk.EarlyStopping("loss")(1.0), "a float as the scores", 'stop({"loss": score})'),
    "no name": (lambda: lk.EarlyStopping(0.5), "float as the monitor", 'EarlyStopping("loss")'),
    "a mode": (lambda: lk.EarlyStopping("loss", mode="low"), "'low'", "'min' or 'max'"),
    "no patience": (lambda: lk.EarlyStopping("loss", patience=0), "patience = 0", "1 or more"),
    "a negative delta": (lambda: lk.EarlyStopping("loss", min_delta=-1.0), "below 0", "0 or more"),
    "a delta that is none": (lambda: lk.EarlyStopping("loss", min_delta=None), "NoneType", "a number"),
    "a threshold as text": (
        lambda: lk.EarlyStopping("loss", stopping_threshold="0.1"), "str", "stopping_threshold: a number",
    ),
    "a NaN threshold": (
        lambda: lk.EarlyStopping("loss", divergence_threshold=math.nan), "float", "a number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(case):
    """Settings and scores that cannot be right say what was found and what to write."""
    wrong, found, remedy = WRONG[case]
    with pytest.raises(lk.UsageError) as caught:
        wrong()
    assert found in caught.value.wrote + caught.value.found
    assert remedy in caught.value.instead
