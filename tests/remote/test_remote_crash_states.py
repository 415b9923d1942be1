"""Every state that a stop can leave in an object store, from each of which a run must go on."""

import copy
from typing import ClassVar

import fsspec
import loopkit as lk
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from loopkit.checkpoint.remote import UNFINISHED

from trainings import digest_of, make_state, train

LOSSES = [0.5, 0.1, 0.4, 0.3, 0.2]
ADDRESS = "recorded://bucket/run"


class Recorded(MemoryFileSystem):
    """A store that writes down what is done to it, and can fail at the n-th operation."""

    protocol = "recorded"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    operations: ClassVar = []
    fail_at = None

    @classmethod
    def do(cls, operation, *arguments):
        if cls.fail_at is not None and len(cls.operations) >= cls.fail_at:
            raise ConnectionError("the network is gone")
        cls.operations.append((operation, *arguments))

    def open(self, path, mode="rb", **settings):
        if mode != "wb":
            return super().open(path, mode, **settings)
        return Put(self, self._strip_protocol(path))

    def rm_file(self, path):
        path = self._strip_protocol(path)
        if path in self.store:
            self.do("remove", path)
        super().rm_file(path)


class Put:
    """An object on its way: it is there when it is closed, not before."""

    def __init__(self, fs, path):
        self.fs, self.path, self.data, self.closed = fs, path, bytearray(), False

    def write(self, chunk):
        self.data += chunk

    def discard(self):
        self.data = None

    def close(self):
        if not self.closed:
            self.fs.do("put", self.path, bytes(self.data))
            put(self.path, bytes(self.data))
        self.closed = True


def put(path, data):
    Recorded.store[path] = MemoryFile(None, path, data)


@pytest.fixture(autouse=True)
def store():
    """An empty store."""
    fsspec.register_implementation("recorded", Recorded, clobber=True)
    Recorded.store.clear()
    Recorded.operations.clear()
    Recorded.fail_at = None
    return Recorded


def save(state, digests, *, again=False):
    """Five saves, with scores that make the rotation keep an old one; one step twice."""
    with lk.Checkpointer(ADDRESS, monitor="loss", async_save=False) as checkpoints:
        for i, loss in enumerate(LOSSES):
            if not (again and i == 3):
                train(state, 1, "ema")
            state.extras["save"] = i
            digests.append(digest_of(state))
            checkpoints.save(state, {"loss": loss})
            Recorded.do("acknowledged", len(digests))


def outcome(acknowledged, digests):
    """What a restart finds: the last acknowledged state or a later one, or what is wrong."""
    state = make_state(seed=99)
    checkpoints = lk.Checkpointer(ADDRESS, monitor="loss")
    try:
        found = checkpoints.restore(state)
    except Exception as error:  # noqa: BLE001  # whatever it is, the restart failed
        return f"unusable: {error}"
    if not found:
        return "fine" if not acknowledged else "lost: starts from nothing"
    if digest_of(state) not in digests:
        return "mixed"
    if acknowledged and checkpoints.best.scores["loss"] > min(LOSSES[:acknowledged]):
        return "lost: the best"
    return "fine" if digests.index(digest_of(state)) + 1 >= acknowledged else "lost: older"


def states_after(operations):
    """The store after each operation; and with each object in halves, where stores do that."""
    acknowledged, objects = 0, {}
    yield objects, acknowledged
    for operation, *arguments in operations:
        if operation == "acknowledged":
            acknowledged = arguments[0]
        elif operation == "put":
            path, data = arguments
            if data:
                yield {**objects, path: data[: len(data) // 2]}, acknowledged
            objects = {**objects, path: data}
        else:
            objects = {path: data for path, data in objects.items() if path != arguments[0]}
        yield objects, acknowledged


def show(objects):
    Recorded.store.clear()
    for path, data in objects.items():
        put(path, data)


@pytest.mark.parametrize("again", [False, True], ids=["", "a step twice"])
@pytest.mark.filterwarnings("ignore:restored:loopkit.CheckpointWarning")
def test_no_stop_loses_or_mixes_what_was_saved(store, again):
    """From every prefix of the operations the last acknowledged save, or a later one, is back."""
    digests, seen = [], {}
    save(make_state(), digests, again=again)
    operations = copy.copy(store.operations)
    for number, (objects, acknowledged) in enumerate(states_after(operations)):
        show(objects)
        seen.setdefault(outcome(acknowledged, digests), []).append(number)
    assert seen.keys() == {"fine"}
    assert len(seen["fine"]) > 80


def test_the_same_test_finds_what_a_manifest_first_would_lose(store):
    """Were the manifest written before the files, or the files removed before it, it would fail."""
    digests, seen = [], set()
    save(make_state(), digests)
    operations = sorted(
        copy.copy(store.operations),
        key=lambda operation: operation[0] == "put" and "manifest" not in operation[1],
    )
    for objects, acknowledged in states_after(operations):
        show(objects)
        seen.add(outcome(acknowledged, digests).partition(":")[0])
    assert seen - {"fine"}


def test_a_run_that_goes_on_after_a_stop_leaves_no_litter(store):
    """After one more save there are only checkpoints: as many as are to be kept."""
    save(make_state(), [])
    for objects, _ in [*states_after(copy.copy(store.operations))][::3]:
        show(objects)
        state = make_state()
        with lk.Checkpointer(ADDRESS, monitor="loss", async_save=False) as checkpoints:
            checkpoints.restore(state)
            state.step += 1
            checkpoints.save(state, {"loss": 0.6})
        folders = {path.split("/")[-2] for path in store.store}
        assert len(folders) <= 3
        assert all(folder.startswith("step-") for folder in folders), folders
        assert not [path for path in store.store if path.endswith(UNFINISHED)]


def test_an_operation_that_fails_loses_nothing_and_is_told(store):
    """From each operation on the store is gone; when it is back, the last good save is there."""
    digests = []
    save(make_state(), digests)
    whole, told = len(store.operations), 0
    for at in range(whole):
        store.fail_at = None
        store.store.clear(), store.operations.clear()
        store.fail_at, found = at, []
        try:
            save(make_state(), found)
        except (lk.CheckpointError, ConnectionError):
            told += 1
        acknowledged = [o[1] for o in store.operations if o[0] == "acknowledged"]
        assert outcome(max(acknowledged, default=0), digests) == "fine", at
    assert told == whole
