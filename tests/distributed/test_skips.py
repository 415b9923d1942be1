"""What is not finite on one rank is skipped, or raised, on all of them."""

import time

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal, train_by_hand
from test_parity import batches as labelled
from test_parity import close, token_classifier, whole
from test_parity import fresh as plain_state
from torch import nn

from pool import POOL
from problems import make_batches

SCALE = 2.0**10


class Edged(nn.Module):
    """A head, and an edge, of whose gradients only the last row can become non-finite."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.edge = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs))), self.edge(inputs)


def fresh(dtype=torch.float32, momentum=0.9):
    torch.manual_seed(0)
    model = Edged().to(dtype)
    return lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum))


def rooted(state, batch):
    """A finite loss; where the switch is 0 the root has no derivative, in one row of the edge."""
    inputs, labels, switch = batch
    logits, edge = state.model(inputs)
    root = (switch * edge[:, 2].float().square().sum()).sqrt()
    return nn.functional.cross_entropy(logits, labels) + 0.01 * root


def batches(count, bad=(), dtype=torch.float32):
    made = make_batches(count, dtype=dtype)
    return [(*batch, torch.tensor(float(i not in bad))) for i, batch in enumerate(made)]


def scaled(strategy, data):
    step = lk.compose(
        lk.with_amp("fp16", init_scale=SCALE), lk.with_ema(0.9), lk.distributed(strategy)
    )(rooted)
    state = fresh()
    found = [
        (bool(state.applied), state.features["amp"].get_scale())
        for state in lk.run(step, state, data, max_epochs=1)
    ]
    return found, whole(state.model.state_dict()), whole(state.features["ema"].weights)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2"])
def test_an_overflow_on_one_rank_lowers_the_scale_of_all(strategy):
    """Batch 5 is rank 1's third: all skip that update, and go on with half the loss scale."""
    data = batches(12, bad={5})
    (found, weights, averages), (also, others, too) = POOL.run(2, scaled, strategy, data)
    assert found == also
    assert found == [(True, SCALE)] * 2 + [(False, SCALE / 2)] + [(True, SCALE / 2)] * 3
    assert_bitwise_equal(weights, others)
    assert_bitwise_equal(averages, too)
    state = fresh()
    hand = train_by_hand(rooted, state, data, accumulate=2, amp="fp16", init_scale=SCALE, ema=0.9)
    assert hand.applied == [applied for applied, _ in found]
    for name, value in state.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(averages[name], hand.averages[name], rtol=2e-3, atol=2e-4)


def watched(strategy, policy, data):
    step = lk.compose(
        lk.with_nonfinite(policy), lk.with_clip(1.0), lk.with_ema(0.9), lk.distributed(strategy)
    )(rooted)
    state = fresh(torch.float64)
    applied, error = [], ""
    try:
        for state in lk.run(step, state, data, max_epochs=1):
            applied.append(bool(state.applied))
    except lk.NonFiniteError as found:
        error = str(found)
    return applied, error, whole(state.model.state_dict())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1"])
def test_a_nan_on_one_rank_is_skipped_by_all(strategy):
    """A gradient that is NaN on rank 1 only, of a loss that is finite, costs all one update."""
    data = batches(12, bad={5}, dtype=torch.float64)
    (applied, _, weights), (also, _, others) = POOL.run(2, watched, strategy, "skip", data)
    assert applied == also == [True, True, False, True, True, True]
    assert_bitwise_equal(weights, others)
    state = fresh(torch.float64)
    train_by_hand(rooted, state, data, accumulate=2, clip=1.0, skip_nonfinite=True)
    close(weights, state.model.state_dict())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1"])
def test_a_nan_on_one_rank_is_an_error_on_all(strategy, record_property):
    """Every rank raises before the update is made, and the weights are those before it."""
    data, began = batches(12, bad={5}, dtype=torch.float64), time.monotonic()
    found = POOL.run(2, watched, strategy, "raise", data)
    record_property("seconds", f"{time.monotonic() - began:.1f}")
    record_property("outcome", f"each rank: {found[0][1].splitlines()[0]:.70}")
    state = fresh(torch.float64)
    train_by_hand(rooted, state, data[:4], accumulate=2, clip=1.0)
    for applied, error, weights in found:
        assert applied == [True, True]
        assert 'with_nonfinite("raise") at update 3' in error
        close(weights, state.model.state_dict())


def empty_here_and_there(strategy, policy, data):
    step = lk.compose(lk.with_nonfinite(policy), lk.distributed(strategy))(token_classifier)
    state = plain_state()
    applied = [bool(state.applied) for state in lk.run(step, state, data, max_epochs=1)]
    return applied, whole(state.model.state_dict())


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1"])
def test_a_rank_without_a_token_votes_with_the_others(strategy, policy):
    """It finds no fault, but all have to vote; an update is skipped where none has a token."""
    data = labelled(8, holes=True)
    for _, labels in data[4:6]:
        labels[:] = -100
    (applied, weights), (also, others) = POOL.run(2, empty_here_and_there, strategy, policy, data)
    assert applied == also == [True, True, False, True]
    assert_bitwise_equal(weights, others)
    state = plain_state()
    train_by_hand(token_classifier, state, [*data[:4], *data[6:]], accumulate=2)
    close(weights, state.model.state_dict())
