"""The decorators of the example keep the laws, and do what they say."""

import loopkit as lk
import pytest
import torch
from loopkit.testing import check_decorator
from torch import nn

import custom_decorator as example


@pytest.mark.parametrize(
    "decorator",
    [
        example.with_centralised_grads,
        example.with_spike_skip(),
        example.with_spike_skip(z=0.5, warm=2),
    ],
)
def test_they_keep_the_laws_of_the_built_in_ones(decorator):
    """They print, compare, pickle, resume, and stand anywhere in the stack."""
    check_decorator(decorator)


def test_rows_of_a_centralised_gradient_sum_to_zero():
    """For each output, as in the paper; a bias keeps its gradient."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    inputs = torch.randn(5, 1, 4, 4)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0))
    plain = lk.train_step(lambda state, x: state.model(x).square().mean())
    plain(state, inputs)
    before = [p.grad.clone() for p in model.parameters()]
    example.with_centralised_grads(plain)(state, inputs)
    for gradient, p in zip(before, model.parameters(), strict=True):
        rows = gradient.flatten(1) if p.ndim > 1 else None
        expected = gradient if rows is None else (rows - rows.mean(1, keepdim=True)).view_as(p)
        torch.testing.assert_close(p.grad, expected)


def test_spikes_are_skipped_and_nothing_else(monkeypatch, tmp_path, capsys):
    """In three epochs each 20th update; the digits are learned, which they are not unprotected."""
    monkeypatch.setattr(example, "EPOCHS", 3)
    picture = tmp_path / "deep" / "custom.png"
    found = example.main(picture)
    accuracy, _, skipped = found["with_spike_skip()"]
    assert skipped == [*range(20, 133, 20)]
    assert accuracy > 0.9
    assert found["unprotected"][0] < 0.5
    assert "transform   Centralise > with_spike_skip(4.0)" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_gradient_that_is_not_finite_does_not_spoil_the_average():
    """It is skipped, and what is usual stays what it was."""
    model = nn.Linear(2, 1)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step = example.with_spike_skip()(lambda state, x: state.model(x).square().mean())
    for value in (1.0, 2.0, float("nan"), 1.0):
        before = state.features["spikes"].clone() if state.step else None
        step(state, torch.full((3, 2), value))
        assert bool(state.applied) is (value == value)  # noqa: PLR0124
        assert state.applied or torch.equal(state.features["spikes"], before)
