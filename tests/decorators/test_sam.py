"""Sharpness-aware minimisation against the loop written by hand."""

import itertools

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal, check_decorator
from torch import nn

from problems import classifier, cut, halving, make_batches, make_state, weighted_classifier


def by_hand(state, batches, *, rho, adaptive=False, accumulate=1, clip=None, weighted=False):
    """The paper's loop: two passes over each window, the second at the perturbed weights."""
    model, optimizer, losses = state.model, state.optimizer, []
    parameters = [*model.parameters()]

    def backward(window):
        optimizer.zero_grad()
        found = []
        for batch in window:
            output = weighted_classifier(state, batch)
            weight = output["weight"] if weighted else 1
            (output["loss"] * weight / (1 if weighted else len(window))).backward()
            found.append((output["loss"].item(), weight))
        if weighted:
            for parameter in parameters:
                parameter.grad /= sum(weight for _, weight in found)
        return sum(loss * weight for loss, weight in found) / sum(weight for _, weight in found)

    for window in cut(batches, accumulate):
        losses.append(backward(window))
        with torch.no_grad():
            slopes = [p.grad * p.abs() if adaptive else p.grad for p in parameters]
            norm = torch.stack([s.norm() for s in slopes]).norm()
            moves = [
                (s * p.abs() if adaptive else s) * (rho / (norm + 1e-12))
                for s, p in zip(slopes, parameters, strict=True)
            ]
            before = [p.clone() for p in parameters]
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.add_(move)
        backward(window)
        with torch.no_grad():
            for parameter, own in zip(parameters, before, strict=True):
                parameter.copy_(own)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return losses


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_sam_is_the_papers_loop(adaptive, accumulate, weighted):
    """Weights and losses are those of the loop by hand, over windows, short ones too, clipped."""
    rho = 1.0 if adaptive else 0.1
    batches = make_batches(7)
    for i, (_, labels) in enumerate(batches):
        labels[: i % 4] = -100
    ours, theirs = make_state(dtype=torch.float64), make_state(dtype=torch.float64)
    batches = [(x.double(), y) for x, y in batches]
    wanted = by_hand(
        theirs, batches, rho=rho, adaptive=adaptive, accumulate=accumulate, clip=0.3,
        weighted=weighted,
    )  # fmt: skip
    function = weighted_classifier if weighted else (lambda s, b: weighted_classifier(s, b)["loss"])
    step = lk.compose(
        lk.with_clip(0.3), lk.with_sam(rho, adaptive=adaptive), lk.with_grad_accum(accumulate)
    )(function)
    losses = [float(s.loss) for s in lk.run(step, ours, batches, max_epochs=1)]
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=0)
    for name, weight in ours.model.state_dict().items():
        torch.testing.assert_close(weight, theirs.model.state_dict()[name], rtol=1e-10, atol=1e-12)
    plain = make_state(dtype=torch.float64)
    [*lk.run(lk.compose(lk.with_clip(0.3), lk.with_grad_accum(accumulate))(function), plain,
             batches, max_epochs=1)]  # fmt: skip
    assert not torch.allclose(plain.model[0].weight, ours.model[0].weight, atol=1e-5)


def test_the_loss_scale_leaves_the_direction_as_it_is():
    """With any scale that is a power of two, fp16 steps to the very same weights."""
    states = [make_state() for _ in range(3)]
    for state, scale in zip(states, (1.0, 2.0**10, 2.0**14), strict=True):
        step = lk.compose(lk.with_sam(0.1), lk.with_amp("fp16", init_scale=scale))(classifier)
        [*lk.run(step, state, make_batches(6), max_epochs=1)]
    assert_bitwise_equal(states[1].model.state_dict(), states[2].model.state_dict())
    torch.testing.assert_close(states[0].model[0].weight, states[1].model[0].weight)


def test_an_overflow_skips_the_update_and_leaves_weights_and_statistics():
    """Infinite gradients of the first pass never reach weights or BatchNorm; the scale falls."""
    state = make_state("conv")
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    step = lk.compose(lk.with_sam(0.1), lk.with_amp("fp16", init_scale=2.0**40))(classifier)
    step(state, make_batches(1)[0])
    assert not state.applied
    assert state.features["amp"].get_scale() == 2.0**39
    for name, value in state.model.state_dict().items():
        assert value.isfinite().all()
        if "running" not in name and "num" not in name:
            assert torch.equal(value, before[name])


def test_batchnorm_sees_the_first_pass_only():
    """Running statistics are those of one pass at the weights themselves."""
    state, plain = make_state("conv", "sgd"), make_state("conv", "sgd")
    batch = make_batches(1)[0]
    lk.with_sam(0.5)(classifier)(state, batch)
    lk.train_step(classifier)(plain, batch)
    ours, theirs = state.model[2], plain.model[2]
    assert_bitwise_equal(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert not torch.equal(ours.weight, theirs.weight)


def test_all_orders_give_the_same_bits():
    """SAM among fp16, accumulation, clipping, schedule and averages: 120 orders, one result."""
    stack = [
        lk.with_sam(0.1), lk.with_amp("fp16", init_scale=2.0**12), lk.with_grad_accum(2),
        lk.with_clip(0.3), lk.with_ema(0.9),
    ]  # fmt: skip
    first = None
    for order in itertools.permutations(stack):
        state = make_state("dropout")
        torch.manual_seed(2)
        [*lk.run(lk.compose(*order)(weighted_classifier), state, make_batches(5), max_epochs=1)]
        first = first or state
        assert_bitwise_equal(state.state_dict(), first.state_dict(), str(order))


def test_sam_keeps_the_laws_and_reads_lazy_windows_twice():
    """check_decorator is content, and a window from an iterator is kept for the second pass."""
    check_decorator(lk.with_sam(0.1))
    check_decorator(lk.with_sam(0.1, adaptive=True))
    lazy, eager = make_state(), make_state()
    step = lk.compose(lk.with_sam(0.1), lk.with_grad_accum(3))(classifier)
    step(lazy, lk.Window(iter(make_batches(3)), 3))
    step(eager, lk.Window(make_batches(3)))
    assert_bitwise_equal(lazy.model.state_dict(), eager.model.state_dict())


def test_a_schedule_goes_with_it_and_wrong_settings_are_told():
    """The optimizer's step is one, so a schedule counts one; rho must be above 0."""
    state = make_state()
    step = lk.compose(lk.with_sam(0.1), lk.with_schedule(lr=halving))(classifier)
    [*lk.run(step, state, make_batches(3), max_epochs=1)]
    assert state.lr == halving(2)
    for rho in (0, -1, float("nan"), "0.1", True):
        with pytest.raises(lk.UsageError, match="rho"):
            lk.with_sam(rho)


def test_an_update_over_nothing_is_skipped():
    """A window without labels has no direction to climb, and no weight changes."""
    state = make_state()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    inputs, labels = make_batches(1)[0]
    lk.with_sam(0.1)(weighted_classifier)(state, (inputs, torch.full_like(labels, -100)))
    assert not state.applied
    assert_bitwise_equal(state.model.state_dict(), before)
