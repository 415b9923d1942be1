"""Checkpoints of every version of the format that was ever released can be read."""

import shutil

import loopkit as lk
import pytest
from loopkit.checkpoint.manifest import VERSION
from make import HERE, make, parts_of

from trainings import train

FOLDERS = sorted(HERE.glob("format-*"))


def test_the_version_that_is_written_now_is_among_them():
    """A new version comes with a checkpoint of its own."""
    assert f"format-{VERSION}" in [folder.name for folder in FOLDERS]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_checkpoint_of_an_older_version_is_restored_bit_for_bit(folder, tmp_path):
    """Model, optimizer, clock, features and extras are what they were; it trains on from there."""
    shutil.copytree(folder, tmp_path / "run")
    state = make(seed=5)
    with lk.Checkpointer(tmp_path / "run", monitor="loss") as checkpoints:
        assert checkpoints.restore(state)
        assert checkpoints.best.scores == {"loss": 0.25}
        lines = (folder / "digests.txt").read_text().splitlines()
        assert parts_of(state) == dict(line.split() for line in lines)
        train(state, 2, "all")
        checkpoints.save(state, {"loss": 0.5})
    assert state.step == 5
