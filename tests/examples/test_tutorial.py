"""The tutorial's optimizers and loop are torch's: float64, 200 updates, 1e-12."""

import dataclasses
import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path

import adamw
import loop
import loopkit as lk
import pytest
import sgd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

UPDATES = 200
SHAPES = [(4, 3), (3,), ()]


def weights_after(optimizer_of, seed, updates=UPDATES):
    """The weights after as many updates with random gradients of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    weights = [draw(shape).requires_grad_() for shape in SHAPES]
    optimizer = optimizer_of(weights)
    for _ in range(updates):
        for i, w in enumerate(weights):
            absent = torch.rand((), generator=generator) < 0.1
            w.grad = None if absent else draw(w.shape) * 10.0 ** (2 - 2 * i)
        optimizer.step()
    return weights


def assert_equal(ours, theirs):
    """Within 1e-12 of each other."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


seeds = st.integers(0, 2**31)


@settings(max_examples=30, deadline=None)
@given(
    seeds,
    st.floats(1e-5, 0.1),
    st.floats(0.0, 0.99),
    st.booleans(),
    st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_sgd_is_torchs(seed, lr, momentum, nesterov, weight_decay):
    """For any momentum, Nesterov and weight decay, and where some gradients are missing."""
    chosen = {
        "lr": lr,
        "momentum": momentum,
        "nesterov": nesterov and momentum > 0,  # torch wants momentum for it
        "weight_decay": weight_decay,
    }
    assert_equal(
        weights_after(functools.partial(sgd.SGD, **chosen), seed),
        weights_after(functools.partial(torch.optim.SGD, **chosen), seed),
    )


@settings(max_examples=30, deadline=None)
@given(
    seeds,
    st.floats(1e-5, 0.1),
    st.floats(0.0, 0.99),
    st.floats(0.5, 0.9999),
    st.sampled_from([1e-8, 1e-6, 1e-3]),
    st.sampled_from([0.0, 0.01, 1.0]),
)
def test_adamw_is_torchs(seed, lr, beta1, beta2, eps, weight_decay):
    """For any betas, eps and weight decay, and where some gradients are missing."""
    chosen = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    assert_equal(
        weights_after(functools.partial(adamw.AdamW, **chosen), seed),
        weights_after(functools.partial(torch.optim.AdamW, **chosen), seed),
    )


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_of(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def endless(size=8):
    generator = torch.Generator().manual_seed(1)
    while True:
        inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        yield inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 0)


@pytest.mark.parametrize("ours", [sgd.SGD, adamw.AdamW])
def test_a_network_trained_with_them_is_the_one_trained_with_torchs(ours):
    """Two hundred updates of a network, whose gradients depend on the weights."""
    theirs = getattr(torch.optim, ours.__name__)
    chosen = {"momentum": 0.9, "nesterov": True} if ours is sgd.SGD else {}
    models = mlp(), mlp()
    optimizers = [
        make(m.parameters(), lr=0.01, **chosen)
        for make, m in zip((ours, theirs), models, strict=True)
    ]
    for batch in itertools.islice(endless(), UPDATES):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert_equal(models[0].parameters(), models[1].parameters())


RECIPE = loop.Recipe(
    UPDATES, warmup_updates=20, peak_lr=0.02, floor_lr=0.001, micro_batches=4, max_norm=0.3
)


def train_with_torch(model, batches):
    """The same recipe with torch's own parts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=RECIPE.weight_decay)
    schedule = lk.warmup(20, peak=0.02) >> lk.cosine(180, floor=0.001)
    scheduler = LambdaLR(optimizer, schedule)
    clipped = 0
    for _ in range(UPDATES):
        optimizer.zero_grad()
        for batch in itertools.islice(batches, 4):
            (loss_of(model, batch) / 4).backward()
        clipped += bool(nn.utils.clip_grad_norm_(model.parameters(), 0.3) > 0.3)
        optimizer.step()
        scheduler.step()
    assert 0 < clipped < UPDATES
    return model


def test_the_loop_is_the_one_written_with_torchs_parts():
    """Warmup, cosine, accumulation and clipping together end at the same weights."""
    model = mlp()
    losses = loop.train(model, loss_of, endless(), RECIPE)
    assert losses[-1] < 0.5 * losses[0]
    assert_equal(model.parameters(), train_with_torch(mlp(), endless()).parameters())


def test_the_loop_is_the_composed_step():
    """The decorators of loopkit do what the loop written from scratch does."""
    ours, model = mlp(), mlp()
    losses = loop.train(ours, loss_of, endless(), RECIPE)

    @lk.with_schedule(lr=lk.warmup(20, peak=0.02) >> lk.cosine(180, floor=0.001))
    @lk.with_clip(0.3)
    @lk.with_grad_accum(4)
    def step(state, batch):
        return loss_of(state.model, batch)

    state = lk.TrainState(model, lk.create_optimizer(model.parameters(), "adamw", lr=1.0))
    found = [float(s.loss) for s in lk.run(step, state, endless(), max_steps=UPDATES)]
    assert losses == pytest.approx(found, rel=1e-12)
    assert_equal(ours.parameters(), model.parameters())


def test_micro_batches_are_the_one_big_batch():
    """Four micro-batches of 8 train as one batch of 32."""
    small, large = mlp(), mlp()
    joined = (tuple(map(torch.cat, zip(*b, strict=True))) for b in iter_windows(endless(), 4))
    loop.train(small, loss_of, endless(), RECIPE)
    loop.train(large, loss_of, joined, dataclasses.replace(RECIPE, micro_batches=1))
    assert_equal(small.parameters(), large.parameters())


def iter_windows(batches, n):
    while True:
        yield [*itertools.islice(batches, n)]


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4))
def test_the_loss_scaler_is_torchs(overflows, patience):
    """The scale takes the same values after any sequence of overflows."""
    ours = loop.LossScaler(2.0**16, patience=patience)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=patience)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflow in overflows:
        theirs.scale(torch.zeros(()))
        weight.grad = torch.full((2,), float("inf") if overflow else ours.scale)
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        weight.grad = torch.full((2,), float("inf") if overflow else ours.scale)
        finite = ours.unscale([weight])
        assert finite is not overflow
        assert overflow or torch.equal(weight.grad, torch.ones(2))
        ours.adapt(finite)
        assert ours.scale == theirs.get_scale()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_to_about_the_same_loss(precision):
    """The weights stay in fp32; the loss after training is near the one without."""
    losses = {}
    for name in (None, precision):
        model = mlp().float()
        batches = ((inputs.float(), labels) for inputs, labels in endless())
        losses[name] = loop.train(
            model, loss_of, batches, dataclasses.replace(RECIPE, precision=name)
        )[-20:]
        assert all(w.dtype == torch.float32 for w in model.parameters())
    assert sum(losses[precision]) == pytest.approx(sum(losses[None]), rel=0.05)


def test_the_comparison_runs_and_draws(tmp_path):
    """The script finds no difference on the digits, measures AMP, and writes its picture."""
    script = Path(sgd.__file__).with_name("compare.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"accuracy (\S+) ours, (\S+) torch; .* updates (\S+)", done.stdout)
    assert len(differences) == 2
    for ours, theirs, difference in differences:
        assert ours == theirs
        assert float(ours) > 0.85
        assert float(difference) < 1e-12
    assert re.findall(r"batch +(\d+) on", done.stdout) == ["256", "4096"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
