"""Throughput: rates in the time of the updates, by what was counted."""

import itertools
import math

import loopkit as lk
import pytest
import torch
from loopkit.observe.peak import peak_of
from torch.nn import functional as F

from problems import classifier, make_batches, make_state, weighted_classifier


@pytest.fixture
def tick(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr("loopkit.observe.stopwatch.time.perf_counter", lambda: now[0])
    return now


def slow(step, now, seconds):
    def timed(state, batch):
        now[0] += next(seconds)
        return step(state, batch)

    return timed


def test_rates_are_of_the_updates_without_the_first_and_without_the_loops_body(tick):
    """By a clock that we move: samples over the time of updates 2 to 5, whatever the body takes."""
    step = slow(classifier, tick, iter([100.0, 1.0, 2.0, 1.0, 1.0]))
    speed = lk.throughput(lk.run(step, make_state(), make_batches(5, size=8), max_epochs=1))
    found = []
    for state in speed:
        found.append(speed.samples_per_s)
        assert state.metrics.get("samples_per_s", torch.tensor(math.nan)).item() == pytest.approx(
            speed.samples_per_s, nan_ok=True
        )
        tick[0] += 50.0  # an evaluation
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([8 / 1, 16 / 3, 24 / 4, 32 / 5])


def test_the_window_forgets_what_is_long_ago(tick):
    """With window=2 the rate is that of the last two updates."""
    step = slow(classifier, tick, iter([1.0, 4.0, 4.0, 1.0, 1.0]))
    speed = lk.throughput(
        lk.run(step, make_state(), make_batches(5, size=8), max_epochs=1), window=2
    )
    list(speed)
    assert speed.samples_per_s == pytest.approx(16 / 2)


def test_padding_is_no_token(tick):
    """Tokens are what the losses are means over: labels of -100 do not count."""
    batches = make_batches(4, size=8)
    for _, labels in batches:
        labels[3:] = -100
    step = slow(lk.with_grad_accum(2)(weighted_classifier).function, tick, itertools.repeat(0.5))
    speed = lk.throughput(lk.run(lk.with_grad_accum(2)(step), make_state(), batches, max_epochs=1))
    list(speed)
    assert speed.tokens_per_s == pytest.approx(6.0)  # one update of two micro-batches, three each
    assert speed.samples_per_s == pytest.approx(16.0)


def test_tokens_can_be_counted_by_a_function(tick):
    """A function of the state says how many, also as a tensor."""
    step = slow(classifier, tick, itertools.repeat(1.0))
    speed = lk.throughput(
        lk.run(step, make_state(), make_batches(3), max_epochs=1),
        tokens=lambda state: torch.tensor(512),
    )
    list(speed)
    assert speed.tokens_per_s == 512


def test_flops_are_counted_once_and_go_with_the_samples(tick):
    """For y = Wx the FLOPs are known: 2 m n for each sample forward, as much for W's gradient."""
    model = torch.nn.Linear(64, 32, bias=False)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = [torch.randn(16, 64), torch.randn(16, 64), torch.randn(4, 64)]
    step = slow(lambda s, x: F.mse_loss(s.model(x), x[:, :32]), tick, itertools.repeat(0.5))
    speed = lk.throughput(
        lk.run(step, state, data, max_epochs=1), flops="count", peak_flops=1e6, window=1
    )
    found = [speed.rates for _ in speed]
    each = 2 * 2 * 64 * 32
    assert found[1]["flops_per_s"] == pytest.approx(16 * each / 0.5)
    assert found[2]["flops_per_s"] == pytest.approx(4 * each / 0.5)
    assert speed.mfu == pytest.approx(4 * each / 0.5 / 1e6)


def test_attention_is_counted_forward_and_backward():
    """On the CPU too: two products forward, five backward (one makes the scores again)."""

    def step(state, x):
        q, k, v = state.model(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).square().mean()

    model = torch.nn.Linear(16, 48, bias=False)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    speed = lk.throughput(
        lk.run(step, state, [torch.randn(3, 5, 16)] * 2, max_epochs=1), flops="count"
    )
    list(speed)
    product, linear = 2 * 3 * 2 * 5 * 5 * 8, 2 * 15 * 16 * 48
    assert speed._meter._flops_each == ("samples", (7 * product + 2 * linear) / 3)


def test_counting_flops_changes_no_bit(tick):
    """The first update under the counter gives the weights that it gives without."""
    plain, counted = make_state("dropout"), make_state("dropout")
    torch.manual_seed(3)
    list(lk.run(classifier, plain, make_batches(), max_epochs=1))
    torch.manual_seed(3)
    list(lk.throughput(lk.run(classifier, counted, make_batches(), max_epochs=1), flops="count"))
    assert all(map(torch.equal, plain.model.parameters(), counted.model.parameters()))


def test_flops_may_be_given(tick):
    """As a number for each update, or as a function of the state."""
    for flops in (3e9, lambda state: 3e9):
        step = slow(classifier, tick, itertools.repeat(0.5))
        run = lk.run(step, make_state(), make_batches(3), max_epochs=1)
        speed = lk.throughput(run, flops=flops, peak_flops=12e9)
        list(speed)
        assert speed.mfu == pytest.approx(0.5)


def test_on_the_cpu_there_is_no_peak_to_compare_with():
    """Without a known peak there is no mfu, rather than a wrong one."""
    speed = lk.throughput(
        lk.run(classifier, make_state(), make_batches(3), max_epochs=1), flops="count"
    )
    list(speed)
    assert math.isnan(speed.mfu)
    assert speed.rates["flops_per_s"] > 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10G", 70e12), ("Tesla T4", 65e12)],
)  # fmt: skip
def test_peaks_go_by_the_longest_name(name, peak):
    """An A10G is no A10, an L40S no L4, an H100 PCIe no H100 SXM."""
    assert peak_of(name) == peak


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda: lk.throughput(lk.train_step(classifier)), "Step"),
        (lambda: lk.throughput([], window=0), "window = 0"),
        (lambda: lk.throughput([], flops="auto"), "'auto'"),
        (lambda: lk.throughput([], flops=-1), "flops = -1"),
        (lambda: lk.throughput([], tokens=512), "int"),
        (lambda: list(lk.throughput([make_state()], peak_flops=0)), "peak_flops = 0"),
    ],
)
def test_a_wrong_use_is_an_error_that_teaches(wrong, found):
    """It names what was found."""
    with pytest.raises(lk.UsageError) as caught:
        wrong()
    assert found in str(caught.value)
