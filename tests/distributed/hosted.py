"""A training over hosts, started by torchrun on each; saves into a folder that all share."""

import os
import sys
import time

import loopkit as lk
import torch

folder, updates, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])


@lk.distributed(timeout_s=timeout_s)
def step(state, batch):
    return state.model(batch).square().mean()


torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.01))
step.set_up(state)
checkpoints = lk.Checkpointer(folder, every=5)
if checkpoints.restore(state):
    print(f"restored step {state.step}", flush=True)
data = [torch.randn(2, 4) for _ in range(64)]
try:
    for state in checkpoints.wrap(lk.run(step, state, data, max_steps=updates)):
        print(f"rank {os.environ['RANK']} at step {state.step}", flush=True)
        time.sleep(0.05)
    print(f"ended with {model.weight.sum().item():.9f} at step {state.step}", flush=True)
except lk.RankError as error:
    print(f"rank {os.environ['RANK']} says: {error}", flush=True)
    raise
