"""What happens between steps, on several ranks: they stop, ask and try out together."""

import copy
import math

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from pool import POOL

from problems import classifier, make_batches, make_state


def _stops(_):
    state, batches = make_state(), make_batches(8)
    stop = lk.EarlyStopping("loss", patience=2, min_delta=0.05)
    for state in lk.run(lk.distributed()(classifier), state, batches, max_epochs=30):
        if state.epoch_end and stop(lk.evaluate(classifier, state, batches)):
            break
    return state.step, stop.state_dict()


def test_ranks_stop_at_the_same_update():
    """The scores are equal on all ranks, and so is the decision."""
    first, second = POOL.run(2, _stops, None)
    assert first == second
    assert 0 < first[0] < 120


def _times(_):
    state = make_state()
    step = lk.distributed()(classifier)
    due, answers = lk.every("0.000001s"), []
    for state in lk.run(step, state, make_batches(8), max_epochs=2):
        rank = state.ranks.rank
        if rank == 1:
            due._since = math.inf  # on its own clock it is never time
        answers.append(due(state))
    return rank, answers


def test_ranks_agree_on_time():
    """What is time on one rank's clock is time on all."""
    (first, answers), (second, others) = POOL.run(2, _times, None)
    assert {first, second} == {0, 1}
    assert answers == others == [True] * 8


TRIALS = {
    "fast_dev_run": lambda *given: lk.fast_dev_run(*given, classifier, given[2], n=2).scores,
    "find_lr": lambda *given: lk.find_lr(*given, n=20, end=1e6).suggestion,
    "overfit": lambda *given: [trial.step for trial in lk.overfit(*given, 4, max_steps=5)],
    "check": lambda step, state, data: lk.debug.check(step, state, data[0], updates=3).ok,
}


def _tried(trial):
    state, data = make_state(), make_batches(8)
    step = lk.distributed()(classifier)
    next(lk.run(step, state, data, max_epochs=2))
    before = copy.deepcopy(state.state_dict())
    found = TRIALS[trial](step, state, data)
    assert_bitwise_equal(state.state_dict(), before, f"the state after {trial}")
    for _ in lk.run(step, state, data, max_epochs=2):
        pass
    return found, [p.detach().clone() for p in state.model.parameters()]


def _untried():
    state = make_state()
    for _ in lk.run(lk.distributed()(classifier), state, make_batches(8), max_epochs=2):
        pass
    return [p.detach().clone() for p in state.model.parameters()]


@pytest.mark.parametrize("trial", TRIALS)
def test_trials_run_on_several_ranks_and_leave_the_training(trial):
    """Each finds what it finds on both ranks, and the training that follows is the same."""
    (first, weights), (second, others) = POOL.run(2, _tried, trial)
    assert first == second
    wanted, _ = POOL.run(2, _untried)
    for got in (weights, others):
        assert all(map(torch.equal, got, wanted))


def _sized(_):
    with pytest.raises(lk.UsageError) as caught:
        lk.find_batch_size(
            lk.distributed()(classifier), make_state(), lambda n: make_batches(1, size=n)[0]
        )
    return str(caught.value)


def test_a_batch_size_is_not_sought_on_several_ranks():
    """One rank out of memory would leave the others waiting; it is an error that says so."""
    for message in POOL.run(2, _sized, None):
        assert "a state on 2 ranks" in message
        assert "one process" in message
