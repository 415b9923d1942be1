"""When one rank fails, the others end soon and name it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import loopkit as lk
import pytest
from loopkit.parallel.launch import free_port

TIMES = int(os.environ.get("LOOPKIT_FAILURES", "1"))  # 20 for the requirement R11
TIMEOUT_S = 15 if TIMES == 1 else 20
SCRIPT = Path(__file__).parent / "failing.py"
MOST_S = {"raises": 10, "is killed": 10, "exits": 10, "stops": TIMEOUT_S + 5}
SLOW = float(os.environ.get("LOOPKIT_SLOW", "3"))  # how much slower than promised a machine may be


def ranks(kind, port):
    """Two bare processes, without an agent that would end one for the other's failure."""
    for rank in range(2):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-W", "ignore", str(SCRIPT), kind, str(TIMEOUT_S)]
        yield subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )


def torchrun(kind, port, *extra):
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2",
        f"--master-port={port}", "--monitor-interval=0.2", *extra,
        str(SCRIPT), kind, str(TIMEOUT_S),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def stopping():
    """Two that wait out their time limit while the other tests run."""
    pair = [*ranks("stops", free_port())]
    yield pair
    for process in pair:
        with process:
            process.kill()


def ending(kind, pair, begun_before):
    """How rank 0 ends, and how many seconds after the fault of rank 1 it is gone."""
    first, second = pair
    try:
        output, _ = first.communicate(timeout=120)
        gone = time.time()
    finally:
        first.kill()
        second.kill()
    others, _ = second.communicate()
    if begun_before:  # and may have ended before it was looked at
        gone = float(re.search(r"rank 0 ended at ([\d.]+)", output)[1])
    fault = re.search(r"fault at ([\d.]+)", others)
    assert fault, f"rank 1 came to no fault:\n{others[-2000:]}\nrank 0:\n{output[-2000:]}"
    return first.returncode, output, gone - float(fault[1])


@pytest.mark.timeout(200 + 60 * TIMES)
@pytest.mark.parametrize("kind", MOST_S)
def test_the_other_rank_ends_and_names_the_failed_one(kind, stopping, record_property):
    """An error, a kill, an exit or a stop of rank 1 ends rank 0 in bounded time, with its name."""
    longest = 0.0
    for number in range(TIMES):
        begun_before = kind == "stops" and number == 0
        pair = stopping if begun_before else [*ranks(kind, free_port())]
        code, output, seconds = ending(kind, pair, begun_before)
        last = "\n".join(output.strip().splitlines()[-2:])
        longest = max(longest, seconds)
        assert code != 0
        assert seconds < MOST_S[kind] * SLOW
        assert re.search(r"RankError: .*rank 1", last), output[-3000:]
        if kind == "raises":
            assert "rank 1 failed: ValueError: the label 7 is not there" in output
    record_property("seconds", f"{longest:.1f}")
    found = last.split("found ")[-1].splitlines()[0]
    record_property("outcome", f"named in all of {TIMES}: {found}")


@pytest.mark.timeout(200)
def test_ranks_with_unequal_data_all_end(tmp_path, monkeypatch, record_property):
    """Shares of 6 and 5 batches, saved and evaluated: the shorter goes on with weight 0."""
    monkeypatch.setenv("FAILING_FOLDER", str(tmp_path))
    began = time.monotonic()
    code, output = torchrun("runs dry", free_port())
    record_property("seconds", f"{time.monotonic() - began:.1f}")
    record_property("outcome", "both made 6 updates, with all that starting them takes")
    assert code == 0, output[-3000:]
    assert output.count("made 6 updates") == 2
    assert lk.Checkpointer(tmp_path).latest.step == 6


@pytest.mark.timeout(200)
def test_torchrun_restarts_what_failed_and_it_goes_on(tmp_path, monkeypatch):
    """With --max-restarts a killed rank costs what was not saved: both end at the same step."""
    monkeypatch.setenv("FAILING_FOLDER", str(tmp_path))
    code, output = torchrun("is killed once", free_port(), "--max-restarts=1")
    assert code == 0, output[-3000:]
    assert output.count("restored step") == 2
    assert output.count("made 12 updates") == 2
