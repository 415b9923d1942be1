"""Cross-validation in plain loops: how much weight decay, judged on samples not trained on.

    python examples/kfold.py

Of 178 wines (13 chemical measurements, three growers) 60 are put aside. The other 118 choose the
weight decay, in five folds, three times over: XX networks, each trained in XX s. Then the
networks of the winner vote on the 60: XX of them are right.
"""

import argparse
from pathlib import Path

import loopkit as lk
import matplotlib as mpl
import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import RepeatedStratifiedKFold, train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

DECAYS, FOLDS, REPEATS, EPOCHS = (0.0, 0.1, 1.0, 10.0), 5, 3, 20


def step(state: lk.TrainState, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The loss, and what the metrics need."""
    inputs, labels = batch
    logits = state.model((inputs - state.extras["mean"]) / state.extras["deviation"])
    return {"loss": F.cross_entropy(logits, labels), "preds": logits, "target": labels}


def fit(decay: float, training: TensorDataset, seed: int) -> lk.TrainState:
    """A network trained on a fold; means and deviations are of this fold alone."""
    generator = lk.seed_everything(seed)
    model = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)
    inputs = training.tensors[0]
    state = lk.TrainState(model, optimizer, mean=inputs.mean(0), deviation=inputs.std(0))
    loader = DataLoader(training, 16, shuffle=True, generator=generator)
    for state in lk.run(step, state, loader, max_epochs=EPOCHS):
        pass
    return state

if __name__ == "__main__":
    inputs, labels = load_wine(return_X_y=True)
    inputs, labels = torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)
    chosen, aside, a, b = train_test_split(inputs, labels, test_size=60, stratify=labels, random_state=0)
    import collections, statistics
    acc = collections.defaultdict(list)
    splits = list(RepeatedStratifiedKFold(n_splits=FOLDS, n_repeats=REPEATS, random_state=0).split(chosen, a))
    for decay in DECAYS:
        for n,(tr, va) in enumerate(splits):
            state = fit(decay, TensorDataset(chosen[tr], a[tr]), n)
            s = lk.evaluate(step, state, DataLoader(TensorDataset(chosen[va], a[va]), 100), {"accuracy": MulticlassAccuracy(3, average="micro")})
            acc[decay].append((s["accuracy"], s["loss"]))
        print(decay, [statistics.mean(x) for x in zip(*acc[decay])])
