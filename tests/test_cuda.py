"""What only a CUDA device can show: nothing waits for it, and what it computes is right.

Where there is none, `LOOPKIT_TEST_DEVICE=cpu pytest tests/test_cuda.py` runs all but what a CPU
does not have; that looks at these tests rather than at the library.
"""

import contextlib
import copy
import os

import loopkit as lk
import pytest
import torch
import torch.distributed as dist
from loopkit.testing import assert_bitwise_equal, train_by_hand
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from problems import halving, make_batches

DEVICE = torch.device(os.environ.get("LOOPKIT_TEST_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
only_cuda = pytest.mark.skipif(not ON_CUDA, reason="a CPU does its work at once")
BACKEND = "inductor" if ON_CUDA else "eager"


def classifier(state, batch):
    return F.cross_entropy(state.model(batch[0]), batch[1])


def counting(state, batch):
    """A mean over some of the labels, with their number on the device."""
    features = batch[0][:, 0]
    counted = (features > 0) | (features == features.max())  # one at least
    labels = torch.where(counted, batch[1], -100)
    loss = F.cross_entropy(state.model(batch[0]), labels, ignore_index=-100)
    return {"loss": loss, "weight": (labels != -100).sum()}


def counting_on_host(state, batch):
    """The same with a number, for the loop by hand."""
    found = counting(state, batch)
    return {**found, "weight": found["weight"].item()}


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


def make_state(optimizer="fused", dropout=0.0, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).to(
        DEVICE
    )
    return lk.TrainState(model, OPTIMIZERS[optimizer](model.parameters()))


def on_device(batches):
    return [tuple(t.to(DEVICE) for t in batch) for batch in batches]


def assert_equal(ours, theirs):
    """Bit for bit; on CUDA up to what another choice of a kernel may round."""
    if ON_CUDA:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    else:
        assert_bitwise_equal(ours, theirs)


@contextlib.contextmanager
def no_waits():
    """Where the host would wait for the device torch raises."""
    if ON_CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_CUDA:
            torch.cuda.set_sync_debug_mode("default")


# Waits

SKIP, EMA, CLIP = lk.with_nonfinite("skip"), lk.with_ema(0.9), lk.with_clip(0.3)
SCHEDULE, BF16 = lk.with_schedule(lr=halving), lk.with_amp("bf16")
ACCUMULATED = lk.with_grad_accum(3)
WATCHED = {
    "plain": ([], classifier, "adamw"),
    "plain, fused": ([], classifier, "fused"),
    "weights of the device": ([ACCUMULATED], counting, "fused"),
    "full": ([EMA, SCHEDULE, CLIP, ACCUMULATED, BF16, SKIP], counting, "fused"),
    "fp16": ([EMA, SCHEDULE, CLIP, lk.with_amp("fp16")], classifier, "fused"),
}


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("loaded", ["on the device", "from the host", "from pinned memory"])
def test_no_update_waits_for_the_device(name, loaded):
    """Updates pass where torch forbids to wait, whatever the batches come from."""
    layers, function, optimizer = WATCHED[name]
    state, data = make_state(optimizer), make_batches(96)
    if loaded == "on the device":
        data = on_device(data)
    elif loaded == "from pinned memory" and ON_CUDA:
        data = [tuple(t.pin_memory() for t in batch) for batch in data]
    updates = iter(lk.run(lk.compose(*layers)(function), state, data, max_epochs=1))
    for _ in range(4):  # which may wait: memory grows, kernels are loaded
        next(updates)
    with no_waits():
        for state in updates:
            assert {"loss"} <= state.metrics.keys()
    assert state.step == (96 if ACCUMULATED not in layers else 32)


# Parity

MATRIX = {
    "plain": ([], classifier, classifier, {}),
    "accumulation, unequal weights": (
        [lk.with_grad_accum(3)], counting, counting_on_host, {"accumulate": 3},
    ),
    "clip": ([CLIP], classifier, classifier, {"clip": 0.3}),
    "averages": ([lk.with_ema(0.7)], classifier, classifier, {"ema": 0.7}),
    "bf16": ([BF16], classifier, classifier, {"amp": "bf16"}),
    "fp16 with skipped updates": (
        [lk.with_amp("fp16", init_scale=2.0**24)], classifier, classifier,
        {"amp": "fp16", "init_scale": 2.0**24},
    ),
    "all": (
        [lk.with_ema(0.7), SCHEDULE, CLIP, lk.with_grad_accum(3),
         lk.with_amp("fp16", init_scale=2.0**24)],
        counting, counting_on_host,
        {"ema": 0.7, "lr": halving, "clip": 0.3, "accumulate": 3, "amp": "fp16",
         "init_scale": 2.0**24},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_of_the_loop_by_hand(name, optimizer):
    """After 20 updates weights, averages and what was skipped are those of the plain loop."""
    layers, function, by_hand, settings = MATRIX[name]
    data = make_batches(60 if "accumulate" in settings else 20)
    ours, theirs = make_state(optimizer), make_state(optimizer)
    run = lk.run(lk.compose(*layers)(function), ours, data, max_epochs=1)
    applied = [bool(state.applied) for state in run]
    found = train_by_hand(by_hand, theirs, on_device(data), **settings)
    assert applied == found.applied
    assert (False in applied) == (settings.get("amp") == "fp16")
    assert ours.step == 20
    assert_equal(ours.model.state_dict(), theirs.model.state_dict())
    if "ema" in settings:
        assert_equal(ours.features["ema"].weights, found.averages)


# Compiled


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [1, 3])
def test_cuda_graphs_of_a_step_are_the_step(optimizer, size):
    """In reduce-overhead torch makes a graph of each part, and weights are those without any."""
    layers = [CLIP, SCHEDULE, *([lk.with_grad_accum(size)] if size > 1 else [])]
    compiled = lk.with_compile("step", mode="reduce-overhead", backend=BACKEND)
    found, data = [], make_batches(24)
    counters["inductor"].pop("cudagraph_skips", None)
    for more in ([], [compiled]):
        state = make_state(optimizer)
        step = lk.compose(*more, *layers)(classifier)
        losses = []
        for state in lk.run(step, state, data, max_epochs=1):
            losses.append(state.loss)
            if state.step == 4:  # other tensors in the optimizer, at other addresses
                state.load_state_dict(copy.deepcopy(state.state_dict()))
        found.append((torch.stack(losses), state.model.state_dict()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_cuda_graphs_skip_what_is_not_finite():
    """The decision to skip is in the graph; weights are those of training without that batch."""
    data = on_device(make_batches(8))
    broken = [*data[:5], (data[5][0] * float("nan"), data[5][1]), *data[5:]]
    compiled = lk.with_compile("step", mode="reduce-overhead", backend=BACKEND)
    step = lk.compose(compiled, SKIP, CLIP)(classifier)
    ours, theirs = make_state(), make_state()
    applied = [bool(state.applied) for state in lk.run(step, ours, broken, max_epochs=1)]
    lk.run(CLIP(classifier), theirs, data, max_epochs=1).finish()
    assert applied == [True] * 5 + [False] + [True] * 3
    torch.testing.assert_close(
        ours.model.state_dict(), theirs.model.state_dict(), rtol=1e-4, atol=1e-5
    )


# Checkpoints

SAVED = {
    "plain": [],
    "averages": [lk.with_ema(0.9), lk.with_swa(2)],
    "schedule and skip": [SCHEDULE, SKIP],
    "fp16": [lk.with_amp("fp16", init_scale=2.0**20)],
    "noise": [lk.with_grad_noise(0.01)],
}


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(name, optimizer, tmp_path):
    """Bit for bit, with dropout that the device draws, from a shuffled loader."""
    inputs, labels = (torch.cat(column) for column in zip(*make_batches(8), strict=True))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=5, shuffle=True)
    step = lk.compose(*SAVED[name])(classifier)
    whole = make_state(optimizer, dropout=0.4)
    lk.run(step, whole, loader, max_epochs=2).finish()

    stopped = make_state(optimizer, dropout=0.4)
    lk.run(step, stopped, loader, max_steps=5).finish()
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(stopped)
    resumed = make_state(optimizer, dropout=0.4, seed=9)
    torch.manual_seed(99)
    with lk.Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.restore(resumed)
    lk.run(step, resumed, loader, max_epochs=2).finish()
    assert resumed.step == whole.step == 16
    assert_bitwise_equal(resumed.state_dict(), whole.state_dict())


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """Updates that follow at once, while the copy is written, do not reach it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).to(DEVICE)
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), fused=True))
    step = lk.train_step(lambda state, x: state.model(x).square().mean())
    data = torch.randn(4, 64, 512, device=DEVICE)
    with lk.Checkpointer(tmp_path) as checkpoints:
        for round_ in range(3):  # the second uses the memory of the first again
            state = step(state, data[round_])
            wanted = copy.deepcopy(state.state_dict())
            checkpoints.save(state)
            for _ in range(5):
                state = step(state, data[3])
            checkpoints.wait()
            fresh = lk.TrainState(copy.deepcopy(model))
            assert checkpoints.restore(fresh)
            assert_bitwise_equal(fresh.model.state_dict(), wanted["model"])
    assert not torch.equal(fresh.model[0].weight, model[0].weight)


def test_evaluating_draws_no_random_number_of_the_training():
    """The device's generator is left as it was, and the figures are those of the CPU."""
    state, data = make_state(), make_batches(6)
    draw = {"metric": MulticlassAccuracy(3)}

    def step(state, batch):
        logits = state.model(batch[0])
        noise = torch.rand((), device=logits.device)
        loss = F.cross_entropy(logits, batch[1]) + 0 * noise
        return {"loss": loss, "preds": logits, "target": batch[1]}

    torch.manual_seed(3)
    wanted = torch.rand(3, device=DEVICE)
    torch.manual_seed(3)
    scores = lk.evaluate(step, state, data, draw)
    assert_bitwise_equal(torch.rand(3, device=DEVICE), wanted)
    state.model.cpu()
    on_host = lk.evaluate(step, state, data, {"metric": MulticlassAccuracy(3)})
    assert scores == pytest.approx(on_host, rel=1e-5)


# Prefetching


@only_cuda
def test_memory_of_a_batch_is_not_written_while_it_is_read():
    """A batch that was given up is whole for what still has to compute on it."""
    found = []
    for batch in lk.prefetch((torch.full((1 << 20,), i) for i in range(12)), DEVICE):
        torch.cuda._sleep(20_000_000)  # the host is far ahead when the sum is made
        found.append(batch.sum())
        del batch
    assert [int(total) >> 20 for total in found] == [*range(12)]


def test_batches_that_are_there_pass_through():
    """The same objects, in order, whatever else they hold; others among them are copied."""
    here = [{"x": torch.full((3,), i, device=DEVICE), "name": str(i)} for i in range(4)]
    mixed = [here[0], {"x": torch.full((3,), 7), "name": "7"}, *here[1:]]
    device = here[0]["x"].device
    found = [*lk.prefetch(mixed, device)]
    assert found[0] is here[0]
    assert all(a is b for a, b in zip(found[2:], here[1:], strict=True))
    assert found[1]["x"].device == device
    assert found[1]["x"].tolist() == [7, 7, 7]


@only_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_prefetching_waits_for_the_device_it_copies_to():
    """Another device may be the current one."""
    target = torch.device("cuda", 1)
    data = (torch.full((1 << 24,), i).pin_memory() for i in range(6))
    found = [batch.sum() for batch in lk.prefetch(data, target)]
    assert [int(total) >> 24 for total in found] == [*range(6)]


# Strategies, over one process


@pytest.fixture
def group():
    """A process group of one process, on the host and on the device."""
    store = dist.HashStore()
    dist.init_process_group(store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


STRATEGIES = {
    "ddp": lk.DDP(),
    "fsdp": lk.FSDP(),
    "fsdp, weights on the host": lk.FSDP(cpu_offload=True),
}


def spread(state, name):
    """The state as the strategy has it; `distributed` does nothing with one process."""
    state.ranks = STRATEGIES[name].set_up(state)
    return state


def whole(tensors):
    """Named tensors, put together, on the host."""
    full = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in tensors.items()}
    return {name: tensor.detach().cpu() for name, tensor in full.items()}


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_as_the_loop_by_hand(group, strategy, name):
    """Weights and averages after 20 updates; the model computes where it did before."""
    layers, function, by_hand, settings = MATRIX[name]
    data = make_batches(60 if "accumulate" in settings else 20)
    ours, theirs = spread(make_state("adamw"), strategy), make_state("adamw")
    assert ours.device.type == DEVICE.type
    step = lk.compose(*layers, lk.distributed())(function)
    applied = [bool(state.applied) for state in lk.run(step, ours, data, max_epochs=1)]
    found = train_by_hand(by_hand, theirs, on_device(data), **settings)
    assert applied == found.applied
    mine, its = whole(ours.model.state_dict()), whole(theirs.model.state_dict())
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    if "ema" in settings:
        averages = whole(ours.features["ema"].weights)
        torch.testing.assert_close(averages, whole(found.averages), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_update_of_a_strategy_waits_for_the_device(group, strategy):
    """With weights that are numbers of the host or tensors of the device."""
    for function in (
        counting,
        lambda state, batch: {"loss": classifier(state, batch), "weight": 5},
    ):
        state = spread(make_state(), strategy)
        step = lk.compose(CLIP, lk.with_grad_accum(3), lk.distributed())(function)
        updates = iter(lk.run(step, state, on_device(make_batches(60)), max_epochs=1))
        for _ in range(4):
            next(updates)
        with no_waits():
            for state in updates:
                assert state.loss.ndim == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_spread_state_is_restored_bit_for_bit(group, strategy, tmp_path):
    """Weights, optimizer, averages and random numbers, also of weights that lie on the host."""
    step = lk.compose(lk.with_ema(0.9), lk.distributed())(classifier)
    data = make_batches(8)
    straight = spread(make_state("adamw", dropout=0.4), strategy)
    lk.run(step, straight, data, max_epochs=2).finish()
    stopped = spread(make_state("adamw", dropout=0.4), strategy)
    lk.run(step, stopped, data, max_steps=5).finish()
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(stopped)
    resumed = spread(make_state("adamw", dropout=0.4, seed=9), strategy)
    with lk.Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.restore(resumed)
    lk.run(step, resumed, data, max_epochs=2).finish()
    assert resumed.step == straight.step == 16
    for a, b in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert a.device == b.device
        for mine, its in zip(
            [a, *resumed.optimizer.state[a].values()],
            [b, *straight.optimizer.state[b].values()],
            strict=True,
        ):
            assert_bitwise_equal(whole({"": mine}), whole({"": its}))
    averages = [whole(state.features["ema"].weights) for state in (resumed, straight)]
    assert_bitwise_equal(*averages)
