"""Nothing reaches for a network that was not asked to."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
    import socket, sys

    class Local(socket.socket):
        def __init__(self, family=-1, *given, **settings):
            # Between processes of this machine, as the workers of a loader talk, it may
            assert family in (-1, socket.AF_UNIX), "a socket was opened"
            super().__init__(socket.AF_UNIX if family == -1 else family, *given, **settings)

    def refused(*given, **settings):
        raise AssertionError("a host was looked up")

    socket.socket = Local
    socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refused
    import loopkit as lk
    import torch
    from torch.utils.data import DataLoader
    from trainings import STEPS, make_batches, make_state

    def loss(state, batch):
        return {"loss": torch.nn.functional.cross_entropy(state.model(batch[0]), batch[1])}

    state, data = make_state(), DataLoader(make_batches(8), batch_size=None, num_workers=2)
    step = lk.distributed()(STEPS["all"])
    with lk.Checkpointer(sys.argv[1], every=2, monitor="loss") as checkpoints:
        with lk.Log(sys.argv[1] + "/log", "csv", "jsonl") as log:
            updates = log.wrap(lk.progress(lk.run(step, state, data, max_epochs=2)))
            for state in lk.preemptible(checkpoints.wrap(updates), checkpoints):
                if state.epoch_end:
                    checkpoints.save(state, lk.evaluate(loss, state, data))
        assert checkpoints.restore(state) and checkpoints.best
        lk.load_best(state)
    path = lk.export(state, sys.argv[1] + "/model.safetensors")
    print(state.step, lk.load_weights(make_state().model, path))
"""


def test_a_run_with_checkpoints_and_logs_opens_no_socket(tmp_path):
    """Training, workers, checkpoints, logs, evaluation and export: a network would raise."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "loaded"
