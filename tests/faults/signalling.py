"""Trains in child processes, signals them at random instants, and counts what is lost.

    python tests/faults/signalling.py FOLDER SIGNALS SEED

Each life restores and trains on, saves and evaluates now and then, until it is asked to stop
or has come to the end; its exit code, the state that it had then and the one that is restored
must fit each other. Ends are compared with that of a run that nobody stopped. Prints the
counts as JSON.
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
from torch.nn import functional as F

from trainings import STEPS, digest_of, make_batches, make_state

UPDATES = 40
CODES = {128 + signum for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}


def eval_step(state, batch):
    """A loss; and some random numbers, which the training must not notice."""
    torch.rand(3)
    return F.cross_entropy(state.model(batch[0]), batch[1])


def announced(updates, begun):
    """The updates; a word to the parent when they begin, with the handlers in place."""
    os.write(begun, b".")
    yield from updates


def live(folder, report, rng, begun):
    """One life: restore, train on; what its state was at the end goes into a file."""
    state = make_state()
    checkpoints = lk.Checkpointer(folder, async_save=rng.random() < 0.5)
    report.write_text("")
    checkpoints.restore(state)
    if state.step == UPDATES:  # the life before was stopped at its very end
        report.write_text(f"{state.step} {digest_of(state)}")
    updates = lk.run(STEPS["ema"], state, make_batches(), max_steps=UPDATES)
    try:
        for state in lk.preemptible(announced(updates, begun), checkpoints):
            if rng.random() < 0.3:
                checkpoints.save(state)
            if rng.random() < 0.3:
                lk.evaluate(eval_step, state, make_batches())
            if state.step == UPDATES:  # from here on a signal may find the loop at its end
                report.write_text(f"{state.step} {digest_of(state)}")
    finally:  # written once: the next signal may come within the writing
        if not report.read_text():
            report.write_text(f"{state.step} {digest_of(state)}")
    checkpoints.ensure(state)
    checkpoints.close()


def child_of(function):
    """Run a function in a forked process, which ends with its exit code."""
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(begun=begun)
            code = 0
        except SystemExit as error:
            code = error.code
        finally:
            os._exit(code)
    os.close(begun)
    os.read(ready, 1)
    os.close(ready)
    return child


def restored_from(folder):
    """Step and digest of what the next life starts from."""
    state = make_state(seed=9)
    lk.Checkpointer(folder).restore(state)
    return f"{state.step} {digest_of(state)}"


def main(folder, signals, seed):
    """Train to the end again and again, until there were enough signals."""
    torch.set_num_threads(1)
    make_state()
    rng = random.Random(seed)
    counts = {"signals": 0, "runs": 0, "equal": 0, "lost": [], "codes": [], "slowest_s": 0.0}
    whole = folder / "whole.txt"
    os.waitpid(child_of(functools.partial(live, folder / "whole", whole, rng)), 0)
    while counts["signals"] < signals:
        run, report = folder / "run", folder / "report.txt"
        while True:
            life = functools.partial(live, run, report, random.Random(rng.random()))
            child = child_of(life)
            time.sleep(rng.uniform(0.0, 0.2))
            sent = time.monotonic()
            os.kill(child, rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ended = report.read_text()
            if code not in CODES and ended.startswith(f"{UPDATES} "):
                break  # it came to the end, and the signal after the loop, if at all
            counts["signals"] += 1
            counts["slowest_s"] = max(counts["slowest_s"], time.monotonic() - sent)
            counts["codes"] += [code] if code not in CODES else []
            counts["lost"] += [ended] if restored_from(run) != ended else []
        counts["runs"] += 1
        counts["equal"] += report.read_text() == whole.read_text()
        shutil.rmtree(run)
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
