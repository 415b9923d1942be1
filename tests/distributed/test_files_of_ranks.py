"""Each rank writes its own part of a state that is spread; one rename makes them a checkpoint."""

import errno
import itertools
import json
import shutil
import sys
from pathlib import Path

import loopkit as lk
import pytest
import torch
from loopkit.checkpoint.commit import Store
from loopkit.checkpoint.disk import Disk
from loopkit.checkpoint.folder import contents
from loopkit.checkpoint.manifest import MANIFEST, File, Manifest
from loopkit.checkpoint.restore import restore_one
from loopkit.testing import assert_bitwise_equal
from test_parity import STRATEGIES, classifier, fresh, whole
from torch import nn

from pool import POOL
from problems import make_batches

sys.path.append(str(Path(__file__).parents[1] / "faults"))
from disks import STOPS, Recorder
from test_crash_states import outcome_of, states_after

from trainings import digest_of, make_state, noisy


def data():
    return make_batches(12, dtype=torch.float64)


def stepped(strategy):
    return lk.compose(lk.with_ema(0.9), lk.distributed(strategy))(classifier)


def saved(name, folder, updates):
    step, state = stepped(STRATEGIES[name][1]()), fresh()
    checkpoints = lk.Checkpointer(folder, every=1, keep_last=None)
    checkpoints.wrap(lk.run(step, state, data(), max_steps=updates)).finish()
    checkpoints.close()
    return whole(state.model.state_dict()), whole(state.features["ema"].weights)


def restored(name, folder):
    """What is restored, and that it trains on."""
    step, state = stepped(STRATEGIES[name][1]() if name else "ddp"), fresh(seed=3)
    step.set_up(state)
    assert lk.Checkpointer(folder).restore(state)
    found = whole(state.model.state_dict()), whole(state.features["ema"].weights)
    kept = state.optimizer.state_dict()["state"]
    moments = {(i, k): whole({"": v})[""] for i, values in kept.items() for k, v in values.items()}
    step(state, data()[0])
    return *found, moments


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of checkpoints of each strategy that spreads a state, with what it held."""
    made = {}
    for name in ("fsdp", "hsdp", "zero1", "tp", "tp and fsdp"):
        folder = tmp_path_factory.mktemp("run") / "checkpoints"
        made[name] = folder, POOL.run(STRATEGIES[name][0], saved, name, str(folder), 3)[0]
    return made


def part_files(folder):
    return sorted(contents(folder).intact[-1].path.glob("part-*.safetensors"))


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "zero1", "tp and fsdp"])
def test_each_rank_writes_its_share_and_nothing_is_written_twice(folders, name):
    """Files of about equal size, which together hold each number of the state once."""
    folder, (weights, _) = folders[name]
    sizes = [path.stat().st_size for path in part_files(folder)]
    assert len(sizes) == STRATEGIES[name][0]
    tensors = sum(t.nbytes for t in weights.values())
    spread = 2 * tensors if name == "zero1" else 4 * tensors  # moments; and weights and averages
    headers = sum(int.from_bytes(p.read_bytes()[:8], "little") + 8 for p in part_files(folder))
    assert sum(sizes) - headers == pytest.approx(spread, rel=0.03)  # zero1: and 0-d counts
    assert max(sizes) < 1.6 * spread / len(sizes) + headers / len(sizes)


@pytest.mark.parametrize("onto", ["fsdp", "hsdp", "zero1", "tp and fsdp", "ddp on 3", None])
@pytest.mark.parametrize("name", ["fsdp", "hsdp", "zero1", "tp", "tp and fsdp"])
def test_what_one_strategy_wrote_any_other_restores(folders, name, onto):
    """Weights, averages and moments are bit for bit those that were saved, on every rank."""
    folder, (weights, averages) = folders[name]
    one = restored(None, folder)[2]
    for found in POOL.run(STRATEGIES[onto][0] if onto else 1, restored, onto, str(folder)):
        assert all(torch.equal(found[0][k], weights[k]) for k in weights)
        assert all(torch.equal(found[1][k], averages[k]) for k in averages)
        assert all(torch.equal(found[2][k], one[k]) for k in found[2])


def test_weights_by_themselves_come_out_of_parts(folders):
    """`load_weights` puts them together on one process."""
    folder, (weights, _) = folders["fsdp"]
    model = fresh(seed=4).model
    lk.load_weights(model, contents(folder).intact[-1].path)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)


class Tied(nn.Module):
    """An embedding that is the output layer as well."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def saved_tied(folder):
    torch.manual_seed(0)
    model = Tied()
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step = lk.distributed("fsdp")(lambda state, batch: state.model(batch).square().mean())
    step(state, torch.arange(12))
    checkpoints = lk.Checkpointer(folder)
    checkpoints.save(state)
    checkpoints.close()
    return whole(model.state_dict())


