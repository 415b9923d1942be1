"""Checkpoints in object stores: the same promises, without a rename."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import loopkit as lk
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from loopkit.checkpoint.manifest import MANIFEST
from loopkit.checkpoint.remote import Remote, place_of
from loopkit.parallel.launch import free_port

from forked import STARTER
from trainings import digest_of, make_state, train

ROOT = Path(__file__).parents[2]


def restored(address, which="latest"):
    """The digest of a new state that was restored from there; None if nothing was there."""
    state = make_state(seed=99)
    return digest_of(state) if lk.Checkpointer(address).restore(state, which) else None


def objects(address):
    """The objects of a folder, without its address."""
    place = place_of(address)
    return {path.removeprefix(place.path + "/") for path in place.fs.find(place.path)}


@pytest.fixture(scope="module")
def server():
    """An S3 server on this machine; a process of its own, as it leaves files open."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_it_listens(port, running)
        yield from addressed(port)
    finally:
        running.kill()
        running.wait()


def until_it_listens(port, running):
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert running.poll() is None, "the server ended"
            time.sleep(0.05)
        else:
            return


def addressed(port):
    """Have fsspec find the server, while the generator is suspended."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "hunter2")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{port}")
        fsspec.filesystem("s3").mkdir("bucket")
        yield
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def google():
    """A server like Google's on this machine, where both packages for it are installed."""
    with pytest.MonkeyPatch.context() as patch:
        # Before it is imported: it asks a new kind of store by gRPC, which the emulator has not
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs")
        emulator = pytest.importorskip("gcp_storage_emulator.server")
        port = free_port()
        running = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        running.start()
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        yield
        fsspec.filesystem("gs").clear_instance_cache()
        running.stop()


@pytest.fixture(params=["memory", "s3", "gs"])
def address(request, tmp_path):
    """A folder of its own in each kind of store."""
    if request.param != "memory":
        request.getfixturevalue({"s3": "server", "gs": "google"}[request.param])
    yield f"{request.param}://bucket/{tmp_path.name}"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_saved_restored_rotated_and_ranked_as_on_disk(address):
    """Five saves with scores: the last two and the best stay, each restored bit for bit."""
    state, digests = make_state(), {}
    with lk.Checkpointer(address, monitor="loss") as checkpoints:
        assert checkpoints.restore(state) is False
        for loss in (0.5, 0.1, 0.4, 0.3, 0.2):
            train(state, 1, "all")
            checkpoints.save(state, {"loss": loss})
            digests[state.step] = digest_of(state)
        assert [checkpoint.step for checkpoint in checkpoints.list()] == [2, 4, 5]
        assert (checkpoints.latest.step, checkpoints.best.step) == (5, 2)
        again = make_state(seed=5)
        assert checkpoints.restore(again, "best")
        assert digest_of(again) == digests[2]
        lk.load_best(state)
        assert digest_of(state) == digests[2]
        assert restored(address, "step-000000000004") == digests[4]
        assert restored(address, checkpoints.latest.path) == digests[5]
        assert restored(address, str(checkpoints.latest.path)) == digests[5]
    assert restored(address) == digests[5]
    folders = {name.partition("/")[0] for name in objects(address)}
    assert folders == {f"step-00000000000{step}" for step in (2, 4, 5)}
    assert not [name for name in objects(address) if name.endswith(".unfinished")]


def test_what_is_there_is_what_would_be_on_disk(address, tmp_path):
    """A folder that is copied from the store restores from the disk, and the other way round."""
    state = train(make_state(), 2, "ema")
    with lk.Checkpointer(address) as checkpoints:
        checkpoints.save(state)
    place = checkpoints.latest.path
    place.fs.get(place.path, str(tmp_path / place.name), recursive=True)
    assert restored(tmp_path) == digest_of(state)
    place.fs.put(str(tmp_path / place.name), place.path + "-7", recursive=True)
    assert restored(address, place.name + "-7") == digest_of(state)


def test_a_step_that_is_saved_again_gets_a_name_of_its_own(address):
    """The last save of a step is the latest."""
    state = train(make_state(), 1)
    with lk.Checkpointer(address) as checkpoints:
        for note in range(3):
            state.extras["note"] = note
            checkpoints.save(state)
    assert restored(address) == digest_of(state)
    assert len(lk.Checkpointer(address).list()) == 2


def test_damage_is_named_and_the_one_before_restored(address):
    """A flipped, a short, a missing file, and a manifest that is gone: each is named."""
    state, digests = make_state(), []
    with lk.Checkpointer(address) as checkpoints:
        for _ in range(2):
            digests.append(digest_of(train(state, 1, "ema")))
            checkpoints.save(state)
    fs, folder = checkpoints.latest.path.fs, checkpoints.latest.path.path
    for name, damage in {
        "model.safetensors": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "tree.json": lambda data: data[:-1],
        "optimizer.safetensors": None,
        MANIFEST: None,
    }.items():
        good = fs.cat_file(f"{folder}/{name}")
        fs.rm_file(f"{folder}/{name}")
        if damage is not None:
            fs.pipe_file(f"{folder}/{name}", damage(good))
        with pytest.warns(lk.CheckpointWarning, match=f"step 2: {name} damaged"):
            assert restored(address) == digests[0]
        if name != MANIFEST:
            fs.pipe_file(f"{folder}/{name}", good)
    first = folder.replace("step-000000000002", "step-000000000001")
    fs.rm_file(f"{first}/{MANIFEST}")
    with pytest.raises(lk.DamageError, match=r"(?s)step 2: manifest.*step 1: manifest"):
        restored(address)


