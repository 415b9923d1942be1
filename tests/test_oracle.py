"""Composed steps against the loop written by hand, bit for bit."""

import itertools

import loopkit as lk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.testing import assert_bitwise_equal, train_by_hand

from problems import (
    MODELS,
    OPTIMIZERS,
    classifier,
    halving,
    make_batches,
    make_state,
    train,
    weighted_classifier,
)

# Each decorator, and the argument that asks the hand-written loop for the same.
FEATURES = {
    "bf16": (lk.with_amp("bf16"), {"amp": "bf16"}),
    "fp16": (lk.with_amp("fp16", init_scale=2.0**16), {"amp": "fp16", "init_scale": 2.0**16}),
    "accumulation": (lk.with_grad_accum(3), {"accumulate": 3}),
    "clip": (lk.with_clip(0.3), {"clip": 0.3}),
    "clip value": (lk.with_clip_value(0.05), {"clip_value": 0.05}),
    "schedule": (lk.with_schedule(lr=halving), {"lr": halving}),
    "ema": (lk.with_ema(0.7), {"ema": 0.7}),
    "skip": (lk.with_nonfinite("skip"), {"skip_nonfinite": True}),
    "raise": (lk.with_nonfinite("raise"), {}),
    "anomaly": (lk.with_anomaly_detection(check_nan=False), {}),
}


def stepped(optimizer):
    """The optimizer's state without what it made for parameters that it has never stepped.

    A fused optimizer that skips its first update on the device makes its (zero) state before.
    """
    state_dict = optimizer.state_dict()
    held = {k: v for k, v in state_dict["state"].items() if v.get("step", 1) != 0}
    return {**state_dict, "state": held}


def assert_same_training(names, function, model="mlp", optimizer="adamw", batches=None):
    """The composed step and the hand-written loop end in the same bits."""
    batches = make_batches() if batches is None else batches
    ours, theirs = make_state(model, optimizer), make_state(model, optimizer)
    step = lk.compose(*(FEATURES[name][0] for name in names))(function)
    losses, applied = [], []
    torch.manual_seed(2)
    for state in lk.run(step, ours, batches, max_epochs=1):
        losses.append(state.loss.item())
        applied.append(bool(state.applied))

    wanted = {key: value for name in names for key, value in FEATURES[name][1].items()}
    torch.manual_seed(2)
    found = train_by_hand(function, theirs, batches, **wanted)

    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict(), "model")
    assert_bitwise_equal(stepped(ours.optimizer), stepped(theirs.optimizer), "optimizer")
    assert applied == found.applied
    assert losses == pytest.approx(found.losses, rel=1e-6, nan_ok=True)
    if "ema" in names:
        assert_bitwise_equal(ours.features["ema"].weights, found.averages, "averages")
    if "fp16" in names:
        assert ours.features["amp"].state_dict() == found.scaler.state_dict()


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_decorator_alone_equals_the_hand_written_loop(name, optimizer):
    """A step with one decorator trains as the loop written by hand, bit for bit."""
    assert_same_training([name], classifier, optimizer=optimizer)


# A step has one precision, and of two that clip the nearest runs first: tested elsewhere.
PAIRS = [
    pair
    for pair in itertools.permutations(sorted(FEATURES.keys() - {"raise"}), 2)
    if set(pair) != {"bf16", "fp16"} and pair != ("clip", "clip value")
]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_all_pairs_in_both_orders_equal_the_hand_written_loop(pair):
    """Two decorators in either order train as the loop written by hand, bit for bit."""
    assert_same_training(pair, classifier)


@settings(max_examples=60, deadline=None)
@given(
    names=st.sets(st.sampled_from(sorted(set(FEATURES) - {"raise", "clip value", "anomaly"}))),
    function=st.sampled_from([classifier, weighted_classifier]),
    model=st.sampled_from(sorted(MODELS)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    count=st.integers(1, 9),
    order=st.randoms(use_true_random=False),
)
def test_any_composition_equals_the_hand_written_loop(
    names, function, model, optimizer, count, order
):
    """Any set of decorators in any order, on any model, optimizer and tail, trains bit for bit."""
    names = sorted(names - ({"bf16"} if "fp16" in names else set()))
    order.shuffle(names)
    assert_same_training(names, function, model, optimizer, make_batches(count))


def test_training_without_decorators_equals_the_hand_written_loop():
    """A plain function driven by run trains as the loop written by hand, over several epochs."""
    ours, theirs = make_state("dropout"), make_state("dropout")
    train(classifier, ours, make_batches(), max_epochs=3)
    torch.manual_seed(2)
    train_by_hand(classifier, theirs, make_batches() * 3)
    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict())
