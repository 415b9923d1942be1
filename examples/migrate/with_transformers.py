"""The training with Hugging Face's Trainer."""

import tempfile

import numpy as np
import torch
from task import BATCH_SIZE, CLIP, EPOCHS, digits, network, optimizer_of
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments


# begin
class Wrapped(nn.Module):
    """A model in the form that the Trainer asks for: inputs by name, a mapping with the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, labels):
        """The loss and the logits."""
        logits = self.model(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Loaders(Trainer):
    """A Trainer that takes its batches from loaders that are there already."""

    def get_train_dataloader(self):
        """Those to train on."""
        return self.train_dataset

    def get_eval_dataloader(self, eval_dataset=None):  # noqa: ARG002
        """Those to evaluate on."""
        return self.eval_dataset


def named(loader):
    """The same loader with batches as mappings."""
    collate = torch.utils.data.default_collate
    loader.collate_fn = lambda rows: dict(zip(("inputs", "labels"), collate(rows), strict=True))
    return loader


def accuracy(prediction):
    """The metric."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def train() -> tuple[nn.Module, list[float]]:
    """The trained model, and the accuracy after each epoch."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        seed=1,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        max_grad_norm=CLIP,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    train_loader, test_loader = digits()
    model = Wrapped(network())
    trainer = Loaders(
        model,
        arguments,
        train_dataset=named(train_loader),
        eval_dataset=named(test_loader),
        compute_metrics=accuracy,
        optimizers=optimizer_of(model),
    )
    trainer.train()
    rows = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    return model.model, rows


# end
if __name__ == "__main__":
    print(train()[1])
