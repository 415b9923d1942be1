"""Every state that a stop can leave on disk, from each of which a run must go on.

The operations of several saves are written down; after each of them, and in the middle of
each write, the process is killed or the power cut, and what is found then is restored from.
"""

import io
import itertools
import os
import re
import shutil
import tempfile
from pathlib import Path

import loopkit as lk
import pytest
import torch
from disks import STOPS, Machine, Recorder

from trainings import digest_of, make_state, restored, train

LOSSES = [0.5, 0.1, 0.4, 0.3, 0.2]


def save_ours(folder, state, digests, *, again=False, asynchronous=False):
    """Five saves, with scores that make the rotation keep an old one; one step twice."""
    disk = Recorder()
    options = lk.CheckpointOptions(disk=disk)
    settings = {"monitor": "loss", "async_save": asynchronous, "options": options}
    checkpoints = lk.Checkpointer(folder, **settings)
    for i, loss in enumerate(LOSSES):
        if not (again and i == 3):
            train(state, 1, "ema")
        state.extras["save"] = i
        digests.append(digest_of(state))
        checkpoints.save(state, {"loss": loss})
        checkpoints.wait()
        disk.note("acknowledged", len(digests))
    checkpoints.close()
    return disk.operations


def restore_ours(folder, acknowledged):
    """The digest of what is restored; the best of what was acknowledged must be there too."""
    if acknowledged:
        best = lk.Checkpointer(folder / "run", monitor="loss").best
        assert best.scores["loss"] <= min(LOSSES[:acknowledged])
    return restored(folder / "run")


def save_naive(folder, state, digests, *, again=False):
    """What many loops do: torch.save over the last file."""
    disk, path = Recorder(), folder / "last.pt"
    disk.make_folder(folder)
    for _ in range(5):
        train(state, 1, "ema")
        digests.append(digest_of(state))
        data = io.BytesIO()
        torch.save(state.state_dict(), data)
        if path.exists():
            disk.remove_file(path)  # as opening it for writing empties it
        file = disk.create(path)
        for start in range(0, data.tell(), 4096):
            disk.write(file, memoryview(data.getvalue())[start : start + 4096])
        disk.close(file)
        disk.note("acknowledged", len(digests))
    return disk.operations


def restore_naive(folder, acknowledged):
    path = folder / "run" / "last.pt"
    if not path.exists():
        return None
    state = make_state(seed=99)
    state.load_state_dict(torch.load(path, weights_only=False))
    return digest_of(state)


