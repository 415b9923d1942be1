"""Damage at rest is found and named; what someone plants is neither followed nor executed."""

import ast
import io
import json
import os
import pickle
import random
import shutil
import zlib
from pathlib import Path

import loopkit as lk
import numpy as np
import pytest
import torch
from loopkit.checkpoint.folder import read_checkpoint
from loopkit.checkpoint.manifest import FILE_NAME, MANIFEST, VERSION
from loopkit.checkpoint.read import read

from trainings import digest_of, make_state, restored, train

EXECUTED = []


def explode():
    """A function, found by its name: a bound method would be pickled with a copy of its list."""
    EXECUTED.append("executed")


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return explode, ()


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints, and the digests of their states."""
    state, digests = make_state(), []
    with lk.Checkpointer(tmp_path / "run", async_save=False) as checkpoints:
        for _ in range(2):
            train(state, 1, "ema")
            checkpoints.save(state)
            digests.append(digest_of(state))
    return tmp_path / "run", digests


@pytest.fixture(autouse=True)
def _nothing_is_executed():
    yield
    assert EXECUTED == []


def newest(folder):
    return max(folder.glob("step-*"))


def files_of(folder):
    return sorted(path.name for path in newest(folder).iterdir())


def sign(path, change):
    """Change a manifest, and make its checksum right again, as an attacker can."""
    body = json.loads(path.read_text())
    body.pop("crc32")
    change(body)
    text = json.dumps(body, indent=1) + "\n"
    body["crc32"] = f"{zlib.crc32(text.encode()):08x}"
    path.write_text(json.dumps(body, indent=1) + "\n")


def replace(folder, name, data):
    """Put another file in the place of one, with a manifest that says it is right."""
    (folder / name).write_bytes(data)
    entry = {"size": len(data), "crc32": f"{zlib.crc32(data):08x}", "sha256": None}
    sign(folder / MANIFEST, lambda body: body["files"].update({name: entry}))


def falls_back(folder, older, match):
    """Whether the older one is restored, with a warning that says why."""
    with pytest.warns(lk.CheckpointWarning, match=match):
        return restored(folder) == older


def test_a_flip_in_any_byte_is_found(tmp_path):
    """Of a small checkpoint every byte in turn, in every file: each flip is an error."""
    model = torch.nn.Linear(2, 1)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    train_step = lk.train_step(lambda s, x: s.model(x).mean())
    train_step(state, torch.ones(1, 2))
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
    folder, flips = newest(tmp_path), 0
    read(read_checkpoint(folder))
    for name in files_of(tmp_path):
        data = bytearray((folder / name).read_bytes())
        with (folder / name).open("r+b", buffering=0) as file:
            for at, byte in enumerate(data):
                os.pwrite(file.fileno(), bytes([byte ^ (1 << (at % 8))]), at)
                with pytest.raises(lk.DamageError):
                    read(read_checkpoint(folder))
                os.pwrite(file.fileno(), bytes([byte]), at)
                flips += 1
    read(read_checkpoint(folder))
    assert flips > 10_000


def damages():
    """Ways in which a file of a checkpoint can be damaged."""
    rng = random.Random(0)

    def flip(path):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    def zero(path):
        data = bytearray(path.read_bytes())
        start = rng.randrange(len(data) // 2)
        data[start : start + 512] = bytes(len(data[start : start + 512]))
        path.write_bytes(data)

    return {
        "flip": flip,
        "zeroed block": zero,
        "truncated": lambda path: os.truncate(path, rng.randrange(path.stat().st_size)),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "missing": lambda path: path.unlink(),
        "stale": lambda path: shutil.copy(min(path.parents[1].glob("step-*")) / path.name, path),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
        "a link": lambda path: path.symlink_to(path.rename(path.parents[2] / path.name)),
        "not readable JSON": lambda path: path.write_bytes(b"[" * 100_000),
        "a pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
        "a torch.save": lambda path: torch.save({"a": Bomb()}, path),
    }  # fmt: skip


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_named_and_the_one_before_restored(two, damage):
    """Each kind of damage, in each file: the file is named, the older checkpoint restored."""
    folder, digests = two
    names = files_of(folder)
    assert len(names) == 6
    for name in names:
        shutil.copytree(folder, folder.with_name(f"{name}-run"))
        damaged = folder.with_name(f"{name}-run")
        good = (newest(damaged) / name).read_bytes()
        damages()[damage](newest(damaged) / name)
        if damage == "stale" and (newest(damaged) / name).read_bytes() == good:
            assert restored(damaged) == digests[1]  # the epoch is the same in both
            shutil.rmtree(damaged)
            continue
        assert falls_back(damaged, digests[0], f"step 2: {name} damaged"), name
        shutil.rmtree(damaged)
        (folder.parent / name).unlink(missing_ok=True)


def test_what_was_passed_over_can_be_read(two):
    """`restored` says what was restored, and which were damaged how."""
    folder, _ = two
    (newest(folder) / "model.safetensors").unlink()
    checkpoints = lk.Checkpointer(folder)
    with pytest.warns(lk.CheckpointWarning):
        checkpoints.restore(make_state())
    assert checkpoints.restored.checkpoint.step == 1
    assert checkpoints.restored.skipped == ("step 2: model.safetensors damaged (missing)",)


def test_nothing_there_and_nothing_usable_differ(two):
    """An empty folder is False; one where all are damaged raises, naming each of them."""
    folder, _ = two
    state = make_state()
    before = digest_of(state)
    assert lk.Checkpointer(folder.parent / "other").restore(state) is False
    for path in folder.glob("step-*"):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(lk.DamageError, match=r"(?s)step 2: model.*step 1: model"):
        lk.Checkpointer(folder).restore(state)
    for path in folder.glob("step-*"):
        (path / MANIFEST).unlink()
    with pytest.raises(lk.DamageError, match=r"(?s)step 2: manifest.*step 1: manifest"):
        lk.Checkpointer(folder).restore(state)
    assert digest_of(state) == before


@pytest.mark.parametrize("seed", range(20))
def test_where_all_are_damaged_nothing_is_begun_anew(two, seed):
    """Of every checkpoint some file in some way, 20 times: it raises, and names each of them."""
    folder, _ = two
    rng, kinds = random.Random(seed), damages()
    for path in folder.glob("step-*"):
        name = rng.choice(files_of(folder))
        kind = rng.choice([k for k in kinds if k not in {"stale", "a link"}])
        kinds[kind](path / name)
    state = make_state()
    before = digest_of(state)
    with pytest.raises(lk.DamageError, match=r"(?s)step 2: .* damaged.*step 1: .* damaged"):
        lk.Checkpointer(folder).restore(state)
    assert digest_of(state) == before


def test_a_damaged_checkpoint_that_was_asked_for_raises(two):
    """One that was named is never replaced by another."""
    folder, _ = two
    (newest(folder) / "tree.json").unlink()
    with pytest.raises(lk.DamageError, match=r"tree\.json"):
        lk.Checkpointer(folder).restore(make_state(), newest(folder))


def rename(body, name):
    body["files"][name] = body["files"]["tree.json"]


LIES = {
    "a path upwards": lambda body: rename(body, "../../secret.json"),
    "an absolute path": lambda body: rename(body, "/etc/passwd"),
    "a part that is not there": lambda body: body["parts"].update({"extras.more": ""}),
    "a part that is left out": lambda body: body["parts"].pop("rng"),
    "a file that is left out": lambda body: body["files"].pop("model.safetensors"),
    "no tree": lambda body: body["files"].pop("tree.json"),
    "another step": lambda body: body.update(step=5),
    "a negative step": lambda body: body.update(step=-1),
    "a step that is true": lambda body: body.update(step=True),
    "a serial that is text": lambda body: body.update(serial="1"),
    "a score that is none": lambda body: body.update(scores={"loss": "x"}),
    "scores that are a list": lambda body: body.update(scores=[1]),
    "a size that is too large": lambda body: body["files"]["tree.json"].update(size=2**62),
    "a field more": lambda body: body.update(more=1),
    "a field less": lambda body: body.pop("samples"),
    "another format": lambda body: body.update(format="pickle"),
    "version 0 as text": lambda body: body.update(version="1"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_found(two, lie):
    """With a checksum that is right: what does not fit the files, or the types, is damage."""
    folder, digests = two
    sign(newest(folder) / MANIFEST, LIES[lie])
    assert falls_back(folder, digests[0], "step 2: ")


def test_a_later_version_of_the_format_says_to_upgrade(two):
    """It is not damage, and nothing older is taken in its place."""
    folder, _ = two
    sign(newest(folder) / MANIFEST, lambda body: body.update(version=VERSION + 1))
    with pytest.raises(lk.CheckpointError, match="upgrade"):
        restored(folder)


def test_files_that_fit_their_checksums_but_not_each_other_are_found(two):
    """Trees of anything else are damage, or refused as no state of this kind; nothing is loaded."""
    folder, digests = two
    path = newest(folder)
    tree = json.loads((path / "tree.json").read_text())
    good = (path / MANIFEST).read_bytes(), (path / "tree.json").read_bytes()
    trees = [
        {}, [], 3, {"state": 1, "parameters": []}, {"state": {}, "parameters": []},
        {**tree, "state": {**tree["state"], "model": 3}},
        {**tree, "state": {**tree["state"], "optimizer": {"state": {}}}},
        {**tree, "state": {**tree["state"], "clock": {"step": 2}}},
        {**tree, "state": {**tree["state"], "rng": {"$dtype": "load"}}},
        {**tree, "parameters": 3},
        {**tree, "more": 1},
    ]  # fmt: skip
    for changed in trees:
        replace(path, "tree.json", json.dumps(changed).encode())
        state = make_state()
        before = digest_of(state)
        with pytest.raises((lk.DamageError, lk.CheckpointError)):
            lk.Checkpointer(folder).restore(state, path)
        assert digest_of(state) == before
        (path / MANIFEST).write_bytes(good[0])
        (path / "tree.json").write_bytes(good[1])
    assert restored(folder) == digests[1]


def of_all_parts():
    """A state that keeps averages, a schedule, a loss scale and things of its own."""
    return train(make_state(note=[1], tensor=torch.ones(2)), 1, "all")


def test_every_part_is_needed(tmp_path):
    """Each part in turn left out of the tree, the manifest and the files: never loaded."""
    folder = tmp_path / "run"
    with lk.Checkpointer(folder) as checkpoints:
        checkpoints.save(of_all_parts())
    path = newest(folder)
    tree = json.loads((path / "tree.json").read_text())
    good = (path / MANIFEST).read_bytes(), (path / "tree.json").read_bytes()
    state = of_all_parts()
    before = digest_of(state)
    parts = [*tree["state"]]
    parts += [f"{part}.{name}" for part in ("features", "extras") for name in tree["state"][part]]
    assert len(parts) >= 7 + 3 + 2
    for part in parts:
        first, _, name = part.partition(".")
        changed = json.loads(good[1])
        del (changed["state"][first] if name else changed["state"])[name or first]

        def leave_out(body):
            left = {n: c for n, c in body["parts"].items() if not (n + ".").startswith(part + ".")}
            body.update(parts=left)
            body["files"].pop(f"{first}.safetensors", None)

        replace(path, "tree.json", json.dumps(changed).encode())
        sign(path / MANIFEST, leave_out)
        with pytest.raises((lk.CheckpointError, lk.UsageError)):
            lk.Checkpointer(folder).restore(state, path)
        assert digest_of(state) == before
        (path / MANIFEST).write_bytes(good[0])
        (path / "tree.json").write_bytes(good[1])


def of_torch(*, zipped):
    file = io.BytesIO()
    torch.save({"model": Bomb()}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def of_numpy():
    file = io.BytesIO()
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    return file.getvalue()


PAYLOADS = {
    "a pickle": lambda: pickle.dumps(Bomb()),
    "a pickle as text": lambda: pickle.dumps(Bomb(), protocol=0),
    "a torch.save": lambda: of_torch(zipped=True),
    "a torch.save of old": lambda: of_torch(zipped=False),
    "an array of objects": of_numpy,
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_pickle_is_read_whatever_its_place(two, payload, monkeypatch):
    """A bomb in each file, with checksums that are right, does not go off, nor if torch would."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (folder, digests), bomb = two, PAYLOADS[payload]()
    for name in files_of(folder):
        path = folder.with_name("copy")
        shutil.copytree(folder, path)
        if name == MANIFEST:
            (newest(path) / name).write_bytes(bomb)
        else:
            replace(newest(path), name, bomb)
        assert falls_back(path, digests[0], "step 2: ")
        shutil.rmtree(path)
    for name in ("bomb.pt", "bomb.safetensors"):
        (folder / name).write_bytes(bomb)
        with pytest.raises(lk.CheckpointError, match="weights_only=True"):
            lk.load_weights(make_state().model, folder / name)


