"""One script, on one process or many: digits with DDP, FSDP2, or whatever `--strategy` says.

    python examples/distributed.py
    torchrun --nproc-per-node=2 examples/distributed.py
    torchrun --nproc-per-node=2 examples/distributed.py --strategy fsdp --folder runs/digits

Stop it at any time and run it again with the same folder, on as many processes as you like: it
goes on where it was. Scores are equal on all ranks, and equal those of one process.
"""

import argparse

import loopkit as lk
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


def loaders(batch_size):
    """Training and test data; the batch size is that of each rank."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    parts = random_split(dataset, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    return DataLoader(parts[0], batch_size, shuffle=True), DataLoader(parts[1], 64)


def net():
    """A small convolutional net."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def eval_step(state, batch):
    """Loss and predictions."""
    images, labels = batch
    logits = state.model(images)
    return {"loss": F.cross_entropy(logits, labels), "preds": logits, "target": labels}


def train(strategy="auto", folder=None, epochs=8, batch_size=32):
    """Train, and return the scores on the test digits."""
    lk.seed_everything(0)

    @lk.with_ema(0.98)
    @lk.with_clip(1.0)
    @lk.distributed(strategy)
    def train_step(state, batch):
        images, labels = batch
        return F.cross_entropy(state.model(images), labels)

    model = net().to(lk.device())
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    train_loader, test_loader = loaders(batch_size)
    checkpoints = lk.Checkpointer(folder) if folder else None
    if checkpoints:
        checkpoints.restore(state)

    for state in lk.run(train_step, state, train_loader, max_epochs=epochs):
        if state.epoch_end:
            loss = lk.reduce(state.metrics)["loss"]  # over all ranks; each has to call it
            if state.ranks.is_first:
                print(f"epoch {state.epoch}: {state.step} updates, loss {loss:.4f}")
            if checkpoints:
                checkpoints.save(state)
    if checkpoints:
        checkpoints.close()

    with lk.ema_weights(state):
        scores = lk.evaluate(eval_step, state, test_loader, {"accuracy": MulticlassAccuracy(10)})
    if state.ranks.is_first:
        print(f"test: loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.4f}")
    return scores


def main():
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="auto", help="ddp, fsdp, hsdp, zero1, zero2, zero3")
    parser.add_argument("--folder", help="where checkpoints go")
    parser.add_argument("--epochs", type=int, default=8)
    flags = parser.parse_args()
    train(flags.strategy, flags.folder, flags.epochs)


if __name__ == "__main__":
    main()