def test_tied_weights_are_written_once(tmp_path):
    """And both names come back."""
    weights = POOL.run(2, saved_tied, str(tmp_path))[0]
    names = [json.loads(p.read_bytes()[8:].split(b"}}")[0] + b"}}") for p in part_files(tmp_path)]
    assert [[*name] for name in names] == [["model/embed.weight"]] * 2
    model = Tied()
    lk.load_weights(model, contents(tmp_path).intact[-1].path)
    assert torch.equal(model.head.weight, weights["head.weight"])


# What can go wrong on one rank of several


class FullFor(Disk):
    """A disk that is full for one rank, at its n-th write."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def write(self, file, data):
        self.count += 1
        if self.count >= self.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(file, data)


def saved_on_a_full_disk(folder, rank, policy):
    """Saves twice, the second time with a full disk on one rank; what each was told."""
    step, state = stepped("fsdp"), fresh()
    step(state, data()[0])
    mine = torch.distributed.get_rank() == rank
    with lk.Checkpointer(folder) as checkpoints:
        checkpoints.save(state)
    step(state, data()[1])
    options = lk.CheckpointOptions(disk=FullFor(1) if mine else Disk(), on_error=policy)
    checkpoints, said = lk.Checkpointer(folder, options=options), ""
    try:
        checkpoints.save(state)
        checkpoints.wait()
    except (lk.CheckpointError, lk.RankError) as error:
        said = str(error)
    left = sorted(path.name for path in Path(folder).iterdir() if path.name.startswith(".tmp"))
    return said, left, [c.step for c in contents(Path(folder)).intact]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_fails_the_save_on_all(tmp_path, rank):
    """The rank is named, nothing is left of it, and the checkpoint before is there."""
    found = POOL.run(2, saved_on_a_full_disk, str(tmp_path), rank, "raise")
    assert all("No space left" in said for said, _, _ in found)
    if rank == 1:
        assert "rank 1 failed at it: OSError" in found[0][0]
    assert found[0][1:] == ([], [1])


def saved_with_a_bad_weight(folder):
    """One rank's part of the parameters is not finite."""
    step, state = stepped("fsdp"), fresh()
    step(state, data()[0])
    if torch.distributed.get_rank() == 1:
        state.model.first.weight.detach().to_local().fill_(float("nan"))
    checkpoints = lk.Checkpointer(folder, options=lk.CheckpointOptions(on_error="warn"))
    checkpoints.save(state)
    with pytest.raises(lk.NonFiniteError) as caught:
        checkpoints.wait()
    return str(caught.value)


def test_a_part_that_is_not_finite_is_saved_by_nobody(tmp_path):
    """The rank that has it names the parameter, and the other the rank; no policy lets it pass."""
    said = POOL.run(2, saved_with_a_bad_weight, str(tmp_path))
    assert all("first.weight" in text for text in said)
    assert "first.weight, on rank 1" in said[0]
    assert contents(tmp_path) == contents(tmp_path / "nowhere")


def trained_over_saves(folder):
    """Saves after each update, which go on while later updates are made; then each is read."""
    step, state = stepped("fsdp"), fresh()
    digests = []
    checkpoints = lk.Checkpointer(folder, keep_last=None)
    for state in lk.run(step, state, data(), max_steps=6):
        checkpoints.save(state)
        digests.append(whole(state.model.state_dict()))
    checkpoints.close()
    for checkpoint, expected in zip(checkpoints.list(), digests, strict=True):
        restore_one(state, checkpoint)
        found = whole(state.model.state_dict())
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    return len(digests)


def test_what_is_being_written_is_not_changed_by_later_updates(tmp_path):
    """Every checkpoint holds the weights of its own update, on every rank."""
    assert POOL.run(2, trained_over_saves, str(tmp_path)) == [6, 6]


# Damage, and files that lie


def restored_with(folder):
    step, state = stepped("fsdp"), fresh(seed=3)
    step.set_up(state)
    checkpoints = lk.Checkpointer(folder)
    with pytest.warns(lk.CheckpointWarning, match="passed over"):
        assert checkpoints.restore(state)
    return state.step, checkpoints.restored.skipped


