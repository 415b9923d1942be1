"""A signal to one rank: all save the same step and end, and what goes on is the same run."""

import errno
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import loopkit as lk
import pytest
import torch
from loopkit.checkpoint.disk import Disk
from loopkit.parallel.launch import free_port
from loopkit.testing import assert_bitwise_equal
from test_failures import SLOW
from test_parity import whole
from test_ranks_resume import decorated, fresh, loader

from pool import POOL

TIMES = int(os.environ.get("LOOPKIT_PREEMPTIONS", "1"))  # 20 for the requirement R9
UPDATES, MOST_S = 24, 10
SCRIPT = Path(__file__).parent / "preempted.py"


def eval_step(state, batch):
    """A loss; and random numbers, which the training must not notice."""
    torch.rand(3)
    return state.model(batch[0]).square().mean()


def ignored(signum, frame):
    """A signal that comes when the loop is over."""


def life(strategy, folder, rank_that_is_told, delay_s):
    """Restore, and train until the end or a signal, which comes after `delay_s`."""
    step, state = decorated(strategy), fresh()
    checkpoints = lk.Checkpointer(folder)
    checkpoints.restore(state)
    step.set_up(state)
    before = signal.signal(signal.SIGTERM, ignored)
    told = [float("inf")]

    def tell():
        told[0] = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(delay_s, tell)
    if state.ranks.rank == rank_that_is_told:
        timer.start()
    code = 0
    try:
        run = lk.run(step, state, loader(), max_steps=UPDATES)
        for state in lk.preemptible(run, checkpoints):
            if state.step % 4 == 0:
                lk.evaluate(eval_step, state, loader())
    except lk.Preempted as stop:
        code = stop.code
    finally:
        timer.cancel()
        timer.join(5) if timer.is_alive() else None
        signal.signal(signal.SIGTERM, before)
    seconds = time.monotonic() - told[0]
    checkpoints.close()
    return code, state.step, max(0.0, seconds), whole(state.model.state_dict())


@pytest.mark.timeout(60 + 60 * TIMES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(strategy, tmp_path, record_property):
    """Lives end at random instants, by turns of the ranks; the last weights are one run's."""
    rng = random.Random(7)
    uncut = POOL.run(2, life, strategy, str(tmp_path / "uncut"), None, 0.0)
    cuts, longest = 0, 0.0
    for time_of in range(TIMES):
        folder, steps = tmp_path / str(time_of), []
        for number in range(UPDATES):
            given = strategy, str(folder), number % 2, rng.uniform(0.02, 0.4)
            lives = POOL.run(2, life, *given)
            codes, reached, seconds, weights = zip(*lives, strict=True)
            assert len({*codes}) == len({*reached}) == 1, (codes, reached)
            longest = max(longest, *seconds)
            steps.append(reached[0])
            if codes[0] == 0:
                break
            assert codes[0] == 143
            assert lk.Checkpointer(folder).latest.step == reached[0]
            cuts += 1
        assert steps == sorted(steps)
        assert steps[-1] == UPDATES
        for found, (_, _, _, expected) in zip(weights, uncut, strict=True):
            assert_bitwise_equal(found, expected)
    assert longest < MOST_S * SLOW
    record_property("seconds", f"{longest:.2f}")
    record_property("outcome", f"{cuts} signals, each saved at one step by both; the longest way")


class FullForOnce(Disk):
    """A disk that has no room for the first file."""

    full = True

    def create(self, path):
        if self.full:
            self.full = False
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(path)


def stopped_after_a_save_that_fails(folder):
    options = lk.CheckpointOptions(disk=FullForOnce())
    step, state = decorated("fsdp"), fresh()
    checkpoints = lk.Checkpointer(folder, options=options)
    with pytest.raises(lk.Preempted):
        for state in lk.preemptible(lk.run(step, state, loader(), max_steps=9), checkpoints):
            if state.step == 3:
                checkpoints.save(state)
                if state.ranks.rank == 1:
                    signal.raise_signal(signal.SIGTERM)
    checkpoints.close()
    return state.step


def test_a_save_that_failed_on_the_first_rank_is_made_again_by_all(tmp_path):
    """Only the first rank writes, and knows that the disk was full: all take part once more."""
    assert POOL.run(2, stopped_after_a_save_that_fails, str(tmp_path)) == [3, 3]
    assert lk.Checkpointer(tmp_path).latest.step == 3


def started(folder):
    port = free_port()
    for rank in range(2):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        yield subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), folder],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip


def end_by_a_signal_to_one(folder):
    """How both end, and in how many seconds: their codes, and the steps that they say."""
    first, second = started(str(folder))
    try:
        for line in second.stdout:
            if line.startswith("step 3"):
                break
        second.send_signal(signal.SIGTERM)
        at = time.monotonic()
        others = second.communicate(timeout=60)[0]
        output = first.communicate(timeout=60)[0]
        seconds = time.monotonic() - at
    finally:
        first.kill()
        second.kill()
    steps = [re.findall(r"stopped after (\d+)", words)[-1:] for words in (output, others)]
    return [first.returncode, second.returncode], steps, seconds, output + others


def ends(end, folder, record_property):
    """What each of some ends has come to, and the step on disk; the longest time is recorded."""
    longest = 0.0
    for number in range(TIMES):
        codes, steps, seconds, words = end(folder / str(number))
        yield codes, steps, str(lk.Checkpointer(folder / str(number)).latest.step), words
        assert seconds < MOST_S * SLOW
        longest = max(longest, seconds)
    record_property("seconds", f"{longest:.1f}")


@pytest.mark.timeout(200 + 60 * TIMES)
def test_both_processes_end_with_the_code_of_the_signal(tmp_path, record_property):
    """SIGTERM to the process of rank 1: both processes exit with 143, with one step saved."""
    for codes, steps, saved, words in ends(end_by_a_signal_to_one, tmp_path, record_property):
        assert codes == [143, 143], words
        assert steps == [[saved]] * 2, words
    record_property("outcome", f"{TIMES} times both ended with 143, saved at one step")


def end_by_a_signal_to_the_agent(folder):
    """How torchrun ends, and in how many seconds: its code, and the steps that ranks say."""
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2",
        "--standalone", "--monitor-interval=0.2", str(SCRIPT), str(folder),
    ]  # fmt: skip
    agent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    words = []
    try:
        for line in agent.stdout:
            words.append(line)
            if line.startswith("step 3"):
                break
        agent.send_signal(signal.SIGTERM)
        at = time.monotonic()
        words.append(agent.communicate(timeout=90)[0])
        seconds = time.monotonic() - at
    finally:
        agent.kill()
    steps = re.findall(r"stopped after (\d+)", "".join(words))
    return agent.returncode, steps, seconds, "".join(words)


@pytest.mark.timeout(200 + 60 * TIMES)
def test_a_signal_to_the_agent_reaches_all_ranks(tmp_path, record_property):
    """Torchrun hands SIGTERM on to its ranks, which save one step within the time it gives them."""
    for code, steps, saved, words in ends(end_by_a_signal_to_the_agent, tmp_path, record_property):
        assert steps == [saved] * 2, words[-3000:]
        assert code != 0
    record_property("outcome", f"{TIMES} times torchrun and its ranks ended, saved at one step")
