"""Timing: where the time goes, by a clock that the test moves."""

import loopkit as lk
import pytest
import torch

from problems import classifier, make_batches, make_state

PARTS = ["data", "forward", "backward", "update", "loop"]


@pytest.fixture
def tick(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr("loopkit.observe.stopwatch.time.perf_counter", lambda: now[0])
    return now


class Slow(torch.autograd.Function):
    """Takes a second in its backward pass."""

    @staticmethod
    def forward(ctx, x, now):
        ctx.now = now
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.now[0] += 3.0
        return gradient, None


def training(now, *decorators):
    """Data takes 1, forward 2, backward 3, the optimizer 4 seconds, and the loop's body 10."""

    def step(state, batch):
        now[0] += 2.0
        return Slow.apply(classifier(state, batch), now)

    class SlowSGD(torch.optim.SGD):
        def step(self, closure=None):
            now[0] += 4.0
            return super().step(closure)

    def data():
        for batch in make_batches(4):
            now[0] += 1.0
            yield batch

    state = make_state()
    state = lk.TrainState(state.model, SlowSGD(state.model.parameters(), lr=0.1))
    return lk.compose(*decorators)(step), state, data


def test_step_and_run_together_tell_everything_apart(tick):
    """Seconds of each part are those that were spent there; shares add up to 1."""
    timing = lk.Timing()
    step, state, data = training(tick)
    for _ in timing(lk.run(timing(step), state, [*data()], max_epochs=1)):
        tick[0] += 10.0
    assert timing.updates == 3
    assert timing.seconds == {"data": 0, "forward": 2, "backward": 3, "update": 4, "loop": 10}

    timing = lk.Timing()
    for _ in timing(lk.run(timing(step), state, data(), max_steps=8)):
        tick[0] += 10.0
    seconds = timing.seconds
    assert (seconds["forward"], seconds["backward"], seconds["update"]) == (2, 3, 4)
    assert 0 < seconds["data"] <= 1.0  # one batch is read ahead, so the last update reads none
    assert sum(timing.shares.values()) == pytest.approx(1.0)
    assert [*timing.shares] == PARTS


@pytest.mark.parametrize("outside", [True, False])
def test_windows_add_their_micro_batches(tick, outside):
    """Forward and backward of an update are those of all its micro-batches, and reading is data."""
    timing = lk.Timing(warmup=0)
    step, state, _ = training(tick)

    class Sized(list):
        def __iter__(self):
            for item in super().__iter__():
                tick[0] += 1.0
                yield item

    step = timing(lk.with_grad_accum(2)(step)) if outside else lk.with_grad_accum(2)(timing(step))
    for _ in timing(lk.run(step, state, Sized(make_batches(4)), max_epochs=1)):
        pass
    assert timing.updates == 2
    assert timing.seconds == {"data": 2, "forward": 4, "backward": 6, "update": 4, "loop": 0}


def test_the_step_alone_tells_forward_backward_and_update(tick):
    """In a loop by hand there is no data and no body that it could know of."""
    timing = lk.Timing()
    step, state, data = training(tick)
    step = timing(step)
    for batch in data():
        tick[0] += 5.0
        step(state, batch)
    assert timing.updates == 3
    assert timing.seconds == {"forward": 2, "backward": 3, "update": 4}


def test_the_run_alone_tells_updates_and_the_loops_body(tick):
    """Without the step an update is one piece."""
    timing = lk.Timing()
    step, state, data = training(tick)
    for _ in timing(lk.run(step, state, [*data()], max_epochs=1)):
        tick[0] += 10.0
    assert timing.seconds == {"update": 9, "loop": 10}


def test_timing_changes_no_bit_and_prints_a_table(tick):
    """Weights are those of the run that is not timed; the table names each part with its share."""
    plain, timed, timing = make_state("dropout"), make_state("dropout"), lk.Timing()
    for state, clock in ((plain, None), (timed, timing)):
        torch.manual_seed(3)
        step = lk.with_grad_accum(2)(classifier)
        run = lk.run(clock(step) if clock else step, state, make_batches(), max_epochs=1)
        list(clock(run) if clock else run)
    assert all(map(torch.equal, plain.model.parameters(), timed.model.parameters()))
    text = str(timing)
    assert all(part in text for part in PARTS)
    assert "over 3 updates" in text


def test_an_update_that_fails_is_not_counted_into_the_next(tick):
    """After an error the clock starts anew with the next update."""
    timing = lk.Timing(warmup=0)
    step, state, _ = training(tick)
    step = timing(step)
    with pytest.raises(RuntimeError):
        list(timing(lk.run(step, state, [(torch.ones(2, 99), torch.zeros(2))], max_epochs=1)))
    tick[0] += 1000.0
    step(state, make_batches(1)[0])
    assert timing.seconds == {"forward": 2, "backward": 3, "update": 4}


def test_a_wrong_use_is_an_error_that_teaches():
    """Neither a step nor a run, and a warm-up that is none."""
    with pytest.raises(lk.UsageError, match="int"):
        lk.Timing()(3)
    with pytest.raises(lk.UsageError, match="warmup = -1"):
        lk.Timing(warmup=-1)
