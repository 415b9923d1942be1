"""Trains in child processes, kills them at random instants, and counts what is lost.

    python tests/faults/killing.py FOLDER KILLS SEED

Each life restores, trains on and saves after every update, until it is killed or has come
to the end; then its last state is compared with that of a run that nobody killed. Prints
the counts as JSON.
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

from trainings import STEPS, digest_of, make_batches, make_state

UPDATES = 40


def score(step):
    """Up and down, so that the best is seldom the last."""
    return random.Random(step).random()


def live(folder, log, rng):
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
        for state in lk.run(STEPS["ema"], state, make_batches(), max_steps=UPDATES):
            checkpoints.save(state, {"loss": score(state.step)})
            if rng.random() < 0.5:
                checkpoints.wait()
                print(state.step, file=file, flush=True)
    checkpoints.save(state, {"loss": score(state.step)})  # also where the end had been saved
    checkpoints.close()
    return digest_of(state)


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


def killed(function, seconds):
    """Run a function in a child and kill it after a time; None, or what it gave before."""
    child, reader = in_child(function)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read() or None


def main(folder, kills, seed):
    """Train to the end again and again, until there were enough kills."""
    torch.set_num_threads(1)
    make_state()  # the first optimizer of a process is slow: half a second of imports
    rng = random.Random(seed)
    counts = {"kills": 0, "runs": 0, "equal": 0, "wrong": [], "litter": 0, "after a kill": 0}
    _, reader = in_child(lambda: live(folder / "whole", _log(folder / "whole.txt"), rng))
    with os.fdopen(reader) as file:
        whole = file.read()
    while counts["kills"] < kills:
        run, log, result = folder / "run", _log(folder / "log.txt"), None
        longest_s = 0.25
        while result is None:
            life = functools.partial(live, run, log, random.Random(rng.random()))
            result = killed(life, rng.uniform(0.0, longest_s))
            longest_s *= 1.1  # also a busy machine comes to an end
            counts["kills"] += result is None
            left = len([*run.glob(".tmp-*")]) if result is None else 0
            counts["after a kill"] = max(counts["after a kill"], left)
        counts["runs"] += 1
        counts["equal"] += result == whole
        counts["wrong"] += [result] if result != whole else []
        counts["litter"] += sum(not path.name.startswith("step-") for path in run.iterdir())
        shutil.rmtree(run)
    sys.stdout.write(json.dumps(counts))


def _log(path):
    path.write_text("")
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