@pytest.mark.parametrize("kind", ["flipped", "missing", "cut"])
@pytest.mark.parametrize("part", [0, 1])
def test_all_ranks_fall_back_where_one_finds_damage(folders, tmp_path, part, kind):
    """A file that only one rank reads is damaged: both restore the checkpoint before."""
    shutil.copytree(folders["fsdp"][0], tmp_path / "run")
    path = part_files(tmp_path / "run")[part]
    contents_now = bytearray(path.read_bytes())
    contents_now[-5] ^= 1
    path.unlink()
    if kind != "missing":
        path.write_bytes(contents_now if kind == "flipped" else contents_now[:-1])
    for step, skipped in POOL.run(2, restored_with, str(tmp_path / "run")):
        assert step == 2
        assert path.name in skipped[0]


def lie(folder, change):
    """Change the index of the newest checkpoint; the checksums are made to hold."""
    checkpoint = contents(folder).intact[-1]
    path = checkpoint.path / "tree.json"
    tree = json.loads(path.read_bytes())
    change(tree["pieces"], tree)
    data = json.dumps(tree).encode()
    path.write_bytes(data)
    manifest = Manifest.from_bytes((checkpoint.path / MANIFEST).read_bytes())
    manifest.files["tree.json"] = File.of([memoryview(data)])
    (checkpoint.path / MANIFEST).write_bytes(manifest.to_bytes())


NAME = "model/first.weight"
LIES = {
    "a piece is lacking": lambda pieces, _: pieces[NAME].pop(),
    "a piece comes twice": lambda pieces, _: pieces[NAME].append(pieces[NAME][0]),
    "a piece overlaps": lambda pieces, _: pieces[NAME][1][2].__setitem__(0, 3),
    "a piece lies outside": lambda pieces, _: pieces[NAME][1][2].__setitem__(0, 5),
    "a negative start": lambda pieces, _: pieces[NAME][1][2].__setitem__(0, -4),
    "a truth as a number": lambda pieces, _: pieces[NAME][0][2].__setitem__(0, False),
    "a text as a number": lambda pieces, _: pieces[NAME][0][2].__setitem__(0, "0"),
    "too few dimensions": lambda pieces, _: pieces[NAME][1].__setitem__(2, [4]),
    "another rank": lambda pieces, _: pieces[NAME][1].__setitem__(0, 7),
    "a rank that is a path": lambda pieces, _: pieces[NAME][1].__setitem__(0, "../../0"),
    "another name": lambda pieces, _: pieces[NAME][1].__setitem__(1, "model/first.bias"),
    "no such name": lambda pieces, _: pieces[NAME][1].__setitem__(1, "there/is/none"),
    "no pieces at all": lambda pieces, _: pieces.clear(),
    "pieces of nothing": lambda pieces, _: pieces.update(more=pieces[NAME]),
    "no index": lambda _, tree: tree.pop("pieces"),
    "a list as index": lambda _, tree: tree.update(pieces=[1]),
    "a huge tensor": lambda pieces, tree: huge(pieces, tree),
}


def huge(pieces, tree):
    """A tensor of 2**60 numbers in two pieces, as the index has it."""
    node = tree["state"]["model"]
    node = node.get("$ordered", node)
    found = (
        next(v for k, v in node if k == "first.weight")
        if isinstance(node, list)
        else node["first.weight"]
    )
    found["$parts"][1] = [2**60, 4]
    pieces[NAME][0][2:] = [[0, 0], [2**59, 4]]
    pieces[NAME][1][2:] = [[2**59, 0], [2**59, 4]]


@pytest.mark.parametrize("kind", LIES)
def test_an_index_that_lies_is_never_believed(folders, tmp_path, kind):
    """The checkpoint counts as damaged, and the one before is restored."""
    shutil.copytree(folders["fsdp"][0], tmp_path / "run")
    lie(tmp_path / "run", LIES[kind])
    state = fresh(seed=3)
    checkpoints = lk.Checkpointer(tmp_path / "run")
    with pytest.warns(lk.CheckpointWarning, match="passed over"):
        assert checkpoints.restore(state)
    assert state.step == 2


# Stops, with several writers


def trained_small(folder):
    step = lk.compose(lk.with_ema(0.8), lk.distributed("fsdp"))(noisy)
    state = make_state()
    checkpoints = lk.Checkpointer(folder, every=1, keep_last=None)
    batches = [make_batches(6)[i] for i in range(6)]
    checkpoints.wrap(lk.run(step, state, batches, max_steps=3)).finish()
    checkpoints.close()


def restored_small(folder, _=None):
    state = make_state(seed=99)
    return digest_of(state) if lk.Checkpointer(folder / "run").restore(state) else None


