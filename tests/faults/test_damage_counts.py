"""Damage at rest, many times over: each is found, named, and the checkpoint before it restored."""

import os
import random
import re
import warnings

import loopkit as lk
import pytest

from trainings import digest_of, make_state, train

TIMES = int(os.environ.get("LOOPKIT_DAMAGES", "30"))  # 1000 for the requirement R4


def flipped(good, name, rng):
    data = bytearray(good[name])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return {name: bytes(data)}


def truncated(good, name, rng):
    return {name: good[name][: rng.randrange(len(good[name]))]}


def zeroed(good, name, rng):
    data = bytearray(good[name])
    at, length = rng.randrange(len(data)), rng.randrange(1, 600)
    data[at : at + length] = bytes(len(data[at : at + length]))
    return {name: bytes(data)}


def missing(good, name, rng):
    return {name: None}


def swapped(good, name, rng):
    other = rng.choice([n for n in good if n != name])
    return {name: good[other], other: good[name]}


def stale(good, name, rng, older):
    return {name: older[name]}


KINDS = {
    "bit flip": flipped,
    "truncation": truncated,
    "zeroed block": zeroed,
    "missing file": missing,
    "swapped files": swapped,
    "stale file": stale,
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.timeout(120 + TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_loaded_silently(tmp_path, kind):
    """30 times each, or as many as the environment variable LOOPKIT_DAMAGES says."""
    state, digests = make_state(), []
    checkpoints = lk.Checkpointer(tmp_path, async_save=False)
    for _ in range(2):
        train(state, 1, "ema")
        checkpoints.save(state)
        digests.append(digest_of(state))
    old, new = sorted(tmp_path.glob("step-*"))
    good, older, rng, harmless = contents(new), contents(old), random.Random(0), 0
    for _ in range(TIMES):
        name = rng.choice([*good])
        more = (older,) if kind == "stale file" else ()
        damage = KINDS[kind](good, name, rng, *more)
        for path, data in damage.items():
            (new / path).unlink() if data is None else (new / path).write_bytes(data)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert checkpoints.restore(state)
        if contents(new) == good:
            harmless += 1
            assert digest_of(state) == digests[1]
        else:
            assert digest_of(state) == digests[0]
            (message,) = [str(warning.message) for warning in told]
            assert re.search(r"restored .*step=1.*passed over .*step 2: \S+ damaged", message)
            assert any(path in message for path in damage)
        for path in damage:
            (new / path).write_bytes(good[path])
    assert harmless < TIMES / 3
    checkpoints.close()
