"""The learning rate range test: against the loop by hand, and where the answer is known."""

import math
import re
import sys

import loopkit as lk
import numpy as np
import pytest
import torch
from loopkit.debug.rates import _curve
from torch import nn

from problems import classifier, make_batches, make_state

CURVATURE = 50.0


def parabola():
    """A state and a step with loss 25 (w - 3)^2: plain SGD diverges above lr = 2 / 50."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.5))
    return state, lambda s, x: 0.5 * CURVATURE * (s.model.weight - 3).square().mean()


def test_the_losses_are_those_of_the_loop_by_hand():
    """One update for each rate, from the lowest to the highest, evenly on a logarithmic scale."""
    batches = make_batches(20)
    curve = lk.find_lr(classifier, make_state(), batches, start=1e-5, end=1e-2, n=20)
    state = make_state()
    assert curve.lrs == pytest.approx(np.geomspace(1e-5, 1e-2, 20))
    for lr, batch, found in zip(curve.lrs, batches, curve.losses, strict=True):
        state.optimizer.param_groups[0]["lr"] = lr
        state.optimizer.zero_grad()
        loss = classifier(state, batch)
        loss.backward()
        state.optimizer.step()
        assert loss.item() == found


@pytest.mark.parametrize("n", [30, 100])
def test_the_suggestion_trains_where_the_end_is_known(n):
    """On a parabola it lies below the rate at which SGD diverges, and within 30 times of it."""
    state, step = parabola()
    curve = lk.find_lr(step, state, [torch.ones(1, 1)] * 10, n=n)
    assert 2 / CURVATURE / 30 < curve.suggestion < 2 / CURVATURE
    assert curve.diverged
    assert curve.lrs[-1] < 10
    state.optimizer.param_groups[0]["lr"] = curve.suggestion
    for _ in lk.run(step, state, [torch.ones(1, 1)], max_steps=300):
        pass
    assert state.loss < 0.01


def test_it_stands_over_schedules_and_keeps_the_ratios_of_groups():
    """A schedule in the step does not set the rates of the test, and groups differ as before."""
    state, seen = make_state(), []
    first, second = [*state.model.parameters()][:2], [*state.model.parameters()][2:]
    state.optimizer = torch.optim.SGD(
        [{"params": first, "lr": 0.3}, {"params": second, "lr": 0.03}]
    )

    def step(state, batch):
        seen.append([group["lr"] for group in state.optimizer.param_groups])
        return classifier(state, batch)

    flat = lk.with_schedule(lr=[lambda n: 7.0, lambda n: 7.0])(step)
    curve = lk.find_lr(flat, state, make_batches(), start=1e-4, end=1e-2, n=10)
    assert [row[0] for row in seen] == pytest.approx(curve.lrs)
    assert [row[1] for row in seen] == pytest.approx([lr / 10 for lr in curve.lrs])
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.3, 0.03]


def test_a_learning_rate_that_is_a_tensor_is_set_in_place():
    """The copy's tensor is filled, the state's stays."""
    state = make_state()
    state.optimizer.param_groups[0]["lr"] = lr = torch.tensor(0.1)
    lk.find_lr(classifier, state, make_batches(), n=10)
    assert lr == 0.1
    assert state.optimizer.param_groups[0]["lr"] is lr


def test_nothing_is_suggested_where_nothing_falls():
    """A loss that only rises gives no rate, and says so."""
    state = make_state()
    curve = lk.find_lr(lambda s, b: -classifier(s, b), state, make_batches(1), start=1e-3, n=30)
    flat = lk.find_lr(lambda s, b: classifier(s, b) * 0 + 1, state, make_batches(1), n=10)
    assert flat.suggestion is None
    assert "falls nowhere" in str(flat)
    assert curve.losses[-1] < curve.losses[0]


def test_a_loss_that_becomes_nan_ends_the_test():
    """The curve holds what was finite before it."""
    state, _ = parabola()
    curve = lk.find_lr(
        lambda s, x: (s.model.weight - 3).square().mean().log1p() + s.model.weight.mean() * math.nan
        if s.optimizer.param_groups[0]["lr"] > 1e-3 and s.step > 5
        else (s.model.weight - 3).square().mean(),
        state, [torch.ones(1, 1)], n=50,
    )  # fmt: skip
    assert 0 < len(curve.losses) < 50
    assert all(map(math.isfinite, curve.losses))
    assert curve.diverged


def test_the_curve_in_the_picture_is_the_curve(tmp_path):
    """The smoothed line is drawn on a logarithmic axis, the suggestion where it is."""
    state, step = parabola()
    curve = lk.find_lr(step, state, [torch.ones(1, 1)])
    svg = curve.plot(tmp_path / "lr.svg").read_text()
    path = max(
        re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: #1f77b4; stroke-width: 2', svg),
        key=len,
    )
    x, y = np.array(re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path), dtype=float).T
    inside = y > 0
    assert np.corrcoef(np.log(curve.lrs[: len(x)]), x)[0, 1] > 0.9999
    heights = np.array(curve.smoothed[: len(y)])
    assert np.corrcoef(heights[inside], -y[inside])[0, 1] > 0.999
    for text in ("learning rate", "loss", f"suggestion: {curve.suggestion:.1e}"):
        assert f"<!-- {text} -->" in svg
    assert curve.plot(tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert f"lr={curve.suggestion:.1e}" in str(curve)


def test_matplotlib_is_an_extra(tmp_path, monkeypatch):
    """Without it the test runs, and the plot says how it is installed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curve = lk.find_lr(classifier, make_state(), make_batches(), n=10)
    with pytest.raises(lk.MissingExtraError, match="pip install matplotlib"):
        curve.plot(tmp_path / "lr.png")


