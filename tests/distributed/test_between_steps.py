"""What happens between steps, on several ranks: they stop, ask and try out together."""

import copy
import itertools
import math

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from torch.utils.data import DataLoader, DistributedSampler

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


def _number(state, batch):
    state.model(torch.zeros(1, 4))
    return {"loss": batch.float().mean(), "number": batch.flatten()[0]}


def _limited(limits, stream):
    step, state = lk.distributed(stream=stream)(classifier), make_state()
    step.set_up(state)
    numbers, rank, world = torch.arange(11), state.ranks.rank, state.ranks.size
    data = {
        "list": lambda: [*numbers.view(-1, 1)],
        "loader": lambda: DataLoader(numbers, 1),
        "stream": lambda: iter(numbers.view(-1, 1)),
        "sharded": lambda: iter(numbers.view(-1, 1)[rank::world]),
    }
    kinds = {"split": ["list", "loader", "stream"], "sharded": ["sharded"]}[stream]
    found = {}
    for kind, limit in itertools.product(kinds, limits):
        outputs = lk.predict(_number, state, data[kind](), limit_batches=limit)
        scores = lk.evaluate(_number, state, data[kind](), limit_batches=limit)
        found[kind, limit] = scores, [int(output["number"]) for output in outputs]
    return found


@pytest.mark.parametrize("stream", ["split", "sharded"])
@pytest.mark.parametrize("world", [2, 3])
def test_a_limit_of_an_evaluation_counts_the_batches_of_all_ranks(world, stream):
    """The first n batches are evaluated and predicted, each once, whatever the number of ranks."""
    limits = [1, 2, 4, 7, 50]
    for found in POOL.run(world, _limited, limits, stream):
        for (kind, limit), (scores, predicted) in found.items():
            numbers = [*range(11)][:limit]
            assert (kind, limit, predicted) == (kind, limit, numbers)
            assert scores["loss"] == pytest.approx(sum(numbers) / len(numbers))


def _fractions(_):
    step, state = lk.distributed()(classifier), make_state()
    step.set_up(state)
    rank, world = state.ranks.rank, state.ranks.size
    own = DataLoader(range(12), 1, sampler=DistributedSampler(range(12), world, rank, False))
    dealt = [*torch.arange(12).view(-1, 1)]
    return [len([*lk.predict(_number, state, d, limit_batches=0.5)]) for d in (own, dealt)]


def test_a_fraction_of_an_evaluation_is_one_of_all_batches():
    """Half of 12 batches are 6, shared out by loopkit or by a sampler."""
    assert POOL.run(2, _fractions, None) == [[6, 6]] * 2


def _goes_on(evaluates):
    step, state, data = lk.distributed()(classifier), make_state(), make_batches(8)
    for state in lk.run(step, state, data, max_epochs=1):
        if state.step == 2:
            break
    if evaluates:
        lk.evaluate(classifier, state, make_batches(3))
    steps = [state.step for state in lk.run(step, state, data, max_epochs=1)]
    with pytest.raises(lk.DataError, match="shuffle"):
        lk.predict(classifier, state, DataLoader([*range(8)], 2, shuffle=True))
    return steps


def test_an_evaluation_between_two_runs_leaves_the_place_in_the_data():
    """A run that goes on after one goes on within the epoch; and predict refuses to shuffle."""
    assert POOL.run(2, _goes_on, True) == POOL.run(2, _goes_on, False) == [[3, 4]] * 2
