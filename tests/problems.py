"""Small trainings that the tests share."""

import functools
import itertools

import loopkit as lk
import torch
from torch import nn
from torch.nn import functional as F


def classifier(state, batch):
    inputs, labels = batch
    return F.cross_entropy(state.model(inputs), labels)


def weighted_classifier(state, batch):
    """A mean over labels that are not -100, with their number."""
    inputs, labels = batch
    loss = F.cross_entropy(state.model(inputs), labels, ignore_index=-100)
    return {"loss": loss, "weight": (labels != -100).sum().item()}


def mlp(width=6, dropout=0.0):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3))


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


MODELS = {"mlp": mlp, "dropout": functools.partial(mlp, dropout=0.3), "conv": conv, "tied": Tied}
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05),
    "momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "fused sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "fused adamw": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "foreach adamw": functools.partial(torch.optim.AdamW, lr=0.01, foreach=True),
}


def make_state(model="mlp", optimizer="adamw", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    made = MODELS[model]().to(dtype)
    return lk.TrainState(made, OPTIMIZERS[optimizer](made.parameters()))


def make_batches(count=7, size=5, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def halving(update):
    return 0.02 * 0.8**update


def train(step, state, batches, **limits):
    """All updates of one epoch, and the loss of each."""
    torch.manual_seed(2)
    return [float(s.loss) for s in lk.run(step, state, batches, **(limits or {"max_epochs": 1}))]


def cut(batches, n):
    """Windows of n as lists."""
    batches = iter(batches)
    return iter(lambda: list(itertools.islice(batches, n)), [])