def torn(operations):
    """The prefixes of the operations; also each whose last write was cut in half."""
    for end in range(len(operations) + 1):
        done = operations[:end]
        yield done
        if done and done[-1][0] == "write" and len(done[-1][2]) > 1:
            operation, path, data = done[-1]
            yield [*done[:-1], (operation, path, data[: len(data) // 2])]


def outcome_of(restore, folder, acknowledged, digests):
    """What a restart finds: the last acknowledged state or a later one, or what is wrong."""
    try:
        found = restore(folder, acknowledged)
    except Exception as error:  # noqa: BLE001  # whatever it is, the restart failed
        return f"unusable: {type(error).__name__}"
    if found is None:
        return "fine" if not acknowledged else "lost: starts from nothing"
    if found not in digests:
        return "mixed"
    return "fine" if digests.index(found) + 1 >= acknowledged else "lost: older"


def states_after(operations, tmp_path, stop):
    """For each state that a stop can leave: its folder, what was acknowledged, what was last."""
    for done in torn(operations):
        machine, acknowledged = Machine(tmp_path), 0
        for operation, *arguments in done:
            if operation == "acknowledged":
                acknowledged = arguments[0]
            else:
                machine.do(operation, *arguments)
        target = tmp_path / "found"
        machine.write_out(target, **STOPS[stop])
        yield target, acknowledged, done[-1:]
        shutil.rmtree(target)


def outcomes(save, restore, tmp_path, stop, leave_out=None, **options):
    """How many of the states that a stop can leave have each outcome."""
    digests, counts, seen = [], {}, {}
    operations = save(tmp_path / "run", make_state(), digests, **options)
    operations = [operation for operation in operations if operation[0] != leave_out]
    for folder, acknowledged, last in states_after(operations, tmp_path, stop):
        outcome = outcome_of(restore, folder, acknowledged, digests)
        counts[outcome] = counts.get(outcome, 0) + 1
        seen.setdefault(outcome, last)
    return counts, seen


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("again", [False, True], ids=["", "a step twice"])
@pytest.mark.filterwarnings("ignore:restored:loopkit.CheckpointWarning")
def test_no_stop_loses_or_mixes_what_was_saved(tmp_path, stop, again):
    """From every state the last acknowledged save, or a later one, is restored bit for bit."""
    counts, seen = outcomes(save_ours, restore_ours, tmp_path, stop, again=again)
    assert counts.keys() == {"fine"}, seen
    assert counts["fine"] > 200


@pytest.mark.parametrize("stop", ["kill", "strict"])
def test_a_run_that_goes_on_after_a_stop_leaves_no_litter(tmp_path, stop):
    """After one more save there are only checkpoints: as many as are to be kept."""
    operations = save_ours(tmp_path / "run", make_state(), [])
    for folder, _, last in itertools.islice(states_after(operations, tmp_path, stop), 3, None, 5):
        state = make_state()
        with lk.Checkpointer(folder / "run", monitor="loss", async_save=False) as checkpoints:
            checkpoints.restore(state)
            state.step += 1
            checkpoints.save(state, {"loss": 0.6})
        names = [path.name for path in (folder / "run").iterdir()]
        assert len(names) <= 3, last
        assert all(name.startswith("step-") for name in names), last


@pytest.mark.parametrize("stop", STOPS)
def test_the_same_test_finds_that_the_naive_way_loses(tmp_path, stop):
    """torch.save over one file fails it: the test can fail."""
    counts, _ = outcomes(save_naive, restore_naive, tmp_path, stop)
    assert sum(count for outcome, count in counts.items() if outcome != "fine") > 5


@pytest.mark.parametrize("leave_out", ["sync", "sync_folder"])
@pytest.mark.filterwarnings("ignore:restored:loopkit.CheckpointWarning")
def test_no_kind_of_sync_could_be_left_out(tmp_path, leave_out):
    """Without its syncs of files, or of folders, a power cut loses what was acknowledged."""
    counts, _ = outcomes(save_ours, restore_ours, tmp_path, "strict", leave_out)
    assert sum(count for outcome, count in counts.items() if outcome != "fine") > 5


def test_nothing_is_renamed_or_acknowledged_before_it_is_synced(tmp_path):
    """Every file and folder is synced before its folder gets the checkpoint's name."""
    operations = save_ours(tmp_path / "run", make_state(), [])
    dirty = set()
    for operation, *paths in operations:
        if operation in {"create", "write"}:
            dirty |= {paths[0], paths[0].parent}
        elif operation in {"sync", "sync_folder"}:
            dirty.discard(paths[0])
        elif operation == "rename":
            assert not {path for path in dirty if paths[0] in {path, *path.parents}}
            dirty.add(paths[1].parent)
        elif operation == "acknowledged":
            assert not {path for path in dirty if path.exists() and path.name != ".lock"}


def test_what_is_done_in_the_background_is_the_same(tmp_path):
    """The same operations in the same order, so that what holds of one holds of the other."""

    def shown(operations, folder):
        for operation, *given in operations:
            paths = [os.path.relpath(x, folder) for x in given if isinstance(x, Path)]
            # The random part of a temporary folder's name
            yield operation, [re.sub(r"(?<=-)[0-9a-f]{8}\b", "", path) for path in paths]

    found = {}
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        operations = save_ours(folder / "run", make_state(), [], asynchronous=asynchronous)
        found[asynchronous] = [*shown(operations, folder)]
    assert found[True] == found[False]
    assert len(found[True]) > 100


def test_nothing_is_written_outside_of_the_folder(tmp_path, monkeypatch):
    """Where the system keeps temporary files does not matter: a rename is within one device."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "on another device"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    operations = save_ours(tmp_path / "run", make_state(), [])
    paths = [path for _, *given in operations for path in given if isinstance(path, Path)]
    made = [path for operation, path, *_ in operations if operation == "make_folder"]
    assert made[0] == tmp_path / "run"
    assert all(path.is_relative_to(tmp_path / "run") for path in paths if path != tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
