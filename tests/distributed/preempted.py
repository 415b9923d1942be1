"""A training on two ranks that is asked to stop by a signal to one of them."""

import sys
import time

import loopkit as lk
import torch


@lk.distributed()
def step(state, batch):
    return state.model(batch).square().mean()


torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
checkpoints = lk.Checkpointer(sys.argv[1])
try:
    run = lk.run(step, state, [torch.randn(2, 4) for _ in range(2000)], max_epochs=9)
    for state in lk.preemptible(run, checkpoints):
        print(f"step {state.step}", flush=True)
        time.sleep(0.02)
finally:
    print(f"stopped after {state.step}", flush=True)
    checkpoints.close()