def test_the_bombs_are_live():
    """Who does read them as what they are runs their code: the test above could fail."""
    for payload in ("a pickle", "a pickle as text"):
        pickle.loads(PAYLOADS[payload]())
    for payload in ("a torch.save", "a torch.save of old"):
        torch.load(io.BytesIO(PAYLOADS[payload]()), weights_only=False)
    np.load(io.BytesIO(PAYLOADS["an array of objects"]()), allow_pickle=True)
    assert len(EXECUTED) == 5
    EXECUTED.clear()


@pytest.mark.parametrize("which", ["latest", "a path"])
def test_a_link_to_a_checkpoint_is_not_followed(two, which):
    """Neither in the list nor by its name."""
    folder, digests = two
    outside = folder.parent / "outside"
    newest(folder).rename(outside)
    (folder / "step-000000000002").symlink_to(outside)
    if which == "latest":
        assert restored(folder) == digests[0]
        assert [checkpoint.step for checkpoint in lk.Checkpointer(folder).list()] == [1]
    else:
        with pytest.raises(lk.CheckpointError, match="link"):
            restored(folder, "step-000000000002")


HOSTILE = ["..", ".", "", "/", "a/b", "a\\b", "a\0b", "-", "~", "a b", "é.json", "con.json\n",
           "..json", ".json", "a.json/b", ".hidden.json", "a.pt", "a.json/..", "x" * 200 + ".json",
           "a\u202e.json"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_are_no_names_of_files(name):
    """A name in a manifest has no separators, no dots in front, no odd characters, one ending."""
    assert not FILE_NAME.fullmatch(name)


def test_names_of_scores_never_become_paths(tmp_path):
    """Whatever a score is called, it stays within the manifest, and on its line."""
    names = ["../../escape", "/abs", "a\nb", "\x1b[2J", "loss\u2028", "x" * 300]
    with lk.Checkpointer(tmp_path / "run", monitor=names[0]) as checkpoints:
        checkpoints.save(make_state(), dict.fromkeys(names, 0.5))
        checkpoints.wait()
    assert checkpoints.best.scores == dict.fromkeys(names, 0.5)
    assert len(str(checkpoints.list()).splitlines()) == 1
    assert str(checkpoints.list()).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len([*(tmp_path / "run").iterdir()]) == 1


def test_a_checkpoint_from_elsewhere_holds_no_secret_of_this_process(tmp_path, monkeypatch):
    """Neither the environment nor the arguments of the process are written."""
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(train(make_state(), 1))
    for path in newest(tmp_path).iterdir():
        assert b"hunter2" not in path.read_bytes()
        assert os.uname().nodename.encode() not in path.read_bytes()


def test_the_package_has_no_way_to_execute_what_it_reads():
    """No pickle, no torch.load, no eval, exec, compile or yaml anywhere in the package."""
    root = Path(lk.__file__).parent
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names}
                names.add((getattr(node, "module", None) or "").split(".")[0])
                # The public checks for tests pickle steps to show that one can; they read no file
                assert not names & forbidden or path.name == "checking.py", path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "__import__"}, path
                assert not called.startswith("torch.distributed.checkpoint"), path
