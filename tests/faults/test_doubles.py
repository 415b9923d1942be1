"""Two runs that start in one folder at the same instant."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAIRS = 20


def test_of_two_starts_at_once_one_is_refused(tmp_path):
    """20 times: exactly one saves, and nothing in the folder is the other's."""
    path = f"{HERE.parents[1]}:{HERE.parent}"
    done = subprocess.run(
        [sys.executable, HERE / "doubles.py", tmp_path, str(PAIRS)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counts = json.loads(done.stdout)
    assert counts["said"] == []
    assert counts["pairs"] == counts["one of two"] == counts["of one writer"] == PAIRS
