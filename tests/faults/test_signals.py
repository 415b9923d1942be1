"""A run that is asked to stop at random instants loses no update, and ends as it would have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SIGNALS = int(os.environ.get("LOOPKIT_SIGNALS", "12"))


@pytest.mark.timeout(240 + 10 * SIGNALS)
def test_runs_that_are_asked_to_stop_lose_nothing_and_end_bitwise_equal(tmp_path):
    """Within an update, a save or an evaluation: the code is 128 + n, the state on disk the last.

    12 signals, or as many as the environment variable LOOPKIT_SIGNALS says.
    """
    path = f"{HERE.parents[1]}:{HERE.parent}"
    done = subprocess.run(
        [sys.executable, HERE / "signalling.py", tmp_path, str(SIGNALS), "0"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counts = json.loads(done.stdout)
    assert counts["signals"] >= SIGNALS
    assert counts["codes"] == []
    assert counts["lost"] == []
    assert counts["equal"] == counts["runs"] > 0
