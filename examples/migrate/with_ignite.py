"""The training with Ignite's engines."""

from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.metrics import Accuracy
from task import CLIP, EPOCHS, digits, network, optimizer_of
from torch import nn
from torch.nn import functional as F


# begin
def train() -> tuple[nn.Module, list[float]]:
    """The trained model, and the accuracy after each epoch."""
    model, (train_loader, test_loader) = network(), digits()
    optimizer, scheduler = optimizer_of(model)
    accuracies = []

    def update(engine, batch):  # noqa: ARG001
        model.train()
        inputs, labels = batch
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    trainer = Engine(update)
    evaluator = create_supervised_evaluator(model, metrics={"accuracy": Accuracy()})

    @trainer.on(Events.ITERATION_COMPLETED)
    def step_scheduler(engine):  # noqa: ARG001
        scheduler.step()

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate(engine):  # noqa: ARG001
        evaluator.run(test_loader)
        accuracies.append(evaluator.state.metrics["accuracy"])

    trainer.run(train_loader, max_epochs=EPOCHS)
    return model, accuracies


# end
if __name__ == "__main__":
    print(train()[1])
