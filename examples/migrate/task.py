"""The small training that every file of this folder does: 1,797 handwritten digits, two epochs.

AdamW, gradients clipped at norm 1, a learning rate that rises for ten updates and then falls
to zero with each update, shuffled batches, and the accuracy on 400 digits after each epoch.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCH_SIZE, LR, CLIP, WARMUP = 2, 32, 3e-3, 1.0, 10
UPDATES = EPOCHS * 44


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """A loader of 1,397 digits that shuffles by a generator of its own, and one of 400."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    train, test = (
        TensorDataset(inputs[:-400], targets[:-400]),
        TensorDataset(inputs[-400:], targets[-400:]),
    )
    generator = torch.Generator().manual_seed(0)
    return (
        DataLoader(train, BATCH_SIZE, shuffle=True, generator=generator),
        # Even a loader that does not shuffle draws a number: not from what dropout draws from.
        DataLoader(test, 100, generator=torch.Generator()),
    )


def network() -> nn.Module:
    """A small network with dropout, the same at each call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    torch.manual_seed(1)  # for what dropout draws
    return model


def lr_factor(update: int) -> float:
    """A linear warm-up, then a line down to zero."""
    return min((update + 1) / WARMUP, (UPDATES - update) / (UPDATES - WARMUP))


def optimizer_of(model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW and the schedule, for the libraries that take torch schedulers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    return optimizer, LambdaLR(optimizer, lr_factor)
