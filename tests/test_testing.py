"""The public test tools: the checks find what they are for."""

import functools

import attrs
import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal, check_decorator

from test_orders import Centralise, CountBackwards

GOOD = [
    lk.with_clip(0.5),
    lk.with_clip_value(0.1),
    lk.with_ema(0.9),
    lk.with_amp("bf16"),
    lk.with_amp("fp16", init_scale=256.0),
    lk.with_grad_accum(3),
    lk.with_nonfinite("skip"),
    lk.with_nonfinite("raise"),
    lk.with_anomaly_detection(),
    lk.with_schedule(lr=functools.partial(round)),
    lk.wrap(transform=Centralise),
    lk.wrap(backward=functools.partial(CountBackwards, key="backwards")),
]


@attrs.frozen
class ForgetsInner:
    inner: lk.Transform

    def __call__(self, state):
        pass


@attrs.frozen
class DependsOnOrder:
    """Multiplies the loss by a number that is no power of two, after or before the loss scale."""

    inner: lk.Forward

    def __call__(self, state, batch):
        with torch.autocast("cpu", enabled=not torch.is_autocast_enabled("cpu")):
            return self.inner(state, batch)


@attrs.frozen
class KeepsHiddenState:
    inner: lk.Transform
    seen: list = attrs.field(factory=list, eq=False)

    def __call__(self, state):
        self.seen.append(1)
        for gradient in state.gradients():
            gradient.mul_(1 / len(self.seen))
        return self.inner(state)


def with_closure_layer():
    @attrs.frozen
    class Hidden:
        inner: lk.Transform

        def __call__(self, state):
            return self.inner(state)

    return lk.wrap(transform=Hidden)


@attrs.frozen
class CallsInnerTwice:
    inner: lk.Transform

    def __call__(self, state):
        self.inner(state)
        self.inner(state)


@attrs.frozen
class SkipsAlways:
    inner: lk.Transform

    def __call__(self, state):
        state.skip_if(True)
        self.inner(state)


BAD = {
    "a layer that calls its inner one twice": (lk.wrap(transform=CallsInnerTwice), "2 times"),
    "a layer that skips every update": (lk.wrap(transform=SkipsAlways), "skips every update"),
    "a layer that forgets its inner one": (lk.wrap(transform=ForgetsInner), "call its inner one"),
    "a layer whose effect depends on the order": (lk.wrap(forward=DependsOnOrder), "differs in"),
    "a layer with state that is not the state's": (lk.wrap(transform=KeepsHiddenState), "differs"),
    "a layer that does not pickle": (with_closure_layer(), "does not pickle"),
    "a layer that does not compare": (
        lk.wrap(transform=lambda inner: lambda state: inner(state)), "does not pickle",
    ),
}  # fmt: skip


@pytest.mark.parametrize("decorator", GOOD, ids=repr)
def test_decorators_that_keep_the_laws_pass(decorator):
    """check_decorator is content with the built-in decorators and with a user's."""
    check_decorator(decorator)


@pytest.mark.parametrize("case", BAD)
def test_decorators_that_break_a_law_are_found(case):
    """check_decorator names the law that does not hold."""
    decorator, message = BAD[case]
    with pytest.raises(AssertionError, match=message):
        check_decorator(decorator)


DIFFERENT = [
    (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23])),
    (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
    (torch.tensor([1.0]), torch.tensor(1.0)),
    (torch.tensor(0.0), torch.tensor(-0.0)),
    ({"a": 1}, {"b": 1}),
    ([1], [1, 2]),
    ({"a": [1, 2.0]}, {"a": [1, 2.5]}),
]


@pytest.mark.parametrize(("ours", "theirs"), DIFFERENT)
def test_what_differs_is_told(ours, theirs):
    """The smallest difference in bits, type, shape or structure is an error that says where."""
    with pytest.raises(AssertionError, match="value"):
        assert_bitwise_equal(ours, theirs)


def test_what_is_equal_passes_nan_included():
    """NaN equals NaN of the same bits."""
    nested = {"a": [torch.tensor([1.0, float("nan")]), (float("nan"), None, "x")]}
    assert_bitwise_equal(
        nested, {"a": [torch.tensor([1.0, float("nan")]), (float("nan"), None, "x")]}
    )
