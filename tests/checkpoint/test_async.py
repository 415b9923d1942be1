"""Saving in the background: the copy is of the call's moment, and no failure stays untold."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import loopkit as lk
import pytest
import torch
from loopkit.checkpoint.disk import Disk

from forked import STARTER
from trainings import digest_of, make_state, restored, train

ROOT = Path(__file__).parents[2]


class Slow(Disk):
    """A disk that waits for a word before it writes."""

    def __init__(self):
        self.go = threading.Event()

    def make_folder(self, path):
        super().make_folder(path)
        self.go.wait(20)


def test_a_hundred_updates_right_after_the_save_do_not_reach_it(tmp_path):
    """100 races of writing and training on: each checkpoint is the state of its call."""
    state, digests = make_state("adamw"), []
    with lk.Checkpointer(tmp_path, keep_last=None) as checkpoints:
        for _ in range(100):
            digests.append(digest_of(state))
            checkpoints.save(state)
            with torch.no_grad():
                for tensor in state.model.state_dict().values():
                    tensor.fill_(7)
            train(state, 1)
    assert len(checkpoints.list()) == 100
    for checkpoint, digest in zip(checkpoints.list(), digests, strict=True):
        assert restored(tmp_path, checkpoint.path) == digest


def test_save_returns_while_the_disk_is_slow(tmp_path):
    """The loop goes on while the disk writes; wait waits for it."""
    disk, state = Slow(), make_state()
    disk.go.set()
    checkpoints = lk.Checkpointer(tmp_path, options=lk.CheckpointOptions(disk=disk))
    checkpoints.save(state)
    checkpoints.wait()
    disk.go.clear()
    state.step = 1
    digest = digest_of(state)
    assert checkpoints.save(state)
    assert restored(tmp_path) != digest
    train(state, 2)
    disk.go.set()
    assert checkpoints.wait()
    assert restored(tmp_path) == digest
    checkpoints.close()


def test_a_save_while_another_is_written_waits_or_is_dropped(tmp_path):
    """By policy: both are written in their order, or the second is left out, and says so."""
    for policy, steps in {"wait": [0, 1], "drop": [0]}.items():
        disk, state = Slow(), make_state()
        options = lk.CheckpointOptions(disk=disk, when_busy=policy)
        (tmp_path / policy).mkdir()  # by hand: the slow disk would wait at it
        checkpoints = lk.Checkpointer(tmp_path / policy, options=options)
        assert checkpoints.save(state)
        state.step = 1
        threading.Timer(0.2, disk.go.set).start()
        assert checkpoints.save(state) == (policy == "wait")
        checkpoints.close()
        assert [checkpoint.step for checkpoint in checkpoints.list()] == steps


class Full(Disk):
    """A disk without space."""

    def write(self, file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("ask", ["save", "wait", "close", "with", "wrap"])
def test_a_failure_of_the_writer_is_told_where_it_is_asked_for(tmp_path, ask):
    """At the next save, at wait, at close, at the end of the block, at the end of the run."""
    state = make_state()
    options = lk.CheckpointOptions(disk=Full())
    checkpoints = lk.Checkpointer(tmp_path, options=options, every=100)

    def end():
        if ask == "with":
            with checkpoints:
                checkpoints.save(state)
        elif ask == "wrap":
            [*checkpoints.wrap(iter([state]))]
        else:
            checkpoints.save(state)
            getattr(checkpoints, ask)(*[state] * (ask == "save"))

    with pytest.raises(lk.CheckpointError, match="No space left"):
        end()
    assert checkpoints.failures == 1
    checkpoints.close()


def run(code, tmp_path):
    """Run a program in a process of its own."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'checkpoint'}"}
    return STARTER.run(code, tmp_path, env=env)


LEAVE = """
import sys, time
import loopkit as lk
from loopkit.checkpoint.disk import Disk
from trainings import make_state, digest_of

class Slow(Disk):
    def sync_folder(self, path):
        time.sleep(0.3)
        super().sync_folder(path)

state = make_state()
checkpoints = lk.Checkpointer(sys.argv[1], options=lk.CheckpointOptions(disk=Slow()))
checkpoints.save(state)
print(digest_of(state), flush=True)
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise ValueError('mine')"])
def test_leaving_the_process_waits_for_the_last_save(tmp_path, end):
    """However Python ends, by itself, by an exit or by an error, the save is complete."""
    done = run(LEAVE + end, tmp_path / "run")
    assert restored(tmp_path / "run") == done.stdout.strip()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-000000000000"]
    assert done.returncode == {"": 0, "raise SystemExit(3)": 3}.get(end, 1)


def test_a_failure_that_nobody_asked_for_is_shown_at_the_end(tmp_path):
    """A program that ends without wait or close still says that its last save failed."""
    code = LEAVE.replace("time.sleep(0.3)", "raise OSError('broken disk')")
    assert "broken disk" in run(code, tmp_path / "run").stderr


HOLD = """
import os, sys, time
import loopkit as lk
from trainings import make_state

