"""The training with Accelerate."""

import torch
from accelerate import Accelerator
from task import CLIP, EPOCHS, digits, network, optimizer_of
from torch import nn
from torch.nn import functional as F


# begin
def train() -> tuple[nn.Module, list[float]]:
    """The trained model, and the accuracy after each epoch."""
    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer, scheduler = optimizer_of(model)
    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, *digits()
    )
    accuracies = []
    for _ in range(EPOCHS):
        model.train()
        for inputs, labels in train_loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        right = total = 0
        with torch.no_grad():
            for inputs, labels in test_loader:
                preds, target = accelerator.gather_for_metrics((model(inputs), labels))
                right += (preds.argmax(dim=1) == target).sum().item()
                total += len(target)
        accuracies.append(right / total)
    return accelerator.unwrap_model(model), accuracies


# end
if __name__ == "__main__":
    print(train()[1])
