"""A disk that fails at each operation in turn: nothing that was saved before may suffer."""

import errno
import itertools
import os
import warnings

import loopkit as lk
import pytest
from disks import Faulty, Recorder

from trainings import digest_of, make_state, restored, train


def operations_of_a_save(folder):
    """How many operations the third save takes, rotation included."""
    counter, state = Faulty(at=-1), train(make_state(), 1)
    settings = {"async_save": False, "options": lk.CheckpointOptions(disk=counter)}
    with lk.Checkpointer(folder, **settings) as checkpoints:
        for _ in range(3):
            before = counter.count
            state.step += 1
            checkpoints.save(state)
    return counter.count - before


FAULTS = {
    "disk full": {"error": errno.ENOSPC, "sticky": True},
    "one error": {"error": errno.EIO},
    "short writes": {"short": True},
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_operation_loses_nothing_and_is_told(tmp_path, fault, asynchronous):
    """For each operation of a save that fails: told, the last good save there, no litter later."""
    count = operations_of_a_save(tmp_path / "count")
    assert count > 30
    told = failures = 0
    for at in range(count):
        folder, state = tmp_path / str(at), train(make_state(), 1)
        settings = {"async_save": asynchronous, "keep_last": 2}
        with lk.Checkpointer(folder, **settings) as checkpoints:
            for _ in range(2):
                state.step += 1
                checkpoints.save(state)
            good = digest_of(state)

        state.step += 1
        disk = Faulty(at, **FAULTS[fault])
        faulty = lk.Checkpointer(folder, **settings, options=lk.CheckpointOptions(disk=disk))
        try:
            faulty.save(state)
            faulty.close()
        except lk.CheckpointError as error:
            told += os.strerror(FAULTS[fault]["error"]) in str(error)
            faulty.close()
        failures += disk.failed > 0
        found = restored(folder)
        assert found in {good, digest_of(state)}
        assert found == digest_of(state) or disk.failed

        state.step += 1
        with lk.Checkpointer(folder, **settings) as checkpoints:
            checkpoints.save(state)
        assert restored(folder) == digest_of(state)
        names = sorted(path.name for path in folder.iterdir())
        assert len(names) == 2, (at, names)
        assert all(name.startswith("step-") for name in names), (at, names)
    assert told == failures
    assert (failures == 0) == (fault == "short writes")


def test_a_save_that_failed_leaves_no_candidate(tmp_path):
    """Whichever operation of a first save fails, the folder is as if it had not begun."""
    state, failures = make_state(), 0
    for at in itertools.count():
        (tmp_path / str(at)).mkdir()
        disk = Faulty(at)
        options = lk.CheckpointOptions(disk=disk)
        checkpoints = lk.Checkpointer(tmp_path / str(at), async_save=False, options=options)
        try:
            checkpoints.save(state)
        except lk.CheckpointError:
            failures += 1
        checkpoints.close()
        if not disk.failed:
            break
        assert [*(tmp_path / str(at)).iterdir()] == []
        assert checkpoints.restore(state) is False
    assert failures == at > 20


def test_a_run_may_go_on_with_a_full_disk(tmp_path):
    """With on_error="warn" each failed save is a warning and counted, until there are too many."""
    disk = Faulty(0, errno.ENOSPC, sticky=True)
    options = lk.CheckpointOptions(on_error="warn", max_failures=3, disk=disk)
    checkpoints = lk.Checkpointer(tmp_path / "run", async_save=False, options=options)
    state = make_state()
    for i in range(3):
        with pytest.warns(lk.CheckpointWarning, match="No space left"):
            assert not checkpoints.save(state)
        assert checkpoints.failures == i + 1
    with pytest.raises(lk.CheckpointError, match="No space left"):
        checkpoints.save(state)
    disk.sticky, disk.at = False, -1
    assert checkpoints.save(state)
    assert checkpoints.failures == 0
    checkpoints.close()


def test_without_permission_nothing_is_lost_and_the_path_is_named(tmp_path):
    """A folder that cannot be made is an error that names it."""
    (tmp_path / "file").write_text("mine")
    checkpoints = lk.Checkpointer(tmp_path / "file" / "run", async_save=False)
    with pytest.raises(lk.CheckpointError, match="run"):
        checkpoints.save(make_state())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022])
def test_permissions_are_those_of_the_umask(tmp_path, mask):
    """No file or folder is opened to more than the umask allows."""
    before = os.umask(mask)
    try:
        with lk.Checkpointer(tmp_path / "run") as checkpoints:
            checkpoints.save(make_state())
            checkpoints.wait()
            paths = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
            modes = {path.stat().st_mode & 0o777 for path in paths}
        lk.export(make_state(), tmp_path / "run" / "model.safetensors")
        modes.add((tmp_path / "run" / "model.safetensors").stat().st_mode & 0o777)
    finally:
        os.umask(before)
    assert len(paths) > 5
    assert modes <= {0o777 & ~mask, 0o666 & ~mask}


def test_files_are_only_made_never_opened_again(tmp_path):
    """A file of a checkpoint is created new, and links in its place stop the save."""
    disk = Recorder()
    with lk.Checkpointer(tmp_path, options=lk.CheckpointOptions(disk=disk)) as checkpoints:
        checkpoints.save(train(make_state(), 1))
        checkpoints.wait()
    created = [operation[1] for operation in disk.operations if operation[0] == "create"]
    assert len(created) == len({*created}) > 3
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        disk.create(tmp_path / "link")
    assert (tmp_path / "target").read_text() == "mine"


def test_an_export_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    """The old file stays whole until the new one is."""
    path = lk.export(make_state(seed=1), tmp_path / "model.safetensors")
    before = path.read_bytes()

    def fail(file):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken"):
        lk.export(make_state(seed=2), path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_no_warning_without_a_failure(tmp_path):
    """A save and a restore that go well say nothing."""
    with warnings.catch_warnings(record=True) as said, lk.Checkpointer(tmp_path) as checkpoints:
        warnings.simplefilter("always")
        checkpoints.save(make_state())
        checkpoints.restore(make_state())
    assert said == []
