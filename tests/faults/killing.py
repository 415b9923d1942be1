"""Trains in child processes, kills them at random instants, and counts what is lost.

    python tests/faults/killing.py FOLDER KILLS SEED [RANKS]

Each life restores, trains on and saves after every update, until it is killed or has come
to the end; then what it saved last is compared with that of a run that nobody killed. Several
ranks train in shards, and are killed one soon after another. Prints the counts as JSON.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import loopkit as lk
import torch
from loopkit.parallel.launch import free_port

from trainings import STEPS, digest_of, make_batches, make_state

UPDATES = 40


def score(step):
    """Up and down, so that the best is seldom the last."""
    return random.Random(step).random()


def live(folder, log, rng, step):
    """One life: restore, train on, save, and note each save that was acknowledged."""
    state, acknowledged = make_state(), [int(line) for line in log.read_text().split()]
    checkpoints = lk.Checkpointer(folder, monitor="loss", async_save=rng.random() < 0.5)
    found = checkpoints.restore(state)
    if acknowledged:
        assert found, "lost: starts from nothing"
        assert state.step >= acknowledged[-1], "lost: older"
        best = checkpoints.best.scores["loss"]
        assert best <= min(map(score, acknowledged)), "lost: the best"
    with log.open("a") as file:
        for state in lk.run(step, state, make_batches(), max_steps=UPDATES):
            checkpoints.save(state, {"loss": score(state.step)})
            if rng.random() < 0.5:
                checkpoints.wait()
                if state.ranks.is_first:
                    print(state.step, file=file, flush=True)
    step.set_up(state)  # also where the end had been saved
    checkpoints.save(state, {"loss": score(state.step)})
    checkpoints.close()


def end_of(folder):
    """Digest of the newest checkpoint, as one process restores it."""
    state = make_state(seed=9)
    lk.Checkpointer(folder).restore(state)
    return f"{state.step} {digest_of(state)}"


def in_child(function):
    """Run a function in a forked process; its result is a line of text in a pipe."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(function())
        except BaseException as error:  # noqa: BLE001  # told to the parent
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    return child, reader


def lives(function, ranks):
    """A process for each rank, that finds what a launcher would tell it."""
    if ranks == 1:
        return [in_child(function)]
    port = free_port()

    def as_rank(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        function()

    return [in_child(functools.partial(as_rank, rank)) for rank in range(ranks)]


def killed(function, ranks, rng, longest_s):
    """Run a function in children and kill them after a time; what each said that had ended."""
    children = lives(function, ranks)
    time.sleep(rng.uniform(0.0, longest_s))
    for child, _ in rng.sample(children, ranks):
        os.kill(child, signal.SIGKILL)
        time.sleep(rng.uniform(0.0, 0.05) if ranks > 1 and rng.random() < 0.5 else 0.0)
    return [said_by(*child) for child in children]


def said_by(child, reader):
    """What a child said when it had ended; nothing if it was killed before."""
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


def is_wrong(text, ranks):
    """Not of a rank whose neighbour was killed first: what it says of that is as it should be."""
    return "lost" in text or (ranks == 1 and text not in {"", "None"})


def main(folder, kills, seed, ranks=1):
    """Train to the end again and again, until there were enough kills."""
    torch.set_num_threads(1)
    make_state()  # the first optimizer of a process is slow: half a second of imports
    step = STEPS["ema"] if ranks == 1 else lk.distributed("fsdp")(STEPS["ema"])
    rng = random.Random(seed)
    counts = {"kills": 0, "runs": 0, "equal": 0, "wrong": [], "litter": 0, "after a kill": 0}
    whole = functools.partial(live, folder / "whole", _log(folder / "whole.txt"), rng, step)
    said = [said_by(*child) for child in lives(whole, ranks)]
    assert said == ["None"] * ranks, said
    expected = end_of(folder / "whole")
    while counts["kills"] < kills:
        run, log, said = folder / "run", _log(folder / "log.txt"), []
        longest_s = 0.25 * ranks
        while said != ["None"] * ranks:
            life = functools.partial(live, run, log, random.Random(rng.random()), step)
            said = killed(life, ranks, rng, longest_s)
            counts["wrong"] += [text for text in said if is_wrong(text, ranks)]
            longest_s *= 1.1  # also a busy machine comes to an end
            ended = said == ["None"] * ranks
            counts["kills"] += not ended
            left = 0 if ended else len([*run.glob(".tmp-*")])
            counts["after a kill"] = max(counts["after a kill"], left)
        counts["runs"] += 1
        counts["equal"] += end_of(run) == expected
        counts["litter"] += sum(not path.name.startswith("step-") for path in run.iterdir())
        shutil.rmtree(run)
    sys.stdout.write(json.dumps(counts))


def _log(path):
    path.write_text("")
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
