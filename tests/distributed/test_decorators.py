"""The decorators of the textbook's rarer features, on several ranks and on one."""

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal
from test_parity import whole
from torch.nn import functional as F

from pool import POOL
from problems import make_batches, make_state


def function(state, batch):
    return F.cross_entropy(state.model(batch[0]), batch[1])


def scarce(state, batch):
    """On rank 1 there is room for three samples only."""
    if state.ranks.rank == 1 and len(batch[0]) > 3:
        raise torch.OutOfMemoryError("out of memory")
    return function(state, batch)


MADE = {
    "sam": lambda: lk.with_sam(0.1),
    "adaptive sam": lambda: lk.with_sam(1.0, adaptive=True),
    "swa": lambda: lk.with_swa(2),
    "averages that warm up": lambda: lk.with_ema(0.9, warmup=10),
    "checkpointing": lambda: lk.with_activation_checkpointing("[13]"),
    "double": lambda: lk.with_precision("64-true"),
}


def trained(decorator, strategy, batches, accumulate=1, step=function):
    state = make_state()
    layers = [decorator, lk.with_clip(0.05), lk.with_nonfinite("skip")]
    layers += [lk.distributed(strategy)] if strategy else []
    layers += [lk.with_grad_accum(accumulate)] if accumulate > 1 else []
    [*lk.run(lk.compose(*layers)(step), state, batches, max_epochs=2)]
    return state


def on_ranks(name, strategy):
    state = trained(MADE[name](), strategy, make_batches(6))
    kept = {
        name: whole(state.features[name].weights) for name in {"swa", "ema"} & {*state.features}
    }
    return whole(state.state_dict()["model"]), kept


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MADE)
def test_weights_and_averages_equal_those_of_one_process(strategy, name):
    """Two ranks end where one process ends with the micro-batches of both in a window."""
    (weights, averages), _ = POOL.run(2, on_ranks, name, strategy)
    state = trained(MADE[name](), None, make_batches(6), accumulate=2)
    for key, value in state.state_dict()["model"].items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)
    for feature in {"swa", "ema"} & state.features.keys():
        for key, value in state.features[feature].weights.items():
            torch.testing.assert_close(averages[feature][key], value, rtol=1e-5, atol=1e-6)


def resumed(folder, strategy):
    """Averages that were read into a state which had none, used and moved on, and their like."""
    data, step = make_batches(12), lk.compose(lk.with_swa(2), lk.distributed(strategy))(function)
    straight, stopped, state = make_state(), make_state(), make_state(seed=9)
    lk.run(step, straight, data, max_epochs=2).finish()
    lk.run(step, stopped, data, max_steps=4).finish()
    with lk.Checkpointer(folder) as checkpoints:
        checkpoints.save(stopped)
    step.set_up(state)
    with lk.Checkpointer(folder) as checkpoints:
        checkpoints.restore(state)
    with lk.ema_weights(state, "swa"):
        swapped = whole(state.model.state_dict())
    lk.run(step, state, data, max_epochs=2).finish()
    found = [whole(s.features["swa"].weights) for s in (stopped, state, straight)]
    return swapped, *found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_averages_that_had_begun_go_on_after_a_restore(strategy, tmp_path):
    """Each rank has its part of them, also where the state had none before it was restored."""
    (swapped, before, after, straight), _ = POOL.run(2, resumed, str(tmp_path), strategy)
    assert_bitwise_equal(swapped, before)
    assert_bitwise_equal(after, straight)


def noisy():
    state = trained(lk.with_grad_noise(0.01), "ddp", make_batches(6))
    return state.model.state_dict()


def test_replicas_draw_the_same_noise():
    """Gradient noise leaves the replicas equal, though their generators differ."""
    one, other = POOL.run(2, noisy)
    assert_bitwise_equal(one, other)


def auto():
    state = trained(lk.with_microbatch("auto"), "ddp", make_batches(6, size=8), step=scarce)
    return state.model.state_dict(), state.features["microbatch"].most


def test_ranks_agree_on_a_size_that_fits():
    """Where one rank runs out of memory all halve, and the weights are the plain ones."""
    (one, most), (other, also) = POOL.run(2, auto)
    assert (most, also) == (2, 2)
    assert_bitwise_equal(one, other)
    state = trained(lk.wrap(name="nothing"), None, make_batches(6, size=8), accumulate=2)
    for key, value in state.model.state_dict().items():
        torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-6)


def thawing():
    freeze = lk.with_freeze({0: "0", 1: []})
    state = trained(freeze, lk.DDP(find_unused_parameters=True), make_batches(6))
    return state.model.state_dict()


def test_replicas_thaw_together():
    """A part that thaws in the second epoch has its gradients averaged from then on."""
    one, other = POOL.run(2, thawing)
    assert_bitwise_equal(one, other)
    state = trained(lk.with_freeze({0: "0", 1: []}), None, make_batches(6), accumulate=2)
    for key, value in state.model.state_dict().items():
        torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-6)
