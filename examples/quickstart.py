"""Train a small network on real handwritten digits: under a minute on two cores.

    python examples/quickstart.py

The 1,797 digits (8 x 8 pixels) ship inside scikit-learn; nothing is downloaded.
"""

import math
from pathlib import Path

import loopkit as lk
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

EPOCHS, BATCH_SIZE, PEAK_LR = 20, 64, 3e-3
PICTURE = Path("runs/quickstart/curves.png")


def digits(generator: torch.Generator) -> tuple[DataLoader, DataLoader]:
    """A loader to train on, and one of 400 digits that training never sees."""
    images, labels = load_digits(return_X_y=True)
    scaled = torch.tensor(images, dtype=torch.float32).div(16).unflatten(1, (1, 8, 8))
    dataset = TensorDataset(scaled, torch.tensor(labels))
    train, test = random_split(dataset, [len(dataset) - 400, 400], generator=generator)
    return (
        DataLoader(train, BATCH_SIZE, shuffle=True, generator=generator),
        DataLoader(test, BATCH_SIZE),
    )


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 10),
    )  # fmt: skip


def cosine(update: int) -> float:
    """The learning rate: a short warm-up, then half a cosine down to zero."""
    warm, total = 50, EPOCHS * math.ceil(1397 / BATCH_SIZE)
    return PEAK_LR * min((update + 1) / warm, (1 + math.cos(math.pi * update / total)) / 2)


@lk.with_ema(0.95)
@lk.with_schedule(lr=cosine)
@lk.with_clip(1.0)
def train_step(state: lk.TrainState, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One update: the loss of a batch."""
    images, labels = batch
    return F.cross_entropy(state.model(images), labels, label_smoothing=0.05)


def eval_step(state: lk.TrainState, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What the test set is measured with."""
    images, labels = batch
    logits = state.model(images)
    return {"loss": F.cross_entropy(logits, labels), "preds": logits, "target": labels}


def draw(losses: list[float], scores: list[dict[str, float]]) -> Path:
    """Both curves as a picture."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(losses, lw=0.6, color="tab:blue")
    left.set(title="training loss", xlabel="update", ylabel="cross entropy (smoothed labels)")
    epochs = range(1, len(scores) + 1)
    right.plot(epochs, [100 * s["accuracy"] for s in scores], marker="o", ms=3, color="tab:green")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(title="test accuracy (averaged weights)", xlabel="epoch", ylabel="%")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    return PICTURE.resolve()


def main() -> float:
    """Train, evaluate after each epoch, and show what came out."""
    generator = lk.seed_everything(0)
    train_loader, test_loader = digits(generator)
    model = network().to(lk.device("auto"))
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), weight_decay=0.01))
    accuracy = {"accuracy": MulticlassAccuracy(10, average="micro")}

    losses, scores = [], []
    for state in lk.progress(lk.run(train_step, state, train_loader, max_epochs=EPOCHS)):
        losses.append(state.loss)
        if state.epoch_end:
            with lk.ema_weights(state):
                scores.append(lk.evaluate(eval_step, state, test_loader, accuracy))

    table = Table("epoch", "test loss", "test accuracy", title="handwritten digits")
    for epoch, score in enumerate(scores, 1):
        if epoch in {1, 2, 5, 10, 15, len(scores)}:
            table.add_row(str(epoch), f"{score['loss']:.4f}", f"{score['accuracy']:.2%}")
    Console().print(table)
    print(f"curves: {draw([loss.item() for loss in losses], scores)}")
    return scores[-1]["accuracy"]


if __name__ == "__main__":
    main()
