"""Two runs that start in one folder at the same instant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopkit.checkpoint.commit import Store
from loopkit.checkpoint.disk import Disk

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


class Overtaken(Disk):
    """A disk on which another process is always a moment faster."""

    def __init__(self, overtake):
        self.overtake = overtake

    def make_folder(self, path, mode=0o777):
        self.overtake(path)
        super().make_folder(path, mode)


def test_a_folder_that_another_process_makes_at_the_same_moment_is_taken(tmp_path):
    """Two runs may share what their folders are in; a file in the way is an error all the same."""
    Store(tmp_path / "runs" / "one", Overtaken(Path.mkdir)).make_root()
    assert (tmp_path / "runs" / "one").is_dir()
    with pytest.raises(FileExistsError):
        Store(tmp_path / "two", Overtaken(Path.touch)).make_root()
