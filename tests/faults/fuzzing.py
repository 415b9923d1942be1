"""Restores checkpoints whose files were changed at random, with checksums that are right.

    python tests/faults/fuzzing.py FOLDER TRIALS SEED

Whatever a manifest, a tree or a header says, restoring takes it, or refuses it with the error
of its kind, and takes no more memory than twice the file and 100 MB. Prints counts as JSON.
"""

import json
import random
import resource
import sys
import warnings
import zlib
from pathlib import Path

import loopkit as lk
import torch

from trainings import STEPS, digest_of, make_batches, make_state

ATOMS = [
    None, True, False, 0, -1, 1, 2**31, 2**62, 2**64, -(2**63), 10**300, 0.5, 1e308, "", "a", "F64",
    "BF16", "I8", "../../x.json", "\x00", "x" * 5000, [], {}, [[]], [2**40, 2**40], [0, 2**40],
    [-1, 4], {"$tensor": ["model", "0.weight"]}, {"$tensor": ["model"]}, {"$size": [2**62]},
    {"$dtype": "load"}, {"$dtype": "float32"}, {"$device": "cuda:99"}, {"$complex": "1e999j"},
    {"$bytes": "AAAA" * 1000}, {"$dict": [[1]]}, {"$tuple": 3}, {"$set": [[1]]}, {"$counter": 1},
    {"$array": 1}, {"$scalar": {"$tensor": ["model", "0.weight"]}}, {"$float": "nan"},
]  # fmt: skip
TEXTS = [b"", b"0", b"-", b"1e999", b"{}", b"[]", b'"', b"null", b"9" * 5000, b"[" * 5000, b"\xff"]


def places(node, path=()):
    """The way to each node of a tree of JSON."""
    yield path
    items = node.items() if isinstance(node, dict) else ()
    for key, item in enumerate(node) if isinstance(node, list) else items:
        yield from places(item, (*path, key))


def changed_tree(tree, rng):
    """The tree with some node replaced, removed or doubled."""
    tree = json.loads(json.dumps(tree))
    way = rng.choice([*places(tree)])
    if not way:
        return rng.choice(ATOMS)
    node = tree
    for key in way[:-1]:
        node = node[key]
    kind = rng.randrange(4)
    if kind == 0:
        del node[way[-1]]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(["$dict", "$tensor", "model", "__metadata__", "x"])] = node.pop(way[-1])
    else:
        node[way[-1]] = rng.choice(ATOMS)
    return tree


def changed_bytes(data, rng):
    """The bytes with some replaced, removed or put in."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(min(len(data), 3000))
        data[at : at + rng.randrange(3)] = rng.choice(TEXTS)
    return bytes(data)


def changed_header(data, rng):
    """A safetensors file whose header is changed as a tree; its length fits, or not."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(changed_tree(json.loads(data[8 : 8 + length]), rng)).encode()
    text += b" " * (-len(text) % 8)
    size = rng.choice([len(text)] * 9 + [0, 2**40, 2**64 - 1, len(data)])
    return size.to_bytes(8, "little") + text + data[8 + length :]


def changed_file(name, data, rng):
    """One change of a file."""
    if rng.random() < 0.3:
        return changed_bytes(data, rng)
    if name.endswith(".json"):
        return json.dumps(changed_tree(json.loads(data), rng)).encode()
    return changed_header(data, rng)


def signed(body):
    """A manifest with a checksum that is right."""
    text = json.dumps(body, indent=1) + "\n"
    if not isinstance(body, dict):
        return text.encode()
    body = {**body, "crc32": f"{zlib.crc32(text.encode()):08x}"}
    return (json.dumps(body, indent=1) + "\n").encode()


def plant(folder, good, rng):
    """Change one of the files, and make the manifest say that it is right."""
    name = rng.choice([*good])
    body = json.loads(good["manifest.json"])
    body.pop("crc32")
    if name == "manifest.json":
        data = changed_file(name, signed(body), rng) if rng.random() < 0.2 else signed(
            changed_tree(body, rng)
        )  # fmt: skip
        (folder / name).write_bytes(data)
        return name
    data = changed_file(name, good[name], rng)
    body["files"][name] = {"size": len(data), "crc32": f"{zlib.crc32(data):08x}", "sha256": None}
    (folder / name).write_bytes(data)
    (folder / "manifest.json").write_bytes(signed(body))
    return name


def peak():
    """The most memory that this process has had; bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(root, trials, seed):
    """Plant and restore, again and again."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng, state = random.Random(seed), make_state(note=[1, {"a": (2, 3)}])
    for _ in lk.run(STEPS["all"], state, make_batches(), max_steps=2):
        pass
    with lk.Checkpointer(root) as checkpoints:
        checkpoints.save(state)
    folder = checkpoints.latest.path
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    checkpoints.restore(state)
    before, digest = peak(), digest_of(state)
    counts = {"refused": 0, "taken": 0, "half taken": [], "crashed": []}
    for trial in range(trials):
        name = plant(folder, good, rng)
        try:
            checkpoints.restore(state, folder)
            counts["taken"] += 1
        except lk.LoopkitError:
            counts["refused"] += 1
            if digest_of(state) != digest:
                counts["half taken"].append((trial, name))
        except BaseException as error:  # noqa: BLE001  # that is what must not happen
            counts["crashed"].append((trial, name, f"{type(error).__name__}: {error}"[:300]))
        for file in {name, "manifest.json"}:
            (folder / file).write_bytes(good[file])
        state = make_state(note=[1, {"a": (2, 3)}]) if trial % 50 == 0 else state
        checkpoints.restore(state, folder)
        assert digest_of(state) == digest, (trial, name)
    counts["memory"] = peak() - before
    counts["file"] = max(map(len, good.values()))
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
