"""Who may read and plant checkpoints: permissions, owners, names and links."""

import os
import random
import re
import stat
import warnings

import loopkit as lk
import pytest
from loopkit.checkpoint.folder import NAME, TEMPORARY
from loopkit.checkpoint.manifest import FILE_NAME

from trainings import digest_of, make_state, restored, train

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def save(folder, saves=2, **settings):
    """Some saves; their digests."""
    state, digests = make_state(), []
    with lk.Checkpointer(folder, async_save=False, **settings) as checkpoints:
        for _ in range(saves):
            train(state, 1)
            checkpoints.save(state)
            digests.append(digest_of(state))
    return digests


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_private_folders_are_closed_whatever_the_umask(tmp_path, mask):
    """What loopkit makes is 0700; what is around it, or was there before, stays as it is."""
    before = os.umask(mask)
    try:
        (tmp_path / "there").mkdir()
        mode = (tmp_path / "there").stat().st_mode
        for root in (tmp_path / "there", tmp_path / "a" / "run"):
            save(root, options=lk.CheckpointOptions(private=True))
            steps = [*root.iterdir()]
            assert len(steps) == 2
            assert {path.stat().st_mode & 0o777 for path in steps} == {0o700}
    finally:
        os.umask(before)
    assert (tmp_path / "there").stat().st_mode == mode
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "a" / "run").stat().st_mode & 0o777 == 0o700


def strange_mode(path):
    path.chmod(path.stat().st_mode | stat.S_IWOTH)


def strange_group(path):
    path.chmod(path.stat().st_mode | stat.S_IWGRP)


def strange_owner(path):
    os.chown(path, 12345, -1)


@pytest.mark.parametrize(
    "change", [strange_mode, strange_group, pytest.param(strange_owner, marks=ROOT_ONLY)]
)
@pytest.mark.parametrize("at", ["run", "step", "manifest.json", "model.safetensors"])
def test_what_is_not_this_users_is_refused_or_told(tmp_path, change, at):
    """The folder of the run, that of a checkpoint, and each of its files; by default none is."""
    folder = tmp_path / "run"
    digests = save(folder)
    newest = max(folder.glob("step-*"))
    options = {name: lk.CheckpointOptions(owner=name) for name in ("any", "warn", "refuse")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restored(folder, options=options["refuse"]) == digests[-1]
    change({"run": folder, "step": newest}.get(at, newest / at))
    with pytest.raises(lk.CheckpointError, match=re.escape(str(folder))):
        restored(folder, options=options["refuse"])
    with pytest.raises(lk.CheckpointError, match=re.escape(str(folder))):
        restored(folder, newest, options=options["refuse"])
    with pytest.warns(lk.CheckpointWarning, match="of user|may write"):
        assert restored(folder, options=options["warn"]) == digests[-1]
    assert restored(folder, options=options["any"]) == digests[-1]


def hostile_names(count):
    """Odd names, seeded: what leads out of a folder, hides, or means something to a system."""
    rng = random.Random(0)
    parts = ["..", ".", "/", "\\", "\0", "\n", "~", "CON", "NUL", "a", "step-000000000001", "é",
             "\u202e", "\u2215", "%2e%2e", "$HOME", "*", " ", ":", "model", ".json", ".safetensors",
             "x" * 200, "-", "\ud800"]  # fmt: skip
    while count:
        name = "".join(rng.choices(parts, k=rng.randrange(1, 5)))
        tame = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", name)
        if not tame:
            count -= 1
            yield name


def test_two_hundred_hostile_names_are_no_names():
    """Neither of a file, nor of a checkpoint, nor of what may be removed."""
    names = [*hostile_names(200)]
    assert len({*names}) > 150
    for name in names:
        assert not any(pattern.fullmatch(name) for pattern in (FILE_NAME, NAME, TEMPORARY)), name


def outside_of(tmp_path):
    """A folder beside the run, and what is in it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.json").write_text("mine")
    (outside / "manifest.json").write_text("mine")
    return outside, {path: (path.read_bytes(), path.stat()) for path in outside.iterdir()}


LINKS = {
    "a checkpoint": "step-000000000009",
    "what a killed writer left": ".tmp-000000000009-0123abcd",
    "a file of a checkpoint": "step-000000000002/model.safetensors",
    "a manifest": "step-000000000002/manifest.json",
    "something in a checkpoint": "step-000000000001/more.json",
    "a file of what a killed writer left": ".tmp-000000000001-0123abcd/tree.json",
    "a folder in what a killed writer left": ".tmp-000000000001-0123abcd/deep",
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.filterwarnings("ignore:restored:loopkit.CheckpointWarning")
def test_links_at_each_level_lead_nowhere(tmp_path, link):
    """Restoring, rotating and clearing up neither read, change nor remove what is outside."""
    folder, (outside, before) = tmp_path / "run", outside_of(tmp_path)
    digests = save(folder)
    at = folder / LINKS[link]
    at.parent.mkdir(exist_ok=True)
    at.unlink(missing_ok=True)
    at.symlink_to(outside / "mine.json" if "." in at.name[1:] else outside)
    state = make_state()
    with lk.Checkpointer(folder) as checkpoints:
        checkpoints.restore(state)
        assert digest_of(state) == digests[0 if "step-000000000002" in LINKS[link] else 1]
        for _ in range(4):
            train(state, 1)
            checkpoints.save(state)
    assert restored(folder) == digest_of(state)
    assert {path: path.read_bytes() for path in outside.iterdir()} == {
        path: data for path, (data, _) in before.items()
    }
    assert all(path.stat().st_mtime_ns == old.st_mtime_ns for path, (_, old) in before.items())


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """What it points to is not written over."""
    folder, (outside, _) = tmp_path / "run", outside_of(tmp_path)
    folder.mkdir()
    (folder / ".lock").symlink_to(outside / "mine.json")
    with pytest.raises(lk.CheckpointError, match="writing"):
        save(folder)
    assert (outside / "mine.json").read_text() == "mine"
