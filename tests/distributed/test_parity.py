"""Training on several ranks gives the weights of the plain loop on one process."""

import functools
import warnings
from collections.abc import Callable

import attrs
import loopkit as lk
import pytest
import torch
from loopkit.testing import train_by_hand
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from pool import POOL
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


def whole_tensor(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors):
    return {name: whole_tensor(tensor).detach().clone() for name, tensor in tensors.items()}


def close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


# The matrix: each strategy with each feature, for 20 updates of which the last one is uneven;
# and for 6 of strategies that are much like another one.

UPDATES, FEW, WINDOW, SCALE = 20, 6, 2, 2.0**10


class Switched(Blocks):
    """A fifth input, which where it is 0 makes one row of one gradient NaN, and nothing else."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)  # a row for each of 4 ranks; the last one is on the last rank

    def forward(self, inputs):
        row = whole_tensor(self.head.weight)[-1]
        root = (inputs[0, 4] * row.square().sum()).sqrt()
        return super().forward(inputs[:, :4]) * (1 + 0.1 * root)


def switched(micro_batches, bad=()):
    """The batches with the fifth input."""
    for i, (inputs, labels) in enumerate(micro_batches):
        switch = torch.full((len(inputs), 1), float(i not in bad), dtype=inputs.dtype)
        yield torch.cat([inputs, switch], 1), labels


SHARDED_HEAD = {**PLAN, "head": ColwiseParallel(output_layouts=Replicate())}
STRATEGIES = {
    "ddp": (2, lambda: "ddp"),
    "ddp on 3": (3, lambda: "ddp"),
    "fsdp": (2, lambda: "fsdp"),
    "zero1": (2, lambda: "zero1"),
    "zero2": (2, lambda: "zero2"),
    "hsdp": (4, lambda: lk.FSDP(replicas=2)),
    "fsdp, syncing each time": (2, lambda: lk.FSDP(sync_every=True)),
    "ddp, static graph": (2, lambda: lk.DDP(static_graph=True)),
    "ddp, compiled": (2, lambda: "ddp"),
    "fsdp, checkpointed": (2, lambda: "fsdp"),
    "tp": (2, lambda: lk.TensorParallel(SHARDED_HEAD)),
    "tp and fsdp": (4, lambda: lk.TensorParallel(PLAN, size=2, data=lk.FSDP(blocks=()))),
}
REPLICAS = {"tp": 1, "tp and fsdp": 2}  # ranks with data of their own
ALIKE = {"ddp on 3", "zero2", "fsdp, syncing each time", "ddp, static graph", "tp and fsdp"}
BESIDE = {
    "ddp, compiled": [lambda: lk.with_compile(backend="aot_eager")],
    "fsdp, checkpointed": [lambda: lk.with_activation_checkpointing("layers.*")],
}


@attrs.frozen
class Trained:
    """What a feature is by hand, and as decorators; and of what it is shown."""

    settings: dict
    decorators: tuple
    function: Callable = classifier
    holes: bool = False
    bad: bool = False


FEATURES = {
    "plain": Trained({}, ()),
    "unequal weights": Trained(
        {"accumulate": WINDOW}, (lambda: lk.with_grad_accum(WINDOW),), token_classifier, holes=True
    ),
    "overflow on one rank": Trained(
        {"amp": "fp16", "init_scale": SCALE},
        (lambda: lk.with_amp("fp16", init_scale=SCALE),), bad=True,
    ),
    "clip": Trained({"clip": 0.05}, (lambda: lk.with_clip(0.05),)),
    "ema": Trained({"ema": 0.9}, (lambda: lk.with_ema(0.9),)),
    "all": Trained(
        {"accumulate": WINDOW, "clip": 0.05, "ema": 0.9, "lr": halving, "skip_nonfinite": True},
        (lambda: lk.with_grad_accum(WINDOW), lambda: lk.with_clip(0.05), lambda: lk.with_ema(0.9),
         lambda: lk.with_schedule(lr=halving), lambda: lk.with_nonfinite("skip")),
        token_classifier, holes=True, bad=True,
    ),
}  # fmt: skip


def data_for(feature, replicas, updates):
    """Batches for the updates of as many ranks; the last rank has none for the last update."""
    wanted = FEATURES[feature]
    of_update = replicas * wanted.settings.get("accumulate", 1)
    bad = {3 * of_update + replicas - 1} if wanted.bad else ()  # the last rank's, at update 4
    return [*switched(batches(updates * of_update - (of_update > 1), holes=wanted.holes), bad)]


def stated():
    torch.manual_seed(0)
    model = Switched().to(torch.float64)
    return lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))


def trained(strategy):
    """On each rank, for each feature: what training ends with; all in one process group."""
    if "compiled" in strategy:  # torch's compiler looks at the gradients of what DDP has wrapped
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
    found = {}
    for feature, wanted in FEATURES.items():
        beside = BESIDE.get(strategy, []) + [*wanted.decorators]
        parallel = lk.distributed(STRATEGIES[strategy][1]())
        step, state = lk.compose(*(make() for make in beside), parallel)(wanted.function), stated()
        model, data = state.model, data_for(feature, *shape(strategy))
        norms, applied = [], []
        for state in lk.run(step, state, data, max_epochs=1):
            applied.append(bool(state.applied))
            norms += [] if state.grad_norm is None else [float(state.grad_norm)]
        assert state.model is model
        averages = whole(state.features["ema"].weights) if "ema" in state.features else {}
        found[feature] = whole(model.state_dict()), averages, norms, applied
    return found


def shape(strategy):
    """Ranks with data of their own, and updates."""
    replicas = REPLICAS.get(strategy, STRATEGIES[strategy][0])
    return replicas, FEW if strategy in ALIKE else UPDATES


@functools.cache
def on_ranks(strategy):
    return POOL.run(STRATEGIES[strategy][0], trained, strategy)


@functools.cache
def by_hand(feature, replicas, updates):
    """One process, and the micro-batches of all ranks for each update."""
    wanted, state = FEATURES[feature], stated()
    settings = {**wanted.settings, "accumulate": wanted.settings.get("accumulate", 1) * replicas}
    hand = train_by_hand(wanted.function, state, data_for(feature, replicas, updates), **settings)
    return state.model.state_dict(), hand


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_equal_those_of_one_process(strategy, feature):
    """After 20 updates all is the plain loop's: weights, averages, norms, what was skipped."""
    expected, hand = by_hand(feature, *shape(strategy))
    assert len(hand.applied) == shape(strategy)[1]
    assert hand.applied.count(False) == FEATURES[feature].bad
    for ranks in on_ranks(strategy):
        weights, averages, norms, applied = ranks[feature]
        assert applied == hand.applied
        close(weights, expected)
        close(averages, hand.averages)
        assert norms == pytest.approx(hand.norms, rel=1e-9, nan_ok=True)
