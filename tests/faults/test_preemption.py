"""A run that is asked to stop: saved once, left between updates, and gone on with as if nothing."""

import errno
import os
import signal
import textwrap
import threading
import time
from pathlib import Path

import loopkit as lk
import pytest
import torch
from disks import Faulty
from loopkit.checkpoint.preemption import SIGNALS

from forked import STARTER
from trainings import STEPS, digest_of, make_batches, make_state, restored, train

ROOT = Path(__file__).parents[2]
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
STEP = STEPS["ema"]


@pytest.fixture(autouse=True)
def handlers():
    """Python's handlers before each test, and whatever was there after it."""
    usual = {TERM: signal.SIG_DFL, USR1: signal.SIG_DFL, INT: signal.default_int_handler}
    outer = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield usual
    for signum, handler in outer.items():
        signal.signal(signum, handler)


def found():
    """The handlers that are installed now."""
    return {signum: signal.getsignal(signum) for signum in (TERM, USR1, INT)}


class SentAt:
    """A step function that is sent a signal in the midst of one of its calls."""

    def __init__(self, call, signum):
        self.call, self.signum, self.calls = call, signum, 0

    def __call__(self, state, batch):
        self.calls += 1
        loss = STEPS["plain"].forward(state, batch)
        if self.calls == self.call:
            signal.raise_signal(self.signum)
        return loss


def whole(updates, step=STEP):
    """The digest of a run that nobody stopped."""
    state = make_state()
    for _ in lk.run(step, state, make_batches(), max_steps=updates):
        pass
    return digest_of(state)


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_within_an_update_stops_after_it_and_nothing_is_lost(
    tmp_path, signum, asynchronous, handlers
):
    """The update is finished and saved, the code is 128 + n, and the rest makes the same run."""
    state, step = make_state(), lk.with_ema(0.8)(SentAt(3, signum))
    checkpoints = lk.Checkpointer(tmp_path, async_save=asynchronous)
    with pytest.raises(lk.Preempted) as stop:
        for _ in lk.preemptible(lk.run(step, state, make_batches(), max_steps=9), checkpoints):
            assert found() != handlers
    assert (stop.value.code, stop.value.signum, state.step) == (128 + signum, signum, 3)
    assert found() == handlers
    assert restored(tmp_path) == digest_of(state)
    again = make_state(seed=5)
    assert checkpoints.restore(again)
    train(again, 6, "ema")
    assert digest_of(again) == whole(9)
    checkpoints.close()


def test_a_signal_within_the_body_stops_after_it_and_its_save_is_not_repeated(tmp_path):
    """What the body still does is done; if it saves, with scores, that one is the last."""
    state, bodies = make_state(), []
    with lk.Checkpointer(tmp_path, monitor="loss") as checkpoints, pytest.raises(lk.Preempted):
        for _ in lk.preemptible(lk.run(STEP, state, make_batches()), checkpoints):
            if state.step == 2:
                signal.raise_signal(TERM)
                checkpoints.save(state, {"loss": 0.5})
                bodies.append(state.step)
    assert bodies == [2]
    assert [(c.step, dict(c.scores)) for c in checkpoints.list()] == [(2, {"loss": 0.5})]


def test_the_time_limit_stops_as_a_signal_does(tmp_path):
    """The first update after the time is up is the last; the code is that of SIGALRM."""
    state = make_state()
    with lk.Checkpointer(tmp_path) as checkpoints, pytest.raises(lk.Preempted) as stop:
        for _ in lk.preemptible(
            lk.run(STEP, state, make_batches()), checkpoints, max_time={"seconds": 0.2}
        ):
            time.sleep(0.05 if state.step < 3 else 0.2)
    assert stop.value.code == 128 + signal.SIGALRM
    assert state.step <= 3
    assert restored(tmp_path) == digest_of(state)


def test_the_same_signal_twice_at_once_is_one_and_a_later_one_does_not_wait(tmp_path):
    """What a launcher doubles is one request; who sends a second one after a second is let out."""
    state, came_through = make_state(), []

    def slow(state, batch):
        signal.raise_signal(TERM)
        signal.raise_signal(INT)
        came_through.append(state.step)
        if state.step == 1:
            time.sleep(1.1)
            signal.raise_signal(INT)
            came_through.append("never")
        return STEPS["plain"].forward(state, batch)

    with lk.Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(lk.Preempted) as stop:
            next(updates := lk.preemptible(lk.run(slow, state, make_batches()), checkpoints))
            next(updates)
        assert (stop.value.code, state.step) == (143, 1)
        with pytest.raises(KeyboardInterrupt):
            next(lk.preemptible(lk.run(slow, state, make_batches()), checkpoints))
    assert came_through == [0, 1]
    assert [checkpoint.step for checkpoint in checkpoints.list()] == [1]


