"""The training as a loop in plain PyTorch."""

import torch
from task import CLIP, EPOCHS, digits, network, optimizer_of
from torch import nn
from torch.nn import functional as F


# begin
def train() -> tuple[nn.Module, list[float]]:
    """The trained model, and the accuracy after each epoch."""
    model, (train_loader, test_loader) = network(), digits()
    optimizer, scheduler = optimizer_of(model)
    accuracies = []
    for _ in range(EPOCHS):
        model.train()
        for inputs, labels in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
        model.eval()
        right = total = 0
        with torch.no_grad():
            for inputs, labels in test_loader:
                right += (model(inputs).argmax(dim=1) == labels).sum().item()
                total += len(labels)
        accuracies.append(right / total)
    return model, accuracies


# end
if __name__ == "__main__":
    print(train()[1])
