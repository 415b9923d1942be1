"""Ctrl-C: it waits for the end of an update, and leaves a state to go on from."""

import contextlib
import json
import os
import signal
import sys
import textwrap
import threading

import loopkit as lk
import pytest
import torch
from loopkit.interrupt import Notice
from loopkit.testing import assert_bitwise_equal

from feeds import mean_output, numbered, tiny_state
from forked import STARTER

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def handler():
    """Python's own handler before each test, and whatever was there after it."""
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, outer)


class InterruptedAt:
    """A step function that is sent SIGINT in one of its calls, some number of times."""

    def __init__(self, call, times=1):
        self.call, self.times, self.calls, self.came_through = call, times, 0, False

    def __call__(self, state, batch):
        self.calls += 1
        if self.calls == self.call:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
            self.came_through = True
        return mean_output(state, batch)


@pytest.mark.parametrize("window", [1, 3])
def test_an_interrupt_within_an_update_waits_for_its_end(window, handler):
    """The state after Ctrl-C is the state after a whole update, bit for bit; it can go on."""
    function, state, other = InterruptedAt(2 * window - window // 2), tiny_state(), tiny_state()
    step, data = lk.with_grad_accum(window)(function), numbered(4 * window)
    with pytest.raises(KeyboardInterrupt):
        for _ in lk.run(step, state, data, max_epochs=1):
            pass
    assert function.came_through
    for _ in lk.run(lk.with_grad_accum(window)(mean_output), other, data, max_steps=2):
        pass
    assert_bitwise_equal(state.state_dict(), other.state_dict())
    assert signal.getsignal(signal.SIGINT) is handler
    assert [s.step for s in lk.run(step, state, data, max_epochs=1)] == [3, 4]


def test_an_interrupt_in_the_last_update_of_an_epoch_keeps_the_epochs_end():
    """The run that goes on begins the next epoch."""
    state, data = tiny_state(), numbered(3)
    with pytest.raises(KeyboardInterrupt):
        for _ in lk.run(InterruptedAt(3), state, data):
            pass
    assert (state.step, state.epoch_end) == (3, True)
    assert next(lk.run(mean_output, state, data)).epoch == 1


def test_a_signal_from_outside_waits_for_a_slow_update():
    """SIGINT sent by another thread in the middle of a slow step comes after its end."""
    state, begun, sent = tiny_state(), threading.Event(), threading.Event()

    def slow(state, batch):
        begun.set()
        assert sent.wait(60)
        return mean_output(state, batch)

    def send():
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        next(lk.run(slow, state, numbered(3)))
    sender.join()
    assert (state.step, state.batch) == (1, 1)


def test_a_second_interrupt_does_not_wait(handler):
    """Who presses Ctrl-C twice is let out of the middle of an update."""
    function, state = InterruptedAt(2, times=2), tiny_state()
    with pytest.raises(KeyboardInterrupt) as raised:
        for _ in lk.run(function, state, numbered(3)):
            pass
    assert not function.came_through
    assert raised.value.__context__ is None
    assert state.step == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_is_not_lost_in_an_update_that_fails(handler):
    """Where the update raises after Ctrl-C, KeyboardInterrupt follows, from that error."""

    def failing(state, batch):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("a worker has died")

    with pytest.raises(KeyboardInterrupt) as raised:
        next(lk.run(failing, tiny_state(), numbered(3)))
    assert isinstance(raised.value.__context__, RuntimeError)
    assert signal.getsignal(signal.SIGINT) is handler


def interrupt_in_the_body(updates):
    for _ in updates:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_between_updates_is_as_always():
    """In the loop's body, and while the data is read, Ctrl-C acts at once."""
    state = tiny_state()
    with pytest.raises(KeyboardInterrupt):
        interrupt_in_the_body(lk.run(mean_output, state, numbered(3)))
    assert state.step == 1

    def batches():
        yield torch.ones(1, 1)
        yield torch.ones(1, 1)
        signal.raise_signal(signal.SIGINT)

    state = tiny_state()
    with pytest.raises(KeyboardInterrupt):
        for _ in lk.run(mean_output, state, batches()):
            pass
    assert state.step == 2


def test_a_handler_of_the_users_is_called_after_the_update():
    """What handled SIGINT before handles it, once for each signal, at the update's end."""
    steps, state = [], tiny_state()
    signal.signal(signal.SIGINT, lambda *_: steps.append(state.step))
    for _ in lk.run(InterruptedAt(2), state, numbered(3), max_epochs=1):
        pass
    assert steps == [2]


def test_a_handler_that_the_body_sets_is_kept():
    """The run puts the former handler back only where its own still stands."""

    def mine(*_):
        pass

    for _ in lk.run(mean_output, tiny_state(), numbered(3), max_epochs=1):
        signal.signal(signal.SIGINT, mine)
    assert signal.getsignal(signal.SIGINT) is mine


def test_an_ignored_signal_stays_ignored():
    """Under SIG_IGN, as with nohup, nothing is installed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in lk.run(InterruptedAt(2), tiny_state(), numbered(3), max_epochs=1):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def stop_by_break(updates):
    for _ in updates:
        break


def close(updates):
    next(updates)
    updates.close()


@pytest.mark.parametrize("use", [list, stop_by_break, close, interrupt_in_the_body])
def test_the_former_handler_is_back_after_the_run(use, handler):
    """Whether it ends, is broken off or fails, a run leaves the handler that it found."""
    with contextlib.suppress(KeyboardInterrupt):
        use(lk.run(mean_output, tiny_state(), numbered(3), max_epochs=1))
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("first", [0, 1])
def test_runs_that_overlap_put_the_former_handler_back(first, handler):
    """Whichever of two interleaved runs ends first, none leaves its handler behind."""
    runs = [lk.run(mean_output, tiny_state(), numbered(3), max_epochs=1) for _ in range(2)]
    for run in runs:
        next(run)
    runs[first].close()
    next(runs[1 - first])
    runs[1 - first].close()
    assert signal.getsignal(signal.SIGINT) is handler


def test_interleaved_runs_each_wait_for_their_own_update():
    """An interrupt within one run's update comes at its end, with the other run suspended."""
    one, two = tiny_state(), tiny_state()
    with (
        lk.run(InterruptedAt(2), one, numbered(5)) as first,
        lk.run(mean_output, two, numbered(5)) as second,
    ):
        next(first), next(second)
        with pytest.raises(KeyboardInterrupt):
            next(first)
        assert (one.step, next(second).step) == (2, 2)


def test_a_run_in_another_thread_leaves_signals_alone(handler):
    """Only the main thread may set handlers; elsewhere a run works without."""
    found = []

    def train():
        updates = lk.run(mean_output, tiny_state(), numbered(3), max_epochs=1)
        found.extend((state.step, signal.getsignal(signal.SIGINT)) for state in updates)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [(1, handler), (2, handler), (3, handler)]


def test_a_run_may_be_closed_in_another_thread():
    """Its handler then stays, but passes interrupts on at once."""
    updates = lk.run(mean_output, tiny_state(), numbered(3))
    next(updates)
    thread = threading.Thread(target=updates.close)
    thread.start()
    thread.join()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_end_of_a_child_that_comes_with_the_signal_is_no_error():
    """A job's workers die of its SIGTERM: of both signals at once the one is taken, and no more."""

    def fails(signum, frame):
        raise RuntimeError("a worker has died")

    both = {signal.SIGTERM, signal.SIGCHLD}
    before = signal.signal(signal.SIGCHLD, fails)
    try:
        with Notice([signal.SIGTERM]) as notice:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, both)
            signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGCHLD)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert notice.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGCHLD) is fails
    finally:
        signal.signal(signal.SIGCHLD, before)


SCRIPT = """
import json, os, sys, time
import loopkit as lk
from feeds import Samples, children, loader, mean_output, tiny_state

def slow(state, batch):
    print("batch", flush=True)
    time.sleep(0.05)
    return mean_output(state, batch)

state = tiny_state()
step = lk.with_grad_accum(int(sys.argv[1]))(slow)
try:
    for state in lk.run(step, state, loader(10_000, 2)):
        pass
except KeyboardInterrupt as kept:
    print(json.dumps([state.step, state.batch, state.samples, len(children())]), flush=True)
"""


@pytest.mark.parametrize("window", [1, 4])
def test_ctrl_c_at_a_terminal_ends_the_workers_and_keeps_whole_updates(window):
    """SIGINT to the whole group, workers included, ends in KeyboardInterrupt and a whole state."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with STARTER.begin(textwrap.dedent(SCRIPT), window, env=env, strict=False) as child:
        for _ in range(6):
            assert child.stdout.readline() == "batch\n"
        os.killpg(child.pid, signal.SIGINT)
        out, err = child.communicate()
    assert child.returncode == 0, err
    step, batch, samples, workers = json.loads(out.splitlines()[-1])
    assert step >= 1
    assert (batch, samples, workers) == (step * window, step * window, 0)
