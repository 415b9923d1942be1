"""The example of a run that is killed and run again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(folder, slow="0"):
    """The example, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-u", ROOT / "examples" / "resume.py",
         "--folder", str(folder), "--slow", slow],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_it_comes_to_the_same_result_however_often_it_is_stopped(tmp_path):
    """Ctrl-C, SIGTERM and kill -9, in turn; then it ends with the very same weights."""
    whole = start(tmp_path / "whole")
    out, err = whole.communicate(timeout=300)
    assert (whole.returncode, err) == (0, "")
    last = out.splitlines()[-1]
    assert last.startswith("done after 176 updates: ")
    for signum, epochs in ((signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 2)):
        process = start(tmp_path / "run", slow="0.01")
        lines = [process.stdout.readline() for _ in range(1 + epochs)]
        process.send_signal(signum)
        out, err = process.communicate(timeout=200)
        assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + signum), err
        assert err == ""
        assert ("asked to stop" in out) == (signum != signal.SIGKILL)
    assert "goes on" in lines[0]
    process = start(tmp_path / "run")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "goes on" in out.splitlines()[0]
    assert out.splitlines()[-1] == last
