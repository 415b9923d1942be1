"""An engine of somebody else's in place of backward and update, where DeepSpeed's would stand."""

import attrs
import loopkit as lk
import pytest
import torch
import torch.distributed as dist
from loopkit.parallel.group_ranks import GroupRanks, start_equal
from loopkit.testing import assert_bitwise_equal, train_by_hand
from test_parity import batches, classifier, close, fresh, token_classifier

from pool import POOL
from problems import halving


class Engine:
    """What such engines are: `backward(loss)` and `step()`, and the gradients are their own.

    It keeps them in one flat buffer, sums them up over ranks by itself, and updates. The
    parameters have no gradient that anybody else could see.
    """

    def __init__(self, state):
        self.optimizer, self.steps = state.optimizer, 0
        self.parameters = state.parameters()
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64)

    def backward(self, loss):
        found = torch.autograd.grad(loss, self.parameters)
        self.flat += torch.cat([gradient.flatten() for gradient in found])

    def step(self, divisor):
        dist.all_reduce(self.flat)
        self.flat /= dist.get_world_size() * divisor
        at = 0
        for p in self.parameters:
            p.grad = self.flat[at : at + p.numel()].view_as(p)
            at += p.numel()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clear()
        self.steps += 1

    def clear(self):
        self.flat.zero_()


@attrs.define(eq=False, kw_only=True)
class EngineRanks(GroupRanks):
    """Ranks of which the engine averages the gradients."""

    engine: Engine


@attrs.frozen
class EngineStrategy:
    """Ranks start from equal weights; each has its part of the data."""

    def set_up(self, state):
        start_equal(state.model)
        return EngineRanks(rank=dist.get_rank(), size=dist.get_world_size(), engine=Engine(state))


def engine_backward(state, loss):
    state.ranks.engine.backward(loss)


def engine_update(state, recompute):
    if state.verdict is not None and state.verdict.item():
        state.ranks.engine.clear()
        return False
    divisor = state.outcome.divisor()
    state.ranks.engine.step(1.0 if divisor is None else float(divisor))
    return True


with_engine = lk.compose(
    lk.own(name="engine", backward=engine_backward, apply=engine_update),
    lk.distributed(EngineStrategy()),
)


def driven(accumulate, function, data):
    state = fresh(seed=dist.get_rank() if dist.is_initialized() else 0)
    layers = [lk.with_schedule(lr=halving), lk.with_ema(0.9), lk.with_nonfinite("skip")]
    layers += [lk.with_grad_accum(accumulate)] * (accumulate > 1)
    step = lk.compose(*layers, with_engine)(function)
    made = [bool(state.applied) for state in lk.run(step, state, data, max_epochs=1)]
    assert state.ranks.engine.steps == sum(made)
    return state.model.state_dict(), state.features["ema"].weights, made


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("function", [classifier, token_classifier])
def test_an_engine_owns_backward_and_update(function, accumulate):
    """Windows, weights, schedule, averages go on round it; the weights are the plain loop's."""
    data = batches(8 * accumulate, holes=function is token_classifier)
    (weights, averages, _), (others, _, _) = POOL.run(2, driven, accumulate, function, data)
    assert_bitwise_equal(weights, others)
    state = fresh()
    hand = train_by_hand(function, state, data, accumulate=2 * accumulate, lr=halving, ema=0.9)
    close(weights, state.model.state_dict())
    close(averages, hand.averages)


def holed(state, batch):
    """A loss that is not a number where the inputs are large."""
    loss = classifier(state, batch)
    return loss * float("nan") if batch[0].abs().max() > 10 else loss


def test_an_engine_skips_with_all_ranks():
    """A loss that is NaN on one rank is seen before the engine's update, and skipped by all."""
    data = batches(8)
    data[5] = (data[5][0] * 100, data[5][1])
    (weights, _, made), (others, _, also) = POOL.run(2, driven, 1, holed, data)
    assert made == also == [True, True, False, True]
    assert_bitwise_equal(weights, others)
    state = fresh()
    train_by_hand(holed, state, data, accumulate=2, lr=halving, skip_nonfinite=True)
    close(weights, state.model.state_dict())


def test_a_step_is_no_strategy():
    """A step has a set_up as well: given in the strategy's place it is an error all the same."""
    with pytest.raises(lk.UsageError, match="a strategy of type Step"):
        lk.distributed(lk.train_step(classifier))
