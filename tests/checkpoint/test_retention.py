"""Which checkpoints stay, and what is never touched."""

import math
import os
import time
from pathlib import Path

import loopkit as lk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopkit.checkpoint.folder import Checkpoint, Retention
from loopkit.checkpoint.manifest import Manifest

from trainings import digest_of, make_state, restored


def save_all(folder, losses, **settings):
    """A save for each loss, at steps 1, 2, ..."""
    state = make_state()
    with lk.Checkpointer(folder, async_save=False, **settings) as checkpoints:
        for loss in losses:
            state.step += 1
            checkpoints.save(state, None if loss is None else {"loss": loss})
    return checkpoints


def steps(folder):
    return [checkpoint.step for checkpoint in lk.Checkpointer(folder).list()]


def test_the_last_and_the_best_stay(tmp_path):
    """With keep_last=2 and keep_best=1: the last two, and the best of all."""
    checkpoints = save_all(tmp_path, [0.5, 0.1, 0.4, 0.3, 0.2], monitor="loss")
    assert steps(tmp_path) == [2, 4, 5]
    assert checkpoints.best.step == 2
    assert checkpoints.latest.step == 5


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [4, 5]),
        ({"keep_last": 3}, [3, 4, 5]),
        ({"keep_last": None}, [1, 2, 3, 4, 5]),
        ({"monitor": "loss", "keep_best": 2}, [2, 4, 5]),
        ({"monitor": "loss", "keep_best": 3}, [2, 3, 4, 5]),
        ({"monitor": "loss", "mode": "max"}, [1, 4, 5]),
    ],
)
def test_settings_say_how_many(tmp_path, settings, kept):
    """keep_last and keep_best count, mode says what is good."""
    save_all(tmp_path, [0.5, 0.1, 0.3, 0.4, 0.2], **settings)
    assert steps(tmp_path) == kept


def test_of_equal_scores_the_first_is_the_best_and_nan_never_is(tmp_path):
    """A score that is not a number is none; one that is infinite is a bad one."""
    checkpoints = save_all(tmp_path, [math.nan, math.inf, 0.3, 0.3, math.nan, None], monitor="loss")
    assert checkpoints.best.step == 3
    assert steps(tmp_path) == [3, 5, 6]
    only_nan = save_all(tmp_path / "nan", [math.nan, math.nan], monitor="loss")
    assert only_nan.best is None


SCORES = st.lists(st.none() | st.floats(allow_nan=True) | st.sampled_from([0.0, 1.0]), max_size=12)


@given(SCORES, st.integers(2, 4), st.integers(1, 3), st.sampled_from(["min", "max"]))
def test_neither_the_newest_nor_the_best_ever_goes(scores, last, best, mode):
    """Whatever the scores: the last and the best k stay, and all others go."""
    made = []
    for i, score in enumerate(scores):
        numbers = {} if score is None else {"loss": score}
        made.append(Checkpoint(Path(str(i)), Manifest(i, 0, 0, i + 1, 1, numbers, {}, {})))
    gone = Retention(last, best, "loss", mode).expendable(made)
    kept = [checkpoint for checkpoint in made if checkpoint not in gone]
    assert made[-last:] == kept[-last:] or len(made) < last
    numbers = [score for score in scores if score is not None and not math.isnan(score)]
    expected = sorted(numbers, reverse=mode == "max")[:best]
    there = [c.scores["loss"] for c in kept if not math.isnan(c.scores.get("loss", math.nan))]
    assert all(there.count(score) >= expected.count(score) for score in expected)
    assert len(kept) <= last + best


def test_the_clock_of_the_file_system_does_not_matter(tmp_path):
    """Checkpoints from the future, by their mtime, do not push out new ones."""
    for _ in range(3):
        state = make_state()
        with lk.Checkpointer(tmp_path) as checkpoints:
            checkpoints.restore(state)
            for _ in range(2):
                state.step += 1
                checkpoints.save(state)
        for path in tmp_path.rglob("*"):
            os.utime(path, (time.time() + 1e6 / (1 + state.step),) * 2)
    assert steps(tmp_path) == [5, 6]


def foreign(folder):
    """What others may have put in the folder."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "model.safetensors").write_text("mine")
    for name in [
        "best",
        "keepme_0",
        "run_2024_final",
        ".tmp-mine",
        ".tmp-000000000001-zzzzzzzz",
        "step-7",
    ]:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text("mine")
    (folder / "step-000000000000").mkdir()  # the name of a checkpoint, and none
    (folder / "step-000000000000" / "notes.txt").write_text("mine")
    (folder / "step-000000000009.json").write_text("mine")
    (folder / "step-000000000008").symlink_to(outside)
    (folder / ".tmp-000000000001-0123abcd").symlink_to(outside)
    (folder / ".tmp-000000000002-0123abcd").mkdir()  # a temporary folder with something more
    (folder / ".tmp-000000000002-0123abcd" / "notes.txt").write_text("mine")
    return {path for path in [*folder.rglob("*"), *outside.rglob("*")] if path.is_file()}


def test_what_others_put_there_is_never_touched(tmp_path):
    """Folders, files and links of others keep every byte, through saves, rotation and restore."""
    files = foreign(tmp_path / "run")
    save_all(tmp_path / "run", [0.5, 0.1, 0.4, 0.3, 0.2], monitor="loss")
    assert {path.read_text() for path in files} == {"mine"}
    assert (tmp_path / "run" / "step-000000000008").is_symlink()
    assert (tmp_path / "run" / ".tmp-000000000001-0123abcd").is_symlink()
    assert steps(tmp_path / "run") == [2, 4, 5]


def test_a_checkpoint_with_something_of_others_in_it_stays(tmp_path):
    """Notes that someone put into a checkpoint's folder keep all of it."""
    save_all(tmp_path, [0.1])
    (notes := next(tmp_path.glob("step-*")) / "notes.txt").write_text("mine")
    state = make_state()
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.restore(state)
        for _ in range(4):
            state.step += 1
            checkpoints.save(state)
    assert notes.read_text() == "mine"
    assert steps(tmp_path) == [1, 4, 5]


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path):
    """The new one is complete before the old one goes, under a name of its own."""
    state = make_state(note=0)
    with lk.Checkpointer(tmp_path, async_save=False) as checkpoints:
        for note in range(4):
            state.extras["note"] = note
            checkpoints.save(state)
            assert restored(tmp_path) == digest_of(state)
        assert len([*tmp_path.glob("step-000000000000*")]) == 2
        assert restored(tmp_path) == digest_of(state)


def test_a_run_that_went_back_goes_on_from_its_newest_save(tmp_path):
    """After restoring an older checkpoint, what is saved then is the latest, and stays."""
    save_all(tmp_path, [0.1, 0.2, 0.3], monitor="loss", keep_last=3)
    state = make_state()
    with lk.Checkpointer(tmp_path, monitor="loss", async_save=False) as checkpoints:
        checkpoints.restore(state, "best")
        assert state.step == 1
        state.step = 2
        state.extras["again"] = True
        checkpoints.save(state, {"loss": 0.05})
        assert checkpoints.latest.path.name == "step-000000000002-2"
        assert restored(tmp_path) == digest_of(state)


def test_another_run_does_not_push_out_a_finished_one(tmp_path):
    """A state that does not come from the folder's checkpoints, and is behind them, is refused."""
    save_all(tmp_path, [0.1, 0.2, 0.3])
    state = make_state()
    with pytest.raises(lk.CheckpointError, match=r"restore\(state\) before"):
        lk.Checkpointer(tmp_path).save(state)
    assert steps(tmp_path) == [2, 3]
    state.step = 3
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