def eval_step(state, batch):
    inputs, labels = batch
    torch.rand(1)  # which the training must not notice
    return torch.nn.functional.cross_entropy(state.model(inputs), labels)


class Interrupted:
    """Batches, with a signal while the second is read."""

    def __init__(self, signum=USR1):
        self.signum, self.read = signum, 0

    def __iter__(self):
        for batch in make_batches():
            self.read += 1
            if self.read == 2:
                signal.raise_signal(self.signum)
            yield batch


@pytest.mark.parametrize("of", ["the state", "its averages", "a snapshot"])
def test_an_evaluation_stops_between_two_batches(tmp_path, of):
    """It leaves early; saved is the state of the training, its modes and random numbers too."""
    state, data = make_state(), Interrupted()
    with lk.Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(lk.Preempted) as stop:
            for _ in lk.preemptible(lk.run(STEP, state, make_batches()), checkpoints):
                if state.step == 3 and of == "a snapshot":
                    branch = state.snapshot()
                    torch.nn.init.zeros_(branch.model[0].weight)
                    lk.evaluate(eval_step, branch, data)
                elif state.step == 3 and of == "its averages":
                    with lk.ema_weights(state):
                        lk.evaluate(eval_step, state, data)
                elif state.step == 3:
                    lk.evaluate(eval_step, state, data)
        assert (stop.value.code, data.read, state.step) == (138, 2, 3)
        assert all(module.training for module in state.model.modules())
        assert [checkpoint.step for checkpoint in checkpoints.list()] == [3]
        again = make_state(seed=5)
        checkpoints.restore(again)
        assert digest_of(again) == whole(3)
        train(again, 6, "ema")
    assert digest_of(again) == whole(9)


def test_an_evaluation_outside_of_such_a_run_is_not_stopped(tmp_path, handlers):
    """Before it, after it, and of a copy that is kept after it: signals are as always."""
    state = make_state()
    with lk.Checkpointer(tmp_path) as checkpoints:
        for _ in lk.preemptible(lk.run(STEP, state, make_batches(), max_steps=2), checkpoints):
            branch = state.snapshot()
            if state.step == 2:
                signal.raise_signal(TERM)
                break
    assert found() == handlers
    assert state.preemption is None
    for one in (state, branch):
        with pytest.raises(KeyboardInterrupt):
            lk.evaluate(eval_step, one, Interrupted(INT))
        assert lk.evaluate(eval_step, one, make_batches())["loss"] > 0


def test_a_break_with_a_signal_pending_saves_and_goes_on(tmp_path):
    """The state is saved; what follows the loop is the script's."""
    state = make_state()
    with lk.Checkpointer(tmp_path) as checkpoints:
        for _ in lk.preemptible(lk.run(STEP, state, make_batches()), checkpoints):
            if state.step == 2:
                signal.raise_signal(TERM)
                break
        assert checkpoints.latest.step == 2
        for _ in lk.preemptible(lk.run(STEP, state, make_batches()), checkpoints):
            if state.step == 4:
                break  # without a signal nothing is saved
        assert checkpoints.latest.step == 2


def test_a_signal_at_the_last_update_keeps_what_follows_for_the_next_start(tmp_path):
    """The run is at its end, but the process stops; the next start makes no update more."""
    state = make_state()
    with lk.Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(lk.Preempted):
            for _ in lk.preemptible(lk.run(STEP, state, make_batches(), max_steps=2), checkpoints):
                if state.step == 2:
                    signal.raise_signal(TERM)
        again = make_state()
        checkpoints.restore(again)
        run = lk.run(STEP, again, make_batches(), max_steps=2)
        assert [*lk.preemptible(run, checkpoints)] == []


@pytest.mark.parametrize("use", [list, next, "break", "error"])
def test_the_former_handlers_are_back_after_the_loop(tmp_path, use, handlers):
    """Whether it ends, is dropped, is broken off or fails; and an ignored signal stays ignored."""
    signal.signal(USR1, signal.SIG_IGN)
    run = lk.run(STEP, make_state(), make_batches(), max_steps=3)
    updates = lk.preemptible(run, lk.Checkpointer(tmp_path))
    assert updates.total_steps == 3
    if callable(use):
        use(updates)
        del updates
    else:
        with updates, pytest.raises(ValueError, match="mine"):
            for _ in updates:
                assert signal.getsignal(USR1) == signal.SIG_IGN
                if use == "error":
                    raise ValueError("mine")
                break
            raise ValueError("mine")
    assert found() == {**handlers, USR1: signal.SIG_IGN}
    assert [*tmp_path.iterdir()] == []


