"""The training with Lightning's Trainer."""

import lightning
from task import CLIP, EPOCHS, digits, network, optimizer_of
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


# begin
class Digits(lightning.LightningModule):
    """The model, its loss, its metric and its optimizer."""

    def __init__(self):
        super().__init__()
        self.model = network()
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.accuracies: list[float] = []

    def training_step(self, batch, batch_idx):  # noqa: ARG002
        """The loss of a batch."""
        inputs, labels = batch
        return F.cross_entropy(self.model(inputs), labels)

    def validation_step(self, batch, batch_idx):  # noqa: ARG002
        """Gather the metric."""
        inputs, labels = batch
        self.accuracy.update(self.model(inputs), labels)

    def on_validation_epoch_end(self):
        """Compute the metric and begin anew."""
        self.accuracies.append(self.accuracy.compute().item())
        self.log("accuracy", self.accuracies[-1])
        self.accuracy.reset()

    def configure_optimizers(self):
        """AdamW, and a schedule with a step for each update."""
        optimizer, scheduler = optimizer_of(self.model)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def train() -> tuple[nn.Module, list[float]]:
    """The trained model, and the accuracy after each epoch."""
    module, (train_loader, test_loader) = Digits(), digits()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=CLIP,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_loader, test_loader)
    return module.model, module.accuracies


# end
if __name__ == "__main__":
    print(train()[1])
