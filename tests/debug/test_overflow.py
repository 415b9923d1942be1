"""The detective: which module made the first infinity or NaN, forward and backward."""

import copy
import math
import pickle

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal, check_decorator
from torch import nn

from problems import classifier, make_batches, make_state


class Blow(nn.Module):
    """The identity, until one of its passes multiplies by a factor."""

    def __init__(self, forward=1.0, backward=1.0):
        super().__init__()
        self.factors = forward, backward

    def forward(self, inputs):
        return Scaled.apply(inputs, *self.factors)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, forward, backward):
        ctx.backward_factor = backward
        return inputs * forward

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.backward_factor, None, None


def net(at, blow, dtype=torch.float32):
    """Six modules, of which the one at `at` blows; and its state."""
    modules = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    modules.insert(at, blow)
    model = nn.Sequential(nn.Sequential(*modules[:3]), nn.Sequential(*modules[3:])).to(dtype)
    return lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))


def found_in(state, function=classifier, batch=None, **options):
    step = lk.detect_overflow(**options)(function)
    with pytest.raises(lk.NonFiniteError) as caught:
        step(state, batch or make_batches(1)[0])
    return caught.value


NAMES = ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]


@pytest.mark.parametrize(("factor", "value"), [(math.inf, "infinity"), (math.nan, "NaN")])
@pytest.mark.parametrize("at", range(6))
def test_the_first_module_that_makes_it_is_named(at, factor, value):
    """Wherever it stands, that module is named with what it was given, and none after it."""
    error = found_in(net(at, Blow(forward=factor)))
    assert error.found.startswith(f"the first {value} in the output of {NAMES[at]} (Blow, float32)")
    assert (
        f"{(value == 'NaN' and 'nan') or 'inf'}" in error.found.split(";")[0].split("|output|")[1]
    )
    assert not any(f"\n    {name} " in error.found for name in NAMES[at + 1 :])


@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("at", range(1, 6))
def test_the_first_gradient_is_placed(at, factor):
    """In the backward pass, it names the module whose output's gradient is the first."""
    error = found_in(net(at, Blow(backward=factor)))
    assert "the first gradient that is not finite" in error.found
    assert f"the output of {NAMES[at - 1]} (" in error.found
    assert f"from the backward of {NAMES[at]}" in error.found


def test_fp16_overflows_where_its_range_ends():
    """A product above 65504 is found in half precision and not in bfloat16."""
    inputs, labels = make_batches(1)[0]
    large = {"inputs": torch.full_like(inputs, 3e4), "labels": labels}

    def step(state, batch):
        logits = state.model(batch["inputs"].to(next(state.model.parameters()).dtype))
        return nn.functional.cross_entropy(logits.float(), batch["labels"])

    def state(dtype):
        made = net(0, nn.Identity(), dtype)
        nn.init.constant_(made.model[0][1].weight, 2.0)
        return made

    error = found_in(state(torch.float16), step, large)
    assert "0.1 (Linear, float16): |input| <= 3e+04, |weight| <= 2, |output| <= inf" in error.found
    assert "bf16" in error.instead
    lk.detect_overflow()(step)(state(torch.bfloat16), large)


def test_a_weight_and_an_input_are_told_from_a_module():
    """What was not finite before the forward pass is not laid at a module's door."""
    state = make_state()
    nn.init.constant_(state.model[3].bias, math.nan)
    assert (
        "a weight that is not finite, before the forward pass, in 3 (Linear"
        in found_in(state).found
    )
    inputs, labels = make_batches(1)[0]
    inputs[2, 1] = math.inf
    error = found_in(make_state(), batch=(inputs, labels))
    assert "an input that is not finite, which no module has made, to 0 (Linear" in error.found


def test_a_loss_after_the_modules_is_found():
    """log(0) in the step function is no module's."""
    error = found_in(make_state(), lambda s, b: classifier(s, b) * math.inf)
    assert error.found.startswith("a loss or output that is not finite, made after the last module")
    assert "\n    3 (Linear, float32)" in error.found


def test_the_gradient_of_the_loss_is_found():
    """Sqrt has an infinite slope at zero, after the last module."""
    error = found_in(make_state(), lambda s, b: (s.model(b[0]).mean() * 0).sqrt())
    assert "from the backward of the loss" in error.found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_underflow_is_found_where_it_is_asked_for(dtype):
    """An output below the smallest normal number, from an input above it; else it passes."""
    factor = torch.finfo(dtype).tiny / 100
    made = lambda: net(3, Blow(forward=factor), dtype)
    inputs, labels = make_batches(1)[0]
    batch = inputs.to(dtype), labels
    function = lambda s, b: s.model(b[0]).float().square().mean()
    error = found_in(made(), function, batch, underflow=True)
    assert "nothing above the smallest normal number from 1.0 (Blow" in error.found
    lk.detect_overflow()(function)(made(), batch)


def test_underflow_of_gradients_is_found():
    """The gradient that vanishes names the module behind which it does."""
    error = found_in(net(4, Blow(backward=1e-42)), underflow=True)
    assert "nothing above the smallest normal number in the gradient" in error.found
    assert "from the backward of 1.1" in error.found


def test_a_step_that_is_finite_trains_the_same_and_leaves_no_hooks():
    """Bit for bit, and every module is without hooks afterwards, after an error too."""
    ends = []
    for step in (classifier, lk.detect_overflow(underflow=True)(classifier)):
        state = make_state("dropout")
        torch.manual_seed(1)
        for _ in lk.run(step, state, make_batches(), max_epochs=2):
            pass
        ends.append(copy.deepcopy(state.state_dict()))
        assert not any(module._forward_hooks for module in state.model.modules())
    assert_bitwise_equal(*ends, "the training with the detective")
    state = net(2, Blow(forward=math.nan))
    found_in(state)
    assert not any(module._forward_hooks for module in state.model.modules())


def test_it_names_the_update():
    """The error says after which update it happened."""
    state = make_state()
    step = lk.detect_overflow()(lambda s, b: classifier(s, b) * (math.nan if s.step == 3 else 1))
    with pytest.raises(lk.NonFiniteError, match="in the update after 3"):
        for _ in lk.run(step, state, make_batches(), max_epochs=1):
            pass
    assert state.step == 3


def test_it_keeps_the_laws_of_decorators():
    """In any order, saved and resumed; it prints as it is written."""
    check_decorator(lk.detect_overflow())
    assert repr(lk.detect_overflow(underflow=True)) == "detect_overflow(underflow=True)"
    assert pickle.loads(pickle.dumps(lk.detect_overflow())) == lk.detect_overflow()