@pytest.mark.parametrize("count", [1, 20])
def test_an_object_that_was_not_finished_is_not_there(address, count):
    """A writer that fails after some megabytes leaves nothing, nor harms what had its name."""
    place = place_of(address) / "model.safetensors"
    if address.startswith("memory:"):
        pytest.skip("a store whose objects are there from their first byte on")
    if address.startswith("gs:") and count > 1:
        pytest.skip("the emulator does not take back an upload")

    def chunks():
        for _ in range(count):
            yield memoryview(bytes(1_000_000))
        raise RuntimeError("the disk that it came from")

    for before in (set(), {"model.safetensors"}):
        with pytest.raises(lk.StorageError, match="the disk that it came from"):
            place.write(chunks())
        assert objects(address) == before
        place.write([memoryview(b"whole")])
        assert place.fs.cat_file(place.path) == b"whole"


def test_foreign_objects_are_left_alone(address):
    """Neither rotation nor clearing up touches what it did not write."""
    place, state = place_of(address), make_state()
    foreign = {"notes.txt", "step-000000000001/mine.bin", "best/model.safetensors", "step-1/a"}
    for name in foreign:
        place.fs.pipe_file(f"{place.path}/{name}", b"mine")
    with lk.Checkpointer(address) as checkpoints:
        for _ in range(4):
            train(state, 1)
            checkpoints.save(state)
    assert foreign <= objects(address)
    assert {place.fs.cat_file(f"{place.path}/{name}") for name in foreign} == {b"mine"}


def test_the_run_that_came_last_goes_on_and_the_other_is_told(address):
    """A job that was put back into the queue can start at once; two never save in turns."""
    state = train(make_state(), 1)
    first, second = lk.Checkpointer(address), lk.Checkpointer(address)
    first.save(state)
    first.wait()
    second.restore(state)
    second.save(state)
    second.wait()
    with pytest.raises(lk.CheckpointError, match="another run has begun"):
        first.save(state)
    assert second.save(train(state, 1))
    second.close()
    assert ".lock" not in objects(address)
    first.close()


def test_weights_go_out_and_in(address):
    """`export` writes to an address, `load_weights` reads from one: a file, or a checkpoint."""
    state = train(make_state(), 2)
    path = lk.export(state, f"{address}/model.safetensors")
    assert path == place_of(f"{address}/model.safetensors")
    with lk.Checkpointer(f"{address}/run") as checkpoints:
        checkpoints.save(state)
    for source in (path, str(path), checkpoints.latest.path):
        other = make_state(seed=7).model
        assert not lk.load_weights(other, source).missing
        for name, tensor in state.model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)


def test_a_store_that_does_not_answer_is_not_a_store_with_nothing_in_it(server, monkeypatch):
    """To restore from it raises; to save to it is a failed save, by the policy."""
    fsspec.filesystem("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    state = make_state()
    options = lk.CheckpointOptions(on_error="warn")
    checkpoints = lk.Checkpointer("s3://bucket/away", async_save=False, options=options)
    with pytest.raises(lk.StorageError, match="listing s3://bucket/away"):
        checkpoints.restore(state)
    with pytest.warns(lk.CheckpointWarning, match="s3://bucket/away"):
        assert not checkpoints.save(state)
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_bucket_that_is_not_there_is_a_failed_save(server):
    """It is never made by mistake."""
    checkpoints = lk.Checkpointer("s3://nobody/run", async_save=False)
    with pytest.raises(lk.CheckpointError, match="writing"):
        checkpoints.save(make_state())
    assert not fsspec.filesystem("s3").exists("nobody")


LEAVE = """
import sys
import time
import loopkit as lk
from trainings import make_state, digest_of

state = make_state(big=__import__("torch").zeros(3_000_000))
checkpoints = lk.Checkpointer(sys.argv[1])
checkpoints.save(state)
print(digest_of(state), flush=True)
"""


def test_leaving_the_process_waits_for_the_last_save(server):
    """A script that ends without close leaves a checkpoint that is complete."""
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = STARTER.run(LEAVE, "s3://bucket/leave", env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    state = make_state(big=torch.ones(3_000_000))
    assert lk.Checkpointer("s3://bucket/leave").restore(state)
    assert digest_of(state) == done.stdout.strip()


LOOK_UP = """
import asyncio, time
import fsspec.asyn
from loopkit.checkpoint.writer import Writer

async def look_up():
    return await asyncio.get_running_loop().getaddrinfo("localhost", 80)

def job():
    time.sleep(0.5)
    fsspec.asyn.sync(loop, look_up)
    print("found")

loop, writer = fsspec.asyn.get_loop(), Writer()
writer.start(job)
"""


def test_the_last_save_can_look_up_hosts_while_the_process_ends():
    """Executors, which name look-ups need, end after the save, not before."""
    done = STARTER.run(LOOK_UP)
    assert (done.stdout, done.stderr) == ("found\n", "")


def test_addresses_are_told_from_paths(tmp_path):
    """A file:// address is a path; one that went through Path has lost a slash, and is refused."""
    assert place_of(f"file://{tmp_path}") == tmp_path
    assert place_of("a/b://c") == Path("a/b:/c")
    assert isinstance(place_of("memory://a/b"), Remote)
    with pytest.raises(lk.UsageError, match="as text"):
        lk.Checkpointer(Path("s3://bucket/run"))
    with pytest.raises(lk.UsageError, match="nosuch"):
        lk.Checkpointer("nosuch://bucket/run")


def test_no_secret_is_shown(server):
    """Neither address nor error has the credentials."""
    place = place_of("s3://bucket/run")
    assert "hunter2" not in f"{place} {place!r} {lk.Checkpointer('s3://bucket/run')!r}"