state = make_state()
checkpoints = lk.Checkpointer(sys.argv[1])
try:
    checkpoints.save(state)
except lk.CheckpointError as error:
    print("refused", error.found)
    raise SystemExit
checkpoints.wait()
print("held", flush=True)
sys.stdin.read(1)
"""


def test_a_second_live_run_in_a_folder_is_refused(tmp_path):
    """While one process saves there another's save is an error that names it; after it, none."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        second = lk.Checkpointer(tmp_path)
        with pytest.raises(lk.CheckpointError, match=f"process {holder.pid}"):
            second.save(make_state())
        assert second.restore(make_state())  # to read is always allowed
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / ".lock").exists()
    second.save(make_state())
    second.close()
    assert not (tmp_path / ".lock").exists()


def test_orphans_of_a_killed_run_do_not_hold_its_folder(tmp_path):
    """Data workers that outlive a killed run for a while do not stop the next one."""
    code = HOLD.replace("sys.stdin.read(1)", "pid = os.fork()\nif not pid:\n    time.sleep(600)\n"
                        "print(pid, flush=True)\nos.kill(os.getpid(), 9)")  # fmt: skip
    code = code.replace('print("held", flush=True)', "")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    orphan = int(process.stdout.readline())
    process.wait()
    try:
        state = make_state()
        with lk.Checkpointer(tmp_path) as checkpoints:
            checkpoints.restore(state)
            checkpoints.save(state)
        os.kill(orphan, 0)  # it lives on
    finally:
        os.kill(orphan, 9)
        process.stdout.close()


def test_two_of_one_process_do_not_share_a_folder(tmp_path):
    """The second is refused until the first is closed, or gone."""
    state = make_state()
    first, second = lk.Checkpointer(tmp_path), lk.Checkpointer(tmp_path)
    first.save(state)
    first.wait()
    with pytest.raises(lk.CheckpointError, match="saving in"):
        second.save(state)
    state.checkpoints = None
    del first
    assert second.save(state)
    second.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of threads and forks
def test_a_fork_does_not_release_the_lock(tmp_path):
    """A child that drops its copy of the Checkpointer leaves the parent's lock in place."""
    checkpoints = lk.Checkpointer(tmp_path)
    checkpoints.save(make_state())
    checkpoints.wait()
    child = os.fork()
    if child == 0:
        checkpoints._saver._lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    with pytest.raises(lk.CheckpointError, match="saving in"):
        lk.Checkpointer(tmp_path).save(make_state())
    checkpoints.close()


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    """A run goes on saving where someone has cleaned up."""
    state = make_state()
    with lk.Checkpointer(tmp_path / "a" / "b", async_save=False) as checkpoints:
        checkpoints.save(state)
        os.rename(tmp_path / "a" / "b", tmp_path / "away")  # noqa: PTH104
        checkpoints.save(state)
        assert len(checkpoints.list()) == 1


def test_the_memory_of_the_copy_is_used_again(tmp_path):
    """A second save copies into the memory of the first."""
    state = train(make_state(), 1)
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        first = {name: f.body.data_ptr() for name, f in checkpoints._saver._last.items()}
        checkpoints.save(state)
        assert {n: f.body.data_ptr() for n, f in checkpoints._saver._last.items()} == first


def test_memory_is_used_again_only_for_tensors_of_the_same_kind(tmp_path):
    """What grows, or gets another type or name, is laid out anew; each save is what it was."""
    forms = [torch.ones(3), torch.ones(3).double(), torch.ones(6).half(), torch.ones(3), None]
    with lk.Checkpointer(tmp_path, keep_last=None) as checkpoints:
        for number, form in enumerate(forms, 1):
            extras = {} if form is None else {"kept": number * form, "more": form.bool()}
            state = train(make_state(**extras), number)
            checkpoints.save(state)
    for number, (checkpoint, form) in enumerate(zip(checkpoints.list(), forms, strict=True), 1):
        extras = {} if form is None else {"kept": number * form, "more": form.bool()}
        expected = train(make_state(**extras), number)
        found = make_state(**{name: torch.zeros_like(value) for name, value in extras.items()})
        checkpoints.restore(found, checkpoint)
        assert digest_of(found) == digest_of(expected)
