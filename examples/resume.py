"""A training that can be killed at any moment, and run again: it comes to the same result.

    python examples/resume.py

Press Ctrl-C, send it SIGTERM, or kill -9 it, as often as you like, and run it again. What it
prints at the end, the sum of its weights to the last bit and its accuracy, is what it would
have printed without. `--slow 0.05` gives you time to do so; `--folder` says where it saves;
remove that folder to begin anew.
"""

import argparse
import hashlib
import os
import time

import loopkit as lk
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

EPOCHS = 8


def data() -> tuple[DataLoader, DataLoader]:
    """Handwritten digits: 1,400 to train on, shuffled, and the rest."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:1400], labels[:1400])
    test = TensorDataset(images[1400:], labels[1400:])
    return DataLoader(train, 64, shuffle=True), DataLoader(test, 200)


@lk.with_ema(0.9)
@lk.with_clip(1.0)
def train_step(state, batch):
    """Cross entropy of a network with dropout, so that random numbers matter."""
    images, labels = batch
    noise = 0.1 * torch.randn_like(images)
    return F.cross_entropy(state.model(images + noise), labels)


def eval_step(state, batch):
    """What the scores are computed from."""
    images, labels = batch
    logits = state.model(images)
    return {"loss": F.cross_entropy(logits, labels), "preds": logits, "target": labels}


def digest(state: lk.TrainState) -> str:
    """A few letters that change if any bit of any weight does."""
    tensors = state.model.state_dict().values()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:12]


def main(arguments: list[str] | None = None) -> str:
    """Train to the end, from wherever the last try has come to; returns the digest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs/resume")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds to sleep after an update")
    args = parser.parse_args(arguments)

    lk.seed_everything(0)
    train_loader, test_loader = data()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    checkpoints = lk.Checkpointer(args.folder, monitor="accuracy", mode="max", every="10s")

    if checkpoints.restore(state):
        print(f"process {os.getpid()} goes on at update {state.step}, epoch {state.epoch}")
    else:
        print(f"process {os.getpid()} begins; interrupt it, and run it again")

    updates = lk.run(train_step, state, train_loader, max_epochs=EPOCHS)
    try:
        for state in lk.preemptible(checkpoints.wrap(updates), checkpoints):
            time.sleep(args.slow)
            if state.epoch_end:
                with lk.ema_weights(state):
                    scores = lk.evaluate(
                        eval_step, state, test_loader, {"accuracy": MulticlassAccuracy(10)}
                    )
                checkpoints.save(state, scores)
                print(f"epoch {state.epoch:2}  update {state.step:3}  {scores['accuracy']:.2%}")
    except lk.Preempted as stop:
        print(f"asked to stop at update {state.step}, and saved: exit code {stop.code}")
        raise

    checkpoints.close()
    print(f"done after {state.step} updates: {digest(state)}")
    return digest(state)


if __name__ == "__main__":
    main()
