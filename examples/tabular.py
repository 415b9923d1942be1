"""A table of numbers: class weights, early stopping, learning curves and a confusion matrix.

    python examples/tabular.py

569 tumours, 30 measurements of each (scikit-learn's breast cancer data). As in a screening, few of
those trained on are malignant: 20 of 198. Weighted by their rarity they count as much as the
others. Training stops when the validation loss has not fallen for 15 epochs, and the best weights
are taken. Among 143 put aside are 53 malignant ones: 47 are found, with 4 false alarms; without
class weights 44, with none. A second of CPU, after the imports.
"""

from pathlib import Path

import loopkit as lk
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassConfusionMatrix

CLASSES, RARE, PATIENCE, MAX_EPOCHS = ("malignant", "benign"), (20, 10), 15, 200


def tumours() -> list[TensorDataset]:
    """To train on, to stop by, and put aside; scaled by the first."""
    rows, labels = load_breast_cancer(return_X_y=True)
    split = {"random_state": 0, "test_size": 143}
    rows, aside, labels, wanted = train_test_split(rows, labels, stratify=labels, **split)
    rows, judged, labels, right = train_test_split(rows, labels, stratify=labels, **split)
    training, validation = few_malignant(labels, RARE[0]), few_malignant(right, RARE[1])
    parts = [
        (rows[training], labels[training]),
        (judged[validation], right[validation]),
        (aside, wanted),
    ]
    mean, deviation = parts[0][0].mean(0), parts[0][0].std(0)
    return [
        TensorDataset(torch.tensor((x - mean) / deviation).float(), torch.tensor(y))
        for x, y in parts
    ]


def few_malignant(labels: np.ndarray, count: int) -> np.ndarray:
    """The rows of all benign ones, and of some malignant ones."""
    return np.concatenate([np.flatnonzero(labels == 0)[:count], np.flatnonzero(labels == 1)])


def step(state: lk.TrainState, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A mean over samples of unequal weight, so what it is a mean over is the sum of these."""
    inputs, labels = batch
    logits, weights = state.model(inputs), state.extras["class_weights"]
    loss = F.cross_entropy(logits, labels, weight=weights)
    return {"loss": loss, "weight": weights[labels].sum(), "preds": logits, "target": labels}


def train(weighted: bool = True) -> tuple[lk.TrainState, list[dict[str, float]], np.ndarray]:
    """The best state, the losses of each epoch, and what was taken for what at last."""
    generator = lk.seed_everything(0)
    training, validation, aside = tumours()
    counts = training.tensors[1].bincount()
    weights = len(training) / (2 * counts) if weighted else torch.ones(2)
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = lk.TrainState(model, optimizer, class_weights=weights)
    loader = DataLoader(training, 32, shuffle=True, generator=generator)
    judged = {"training": DataLoader(training, 500), "validation": DataLoader(validation, 500)}
    stop = lk.EarlyStopping("validation/loss", patience=PATIENCE)
    history, best = [], state
    for state in lk.run(step, state, loader, max_epochs=MAX_EPOCHS):
        if state.epoch_end:
            history.append(lk.evaluate(step, state, judged))
            if stop(history[-1]):
                break
            if stop.waited == 0:
                best = state.snapshot()
    confusion = MulticlassConfusionMatrix(2)
    lk.evaluate(step, best, DataLoader(aside, 500), {"confusion": confusion})
    return best, history, confusion.compute().numpy()


def main(picture=Path("runs/tabular.png")):
    """Train, and draw the curves and the confusion."""
    best, history, confusion = train()
    (found, missed), (alarms, _) = confusion
    print(f"stopped after {len(history)} epochs, the weights of epoch {best.epoch + 1} taken")
    print(f"malignant: {found} of {found + missed} found, with {alarms} false alarms")

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("training", "validation"):
        left.plot(range(1, len(history) + 1), [h[f"{name}/loss"] for h in history], label=name)
    left.axvline(best.epoch + 1, color="gray", ls="--", lw=0.8, label="weights taken")
    left.set(title="weighted loss", xlabel="epoch", ylabel="cross entropy")
    left.legend()
    shown = ConfusionMatrixDisplay(confusion, display_labels=CLASSES)
    shown.plot(ax=right, cmap="Blues", colorbar=False)
    right.set(title="tumours put aside")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    return confusion


if __name__ == "__main__":
    main()