def operations_of(source, folder, order):
    """What two ranks do to the file system, in one of the orders that it may have."""
    disk, others = Recorder(), Recorder()
    store, other = Store(folder, disk), Store(folder, others)
    disk.make_folder(folder)
    disk.sync_folder(folder.parent)
    operations = []
    for number, checkpoint in enumerate(contents(source).intact, 1):
        files = {name: [memoryview((checkpoint.path / name).read_bytes())]
                 for name in checkpoint.manifest.files}  # fmt: skip
        theirs = {"part-00001.safetensors": files.pop("part-00001.safetensors")}
        place = store.begin(checkpoint.step)
        begun, disk.operations = disk.operations, []
        written = {**store.write(place, files), **other.write(place, theirs)}
        operations += [*begun, *order(disk.operations, others.operations)]
        disk.operations, others.operations = [], []
        manifest = checkpoint.manifest
        assert written == manifest.files
        store.finish(place, manifest)
        operations += [*disk.operations, ("acknowledged", number)]
        disk.operations = []
    return operations


def in_turns(a, b):
    return [op for pair in itertools.zip_longest(a, b) for op in pair if op]


ORDERS = {
    "the first rank first": lambda a, b: [*a, *b],
    "the other rank first": lambda a, b: [*b, *a],
    "in turns": in_turns,
}


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    POOL.run(2, trained_small, str(folder))
    return folder


@pytest.mark.parametrize(
    ("stop", "order"),
    [*((stop, "in turns") for stop in STOPS), *(("kill", order) for order in ORDERS)][:6],
)
def test_no_stop_loses_or_mixes_what_ranks_saved_together(three_saves, tmp_path, stop, order):
    """From every state that two writers can leave, the last acknowledged save is restored."""
    digests = []
    for checkpoint in contents(three_saves).intact:
        state = make_state(seed=99)
        restore_one(state, checkpoint)
        digests.append(digest_of(state))
    assert len({*digests}) == 3
    operations = operations_of(three_saves, tmp_path / "run", ORDERS[order])
    counts = {}
    for folder, acknowledged, _ in states_after(operations, tmp_path, stop):
        outcome = outcome_of(restored_small, folder, acknowledged, digests)
        counts[outcome] = counts.get(outcome, 0) + 1
    assert counts.keys() == {"fine"}
    assert counts["fine"] > 100


def exported(folder, strategy):
    step, state = stepped(strategy), fresh()
    step(state, data()[0])
    with lk.ema_weights(state):
        path = lk.export(state, f"{folder}/model.safetensors")
    return str(path), whole(state.features["ema"].weights)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_export_puts_the_weights_of_all_ranks_together(tmp_path, strategy):
    """One file, of the averages as it is asked within them, that any model loads."""
    for path, averages in POOL.run(2, exported, str(tmp_path), strategy):
        model = fresh(seed=4).model
        lk.load_weights(model, path)
        assert all(torch.equal(model.state_dict()[name], averages[name]) for name in averages)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def loaded_in_parts(path, strategy):
    """Into a model that is sharded by then; what its forward makes of them, and what it refuses."""
    step, state = stepped(strategy), fresh(seed=6)
    step(state, data()[0])
    report = lk.load_weights(state.model, path)
    with lk.inference(state) as model:
        out = model(data()[0][0])
    torch.save({"first.weight": torch.ones(1)}, f"{path}.pt")
    with pytest.raises(lk.CheckpointError, match="no safetensors file"):
        lk.load_weights(state.model, f"{path}.pt")
    return str(report), whole(state.model.state_dict()), out


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero1", "ddp"])
def test_weights_are_loaded_into_a_model_whatever_it_is_sharded_by(tmp_path, strategy):
    """Each rank takes its part of the file, and the next forward sees them."""
    model = fresh(seed=5).model
    path = lk.export(lk.TrainState(model), tmp_path / "model.safetensors")
    for report, weights, out in POOL.run(2, loaded_in_parts, str(path), strategy):
        assert report == f"{len(weights)} loaded"
        assert_bitwise_equal(weights, model.state_dict())
        assert torch.equal(out, model.eval()(data()[0][0]))


def saved_at_once(folder):
    step, state = stepped("fsdp"), fresh()
    with lk.Checkpointer(folder, async_save=False) as checkpoints:
        step(state, data()[0])
        assert checkpoints.save(state)
        return [checkpoint.step for checkpoint in contents(Path(folder)).intact]


def test_a_save_that_is_not_asynchronous_is_on_disk_when_it_returns(tmp_path):
    """For every rank, not only for the one that makes a checkpoint of the parts."""
    assert POOL.run(2, saved_at_once, str(tmp_path)) == [[1], [1]]
