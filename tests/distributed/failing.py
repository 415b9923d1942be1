"""A training on two ranks, of which rank 1 fails; started by torchrun."""

import os
import signal
import sys
import time

import loopkit as lk
import torch
from torch.utils.data import DataLoader

kind, timeout_s = sys.argv[1], float(sys.argv[2])
rank = int(os.environ["RANK"])


def fail():
    print(f"fault at {time.time():.3f}", flush=True)
    if kind == "raises":
        message = "the label 7 is not there"
        raise ValueError(message)
    if kind == "exits":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGSTOP if kind == "stops" else signal.SIGKILL)


@lk.distributed(timeout_s=timeout_s, stream="sharded" if kind == "runs dry" else None)
def step(state, batch):
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if rank == 1 and state.step == 5 and kind != "runs dry" and first_life:
        fail()
    return state.model(batch).square().mean()


def main():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = [torch.randn(2, 4) for _ in range(24)]
    held_out = DataLoader(torch.randn(5, 4), 1)
    if kind == "runs dry":
        data = (batch for batch in data[: 6 - rank])
    if folder := os.environ.get("FAILING_FOLDER"):
        checkpoints = lk.Checkpointer(folder, every=2, async_save=False)
        if checkpoints.restore(state):
            print(f"restored step {state.step}", flush=True)
        step.set_up(state)
    run = lk.run(step, state, data, max_epochs=1)
    for _ in checkpoints.wrap(run) if folder else run:
        time.sleep(0.02)
        if kind == "runs dry":
            lk.evaluate(lambda state, batch: state.model(batch).mean(), state, held_out)
    print(f"made {state.step} updates", flush=True)


try:
    main()
except BaseException:
    print(f"rank {rank} ended at {time.time():.3f}", flush=True)
    raise
