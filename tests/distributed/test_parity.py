"""Training on several ranks gives the weights of the plain loop on one process."""

import loopkit as lk
import pytest
import torch
from loopkit.testing import train_by_hand
from pool import POOL
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from problems import halving, make_batches


class Blocks(nn.Module):
    """A model with blocks, as sharding likes it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        hidden = hidden + self.layers[1](torch.tanh(self.layers[0](hidden)))
        return self.head(hidden)


def fresh(optimizer=torch.optim.AdamW, seed=0, **settings):
    torch.manual_seed(seed)
    model = Blocks().to(torch.float64)
    return lk.TrainState(model, optimizer(model.parameters(), lr=0.01, **settings))


def classifier(state, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(state.model(inputs), labels)


def token_classifier(state, batch):
    inputs, labels = batch
    loss = nn.functional.cross_entropy(state.model(inputs), labels, ignore_index=-100)
    return {"loss": loss.nan_to_num(0.0), "weight": (labels != -100).sum().item()}


def batches(count, *, holes=False):
    made = make_batches(count, dtype=torch.float64)
    if holes:  # unequal numbers of labels, and a batch without any
        for i, (_, labels) in enumerate(made):
            labels[: i % 5] = -100
        made[3][1][:] = -100
    return made


PLAN = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}


STRATEGIES = {
    "ddp": (2, lambda: "ddp"),
    "ddp on 3": (3, lambda: "ddp"),
    "fsdp": (2, lambda: "fsdp"),
    "zero1": (2, lambda: "zero1"),
    "zero2": (2, lambda: "zero2"),
    "hsdp": (4, lambda: lk.FSDP(replicas=2)),
    "fsdp, syncing each time": (2, lambda: lk.FSDP(sync_every=True)),
    "ddp, static graph": (2, lambda: lk.DDP(static_graph=True)),
    "tp": (2, lambda: lk.TensorParallel(PLAN)),
    "tp and fsdp": (4, lambda: lk.TensorParallel(PLAN, size=2, data=lk.FSDP(blocks=()))),
}
REPLICAS = {"tp": 1, "tp and fsdp": 2}  # ranks with data of their own
FEATURES = {
    "plain": ({}, ()),
    "accumulation": ({"accumulate": 2}, (lambda: lk.with_grad_accum(2),)),
    "clip": ({"clip": 0.05}, (lambda: lk.with_clip(0.05),)),
    "schedule": ({"lr": halving}, (lambda: lk.with_schedule(lr=halving),)),
    "ema": ({"ema": 0.9}, (lambda: lk.with_ema(0.9),)),
    "all": (
        {"accumulate": 2, "clip": 0.05, "ema": 0.9, "lr": halving},
        (lambda: lk.with_grad_accum(2), lambda: lk.with_clip(0.05), lambda: lk.with_ema(0.9),
         lambda: lk.with_schedule(lr=halving), lambda: lk.with_nonfinite("skip")),
    ),
}  # fmt: skip


def whole(tensors):
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors.items()
    }


def trained(strategy, features, function, data, epochs=2):
    """On each rank: the weights and averages after training."""
    makers = FEATURES[features][1]
    step = lk.compose(*(make() for make in makers), lk.distributed(STRATEGIES[strategy][1]()))(
        function
    )
    state = fresh()
    model = state.model
    norms = [
        None if s.grad_norm is None else float(s.grad_norm)
        for s in lk.run(step, state, data, max_epochs=epochs)
    ]
    assert state.model is model
    averages = whole(state.features["ema"].weights) if "ema" in state.features else {}
    return whole(model.state_dict()), averages, norms


def by_hand(features, function, data, world, epochs=2):
    """One process, and the micro-batches of all ranks for each update."""
    settings = dict(FEATURES[features][0])
    settings["accumulate"] = settings.get("accumulate", 1) * world
    state = fresh()
    found = None
    lr, before = settings.pop("lr", None), 0
    for _ in range(epochs):
        if lr is not None:
            settings["lr"] = lambda n, before=before: lr(n + before)
        found = train_by_hand(function, state, data, **settings)
        before += sum(found.applied)
    return state.model.state_dict(), found


def close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_equal_those_of_one_process(strategy, features):
    """Seven updates an epoch, the last one uneven: the weights are those of the plain loop."""
    world = REPLICAS.get(strategy, STRATEGIES[strategy][0])
    data = batches(7 * world - 1)
    found = POOL.run(STRATEGIES[strategy][0], trained, strategy, features, classifier, data, 1)
    expected, hand = by_hand(features, classifier, data, world, 1)
    for weights, averages, norms in found:
        close(weights, expected)
        close(averages, hand.averages if averages else {})
        assert norms == pytest.approx(found[0][2])


@pytest.mark.parametrize("features", ["plain", "accumulation", "all"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "zero1"])
def test_the_gradient_is_the_mean_over_the_labels_of_all_ranks(strategy, features):
    """Unequal numbers of labels, a rank without any, a short window: one weighted mean."""
    world = STRATEGIES[strategy][0]
    data = batches(4 * world + 1, holes=True)
    found = POOL.run(world, trained, strategy, features, token_classifier, data, 1)
    expected, _ = by_hand(features, token_classifier, data, world, 1)
    for weights, _, _ in found:
        close(weights, expected)
