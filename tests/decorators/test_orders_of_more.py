"""The order of the decorators that change memory, noise, freezing and averages changes no bit."""

import itertools

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal

from problems import classifier, halving, make_batches, make_state, weighted_classifier

STACKS = {
    "micro-batches and freezing": [
        lk.with_microbatch(3), lk.with_amp("fp16", init_scale=2.0**17), lk.with_clip(0.3),
        lk.with_ema(0.9, warmup=10), lk.with_freeze({0: "0", 1: []}),
    ],
    "optimizer in backward": [
        lk.with_optimizer_in_backward(), lk.with_activation_checkpointing("[03]"),
        lk.with_amp("bf16"), lk.with_schedule(lr=halving), lk.with_ema(0.9),
    ],
    "noise and mean": [
        lk.with_grad_noise(0.1), lk.with_grad_accum(2), lk.with_amp("fp16", init_scale=2.0**20),
        lk.with_swa(2), lk.with_nonfinite("skip"),
    ],
    "offload and SAM": [
        lk.with_activation_offload(), lk.with_sam(0.1), lk.with_microbatch("auto"),
        lk.with_clip(0.3), lk.with_precision("bf16-true"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("function", [classifier, weighted_classifier])
def test_orders_train_bit_for_bit_the_same(stack, function):
    """Weights, optimizer, averages, scale and random numbers are equal in each seventh order."""
    first, applied = None, []
    for order in itertools.islice(itertools.permutations(STACKS[stack]), 0, None, 7):
        state = make_state("dropout")
        torch.manual_seed(2)
        for state in lk.run(lk.compose(*order)(function), state, make_batches(4), max_epochs=6):
            applied.append(bool(state.applied))
        first = first or state
        assert_bitwise_equal(state.state_dict(), first.state_dict(), str(order))
    assert any(applied)
    assert all(applied) == ("fp16" not in str(STACKS[stack]))
