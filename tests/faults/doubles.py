"""Starts two runs in one folder at the same instant, again and again.

    python tests/faults/doubles.py FOLDER PAIRS

Of each pair one saves and one is refused; what is in the folder is all of one of them.
Prints the counts as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path

import loopkit as lk

from trainings import make_state


def live(folder, who, start, result):
    """Save three times; tell how it went; stay until killed."""
    state = make_state(who=who)
    checkpoints = lk.Checkpointer(folder, keep_last=None)
    os.read(start, 1)
    try:
        for state.step in range(3):
            checkpoints.save(state)
            checkpoints.wait()
        text = "saved"
    except lk.CheckpointError as error:
        text = "refused" if "saving in" in error.found else str(error)
    os.write(result, text.encode())
    signal.pause()


def pair(folder):
    """Two at once; what each of them says."""
    start, go = os.pipe()
    children, results = [], []
    for who in (1, 2):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                live(folder, who, start, writer)
            finally:
                os._exit(1)
        os.close(writer)
        children.append(child)
        results.append(reader)
    os.write(go, b"..")
    said = [os.read(reader, 1000).decode() for reader in results]
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for file in (start, go, *results):
        os.close(file)
    return said


def main(root, pairs):
    """Start them, and look at what they have saved."""
    make_state()
    counts = {"pairs": 0, "one of two": 0, "of one writer": 0, "said": []}
    for number in range(pairs):
        folder = root / str(number)
        said = pair(folder)
        counts["pairs"] += 1
        counts["one of two"] += sorted(said) == ["refused", "saved"]
        counts["said"] += [said] if sorted(said) != ["refused", "saved"] else []
        state, writers = make_state(who=0), set()
        for checkpoint in lk.Checkpointer(folder).list():
            lk.Checkpointer(folder).restore(state, checkpoint)
            writers.add(state.extras["who"])
        counts["of one writer"] += writers == {1 + said.index("saved")} if "saved" in said else 0
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
