"""Files that say anything at all, with checksums that are right: refused, or a state that fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRIALS = int(os.environ.get("LOOPKIT_FUZZ", "200"))


@pytest.mark.timeout(120 + TRIALS)
def test_fuzzed_manifests_trees_and_headers_are_errors_and_nothing_else(tmp_path):
    """No crash, no half-loaded state, and no more memory than twice the file and 100 MB.

    200 trials, or as many as the environment variable LOOPKIT_FUZZ says.
    """
    path = f"{HERE.parents[1]}:{HERE.parent}"
    done = subprocess.run(
        [sys.executable, HERE / "fuzzing.py", tmp_path / "run", str(TRIALS), "0"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["crashed"] == []
    assert counts["half taken"] == []
    assert counts["refused"] > TRIALS / 2
    assert counts["refused"] + counts["taken"] == TRIALS
    assert counts["memory"] <= 2 * counts["file"] + 100e6