def test_iterators_compose_in_either_order(tmp_path):
    """Around a run that saves itself and shows its progress, and within it."""
    for order in ("around", "within"):
        state = make_state()
        with lk.Checkpointer(tmp_path / order, every=2) as checkpoints:
            updates = lk.run(STEP, state, make_batches())
            if order == "around":
                updates = lk.preemptible(checkpoints.wrap(lk.progress(updates)), checkpoints)
            else:
                updates = lk.progress(checkpoints.wrap(lk.preemptible(updates, checkpoints)))
            with pytest.raises(lk.Preempted):
                for _ in updates:
                    if state.step == 3:
                        signal.raise_signal(TERM)
        assert [checkpoint.step for checkpoint in checkpoints.list()] == [2, 3]
        assert restored(tmp_path / order) == digest_of(state)


def test_an_earlier_save_that_failed_does_not_keep_the_last_from_being_tried(tmp_path):
    """The disk that was full for a moment takes the last save; one that stays full is told."""
    for sticky in (False, True):
        state = make_state()
        disk = Faulty(3, errno.ENOSPC, sticky=sticky)
        checkpoints = lk.Checkpointer(
            tmp_path / str(sticky), options=lk.CheckpointOptions(disk=disk)
        )
        wanted = pytest.raises(lk.CheckpointError, match="No space") if sticky else pytest.raises(
            lk.Preempted
        )  # fmt: skip
        with wanted:
            for _ in lk.preemptible(lk.run(STEP, state, make_batches()), checkpoints):
                if state.step == 2:
                    checkpoints.save(state)
                    signal.raise_signal(TERM)
        assert restored(tmp_path / str(sticky)) == (None if sticky else digest_of(state))
        checkpoints.close()


def test_a_policy_that_drops_saves_does_not_drop_the_last(tmp_path):
    """It waits for the one that is being written."""
    state = make_state()
    options = lk.CheckpointOptions(when_busy="drop")
    with lk.Checkpointer(tmp_path, options=options) as checkpoints:
        for _ in range(5):
            with pytest.raises(lk.Preempted):
                for _ in lk.preemptible(lk.run(STEP, state, make_batches()), checkpoints):
                    checkpoints.save(state)
                    next(iter(lk.run(STEP, state, state.data)))
                    signal.raise_signal(TERM)
            assert restored(tmp_path) == digest_of(state)


def test_wrong_uses_are_told(tmp_path):
    """A thread that cannot have handlers, and a time that is none."""
    checkpoints, errors = lk.Checkpointer(tmp_path), []

    def elsewhere():
        try:
            lk.preemptible([], checkpoints)
        except lk.UsageError as error:
            errors.append(error)
        updates = lk.run(STEP, make_state(), make_batches(), max_steps=2)
        errors.extend(s.step for s in lk.preemptible(updates, checkpoints, signals=()))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in errors[0].instead
    assert errors[1:] == [2, 2] or errors[1:] == [1, 2]
    with pytest.raises(lk.UsageError, match="max_time=-1"):
        lk.preemptible([], checkpoints, max_time=-1)


SCRIPT = """
import os, sys, time
import loopkit as lk
import torch
from torch.utils.data import DataLoader
from feeds import Samples, children, mean_output, tiny_state

def slow(state, batch):
    print("batch", flush=True)
    time.sleep(0.05)
    return mean_output(state, batch)

class Slow(Samples):
    def __getitem__(self, index):
        time.sleep(float(sys.argv[2]))
        return super().__getitem__(index)

state = tiny_state()
checkpoints = lk.Checkpointer(sys.argv[1])
loader = DataLoader(Slow(10_000), 1, num_workers=2)
try:
    for state in lk.preemptible(lk.run(slow, state, loader), checkpoints):
        print("step", state.step, flush=True)
finally:
    print("workers", len(children()), flush=True)
print("after the loop", flush=True)
"""


JOBS = {
    "the process": (os.kill, TERM, 0),
    "its group, by SIGTERM": (os.killpg, TERM, 0),
    "its group, by SIGUSR1": (os.killpg, USR1, 0),
    "its group, by SIGINT": (os.killpg, INT, 0),
    "its group, while it waits for data": (os.killpg, TERM, 0.5),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_process_with_data_workers_ends_with_its_code(tmp_path, job):
    """Sent to it or to all of its group: workers that die of it do no harm; none outlives it."""
    kill, signum, data_s = JOBS[job]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with STARTER.begin(textwrap.dedent(SCRIPT), tmp_path, data_s, env=env) as child:
        while (line := child.stdout.readline()) != "step 2\n":
            assert line, child.communicate()
        kill(child.pid, signum)
        out, err = child.communicate()
    assert (child.returncode, err) == (128 + signum, "")
    steps = [int(line.split()[1]) for line in out.splitlines() if line.startswith("step")]
    assert "workers 0" in out
    assert "after the loop" not in out
    assert lk.Checkpointer(tmp_path).latest.step == max([2, *steps])
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
