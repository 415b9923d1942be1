"""The training with loopkit."""

import loopkit as lk
import torch
from task import CLIP, EPOCHS, LR, digits, lr_factor, network
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


# begin
@lk.with_schedule(lr=lambda update: LR * lr_factor(update))
@lk.with_clip(CLIP)
def train_step(state, batch):
    """One update: the loss of a batch."""
    inputs, labels = batch
    return F.cross_entropy(state.model(inputs), labels)


def eval_step(state, batch):
    """What is measured."""
    inputs, labels = batch
    return {"preds": state.model(inputs), "target": labels}


def train() -> tuple[nn.Module, list[float]]:
    """The trained model, and the accuracy after each epoch."""
    model, (train_loader, test_loader) = network(), digits()
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=LR))
    accuracy = {"accuracy": MulticlassAccuracy(10, average="micro")}
    accuracies = []
    for state in lk.run(train_step, state, train_loader, max_epochs=EPOCHS):
        if state.epoch_end:
            scores = lk.evaluate(eval_step, state, test_loader, accuracy)
            accuracies.append(scores["accuracy"])
    return model, accuracies


# end
if __name__ == "__main__":
    print(train()[1])
