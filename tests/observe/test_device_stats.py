"""On a GPU: observing does not wait for it, and its numbers and times are right."""

import io
import json
import time

import loopkit as lk
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def training(width=512):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)).cuda()
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = [(torch.randn(64, width), torch.randint(10, (64,))) for _ in range(30)]

    def step(state, batch):
        logits = state.model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": logits.mean()}

    return step, state, [tuple(t.cuda() for t in batch) for batch in data]


def test_nothing_waits_for_the_device(tmp_path):
    """Log, progress, throughput and timing, all at once, pass where torch forbids to wait."""
    step, state, data = training()
    list(lk.run(step, state, data, max_steps=2))
    timing = lk.Timing()
    log = lk.Log(tmp_path, "jsonl", "csv")
    run = lk.throughput(timing(lk.run(timing(step), state, data, max_steps=25)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for state in lk.progress(log.wrap(run, every=1), file=io.StringIO()):
            if state.step == 24:  # what ends a run may wait
                break
    finally:
        torch.cuda.set_sync_debug_mode("default")
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(3, 25)]
    plain_step, plain, plain_data = training()
    losses = [float(s.loss) for s in lk.run(plain_step, plain, plain_data, max_steps=24)]
    assert [row["loss"] for row in rows] == losses[2:]


def test_times_are_the_devices_own():
    """A step whose kernels take long is not shown as the short time in which they were launched."""
    model = nn.Linear(4096, 4096).cuda()
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    data = [torch.randn(4096, 4096, device="cuda")] * 20
    timing = lk.Timing()

    def step(state, x):
        for _ in range(10):
            x = state.model(x)
        return x.square().mean()

    speed = lk.throughput(lk.run(timing(step), state, data, max_epochs=1), flops="count")
    started = time.perf_counter()
    list(timing(speed))
    torch.cuda.synchronize()
    passed = time.perf_counter() - started
    whole = sum(timing.seconds.values()) * timing.updates
    assert whole == pytest.approx(passed, rel=0.5)
    assert timing.shares["backward"] > timing.shares["forward"] > 0.1
    assert speed.rates["flops_per_s"] > 1e12


def test_the_row_of_the_device_has_its_memory():
    """In GiB, as torch's allocator says."""
    _, state, _ = training()
    row = lk.device_stats(state)
    assert row["device/memory_gib"] == pytest.approx(torch.cuda.memory_allocated() / 2**30)
    assert row["device/peak_gib"] >= row["device/memory_gib"]


def test_the_trace_holds_kernels(tmp_path):
    """The Chrome trace has what ran on the device."""
    step, state, data = training()
    found = lk.profile(lk.run(step, state, data, max_steps=8), tmp_path)
    list(found)
    events = json.loads(found.traces[0].read_text())["traceEvents"]
    assert [event for event in events if event.get("cat") == "kernel"]


def test_a_summary_is_made_on_the_device():
    """Shapes and FLOPs are those of the CPU."""
    _, state, data = training()
    assert lk.summary(state, data[0][0]).flops == 2 * 64 * (512 * 512 + 512 * 10)
