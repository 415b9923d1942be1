"""The order of decorators never changes the numbers."""

import functools
import itertools

import attrs
import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal, train_by_hand

from problems import halving, make_batches, make_state, weighted_classifier


@attrs.frozen
class CountBackwards:
    """A user's layer: it counts the backward passes in the state."""

    inner: lk.Backward
    key: str

    def __call__(self, state, loss):
        state.extras[self.key] = state.extras.get(self.key, 0) + 1
        return self.inner(state, loss)


@attrs.frozen
class Fourfold:
    """A user's layer: the gradients of four times the loss."""

    inner: lk.Backward

    def __call__(self, state, loss):
        return self.inner(state, loss * 4)


@attrs.frozen
class Centralise:
    """A user's layer: gradients without their mean."""

    inner: lk.Transform

    def __call__(self, state):
        for parameter in state.parameters_with_grad():
            if parameter.ndim > 1:
                parameter.grad.sub_(parameter.grad.mean(dim=1, keepdim=True))
        return self.inner(state)


@attrs.frozen
class Scale:
    inner: lk.Transform
    factor: float = 2.0

    def __call__(self, state):
        for gradient in state.gradients():
            gradient.mul_(self.factor)
        return self.inner(state)


with_count = lk.wrap(backward=functools.partial(CountBackwards, key="backwards"))
with_four = lk.wrap(backward=Fourfold)

STACK = [
    lk.with_ema(0.8),
    lk.with_clip(0.3),
    lk.with_grad_accum(3),
    lk.with_amp("fp16", init_scale=2.0**14),
    lk.with_schedule(lr=halving),
    with_four,
]


@pytest.fixture(scope="module")
def by_hand():
    """The hand-written loop with all that the stack does."""
    state = make_state("dropout")

    def fourfold(state, batch):
        output = weighted_classifier(state, batch)
        return {**output, "loss": output["loss"] * 4}

    torch.manual_seed(2)
    found = train_by_hand(
        fourfold, state, make_batches(11), accumulate=3, amp="fp16", init_scale=2.0**14, clip=0.3,
        lr=halving, ema=0.8,
    )  # fmt: skip
    assert not all(found.applied)
    assert any(found.applied)
    return state, found


@pytest.mark.parametrize("block", range(6))
def test_all_720_orders_of_six_decorators_equal_the_hand_written_loop(by_hand, block):
    """Six decorators, one of them a user's, train bit for bit the same in every order."""
    theirs, found = by_hand
    for order in itertools.permutations(STACK):
        if order[0] is not STACK[block]:
            continue
        state = make_state("dropout")
        torch.manual_seed(2)
        for _ in lk.run(
            lk.compose(*order)(weighted_classifier), state, make_batches(11), max_epochs=1
        ):
            pass
        assert_bitwise_equal(state.model.state_dict(), theirs.model.state_dict(), str(order))
        assert_bitwise_equal(
            state.optimizer.state_dict(), theirs.optimizer.state_dict(), str(order)
        )
        assert_bitwise_equal(state.features["ema"].weights, found.averages, str(order))
        assert state.features["amp"].state_dict() == found.scaler.state_dict()


def test_a_users_decorator_runs_once_for_each_micro_batch():
    """A layer round backward is called for each micro-batch, wherever it stands."""
    for order in itertools.permutations([with_count, lk.with_grad_accum(3), lk.with_amp("bf16")]):
        state = make_state()
        for _ in lk.run(
            lk.compose(*order)(weighted_classifier), state, make_batches(7), max_epochs=1
        ):
            pass
        assert state.extras["backwards"] == 7


def test_of_two_layers_on_one_place_the_nearest_runs_first_and_printing_shows_it():
    """Gradients are changed first by the decorator nearest to the function."""

    @lk.with_clip(1e9)
    @lk.wrap(name="scale", transform=Scale)
    def scaled_first(state, batch):
        return weighted_classifier(state, batch)

    clipped_first = lk.wrap(name="scale", transform=Scale)(lk.with_clip(1e9)(weighted_classifier))
    first, second = make_state(), make_state()
    scaled_first(first, make_batches(1)[0])
    clipped_first(second, make_batches(1)[0])
    assert float(first.grad_norm) == pytest.approx(2 * float(second.grad_norm))
    assert "transform   scale > with_clip(1000000000.0) > default" in str(scaled_first)
    assert "transform   with_clip(1000000000.0) > scale > default" in str(clipped_first)


def test_the_readmes_decorator_does_what_it_says():
    """Centralised gradients have mean zero in each row, and the step still learns."""
    step = lk.wrap(transform=Centralise)(weighted_classifier)
    state = make_state()
    step(state, make_batches(1)[0])
    for parameter in state.parameters_with_grad():
        if parameter.ndim > 1:
            assert parameter.grad.mean(dim=1).abs().max() < 1e-7