U, D = lk.UsageError, lk.DataError
WRONG = {
    "start above end": (
        {"start": 1.0, "end": 0.1},
        U,
        "start = 1.0 and end = 0.1",
        "start below end",
    ),
    "no start": ({"start": 0.0}, U, "start = 0.0", "above 0"),
    "no end": ({"end": math.inf}, U, "end = inf", "finite"),
    "few updates": ({"n": 5}, U, "n = 5", "10 or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_range_is_an_error_that_teaches(case):
    """Ranges and counts that cannot be right say what to write."""
    options, kind, found, remedy = WRONG[case]
    with pytest.raises(kind) as caught:
        lk.find_lr(classifier, make_state(), make_batches(), **options)
    assert found in caught.value.found
    assert remedy in caught.value.instead


def test_a_first_loss_that_is_not_finite_is_an_error():
    """There is nothing to find a rate for."""
    with pytest.raises(lk.DataError, match="first loss of nan"):
        lk.find_lr(lambda s, b: classifier(s, b) * math.nan, make_state(), make_batches())


def test_an_iterator_is_refused():
    """It would lose what the test reads."""
    with pytest.raises(lk.DataError, match="lose the batches"):
        lk.find_lr(classifier, make_state(), iter(make_batches()))


def test_leaps_of_rates_that_are_too_large_are_not_the_fall():
    """A steeper fall after the loss has risen again, near the end, is not what is suggested."""
    state, batches = make_state(), make_batches(200, 32)
    data = [(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()) for x, _ in batches]
    assert 1e-3 < lk.find_lr(classifier, state, data).suggestion < 0.2  # AdamW; it said 0.6
    lrs = tuple(10 ** (-5 + i / 20) for i in range(100))
    fall = [1 - 0.6 / (1 + math.exp(-(i - 40) / 4)) for i in range(100)]  # fastest at 40
    leap = [0.1 * math.sin((i - 70) / 3) * (i > 70) - 0.3 * (i > 78) for i in range(100)]
    losses = [a + b for a, b in zip(fall, leap, strict=True)]
    assert _curve(lrs, losses, over=False).suggestion == pytest.approx(lrs[40], rel=0.3)
