"""The best checkpoint, at the end of a run."""

from loopkit.errors import CheckpointError
from loopkit.given import check_state
from loopkit.state import TrainState


def load_best(state: TrainState) -> None:
    """Load the best checkpoint of its run into a state: model, optimizer, clock and all.

    Which folder and which score is what the `Checkpointer` says that last saved or restored it.

    Args:
        state: A state that was saved, or restored.

    Raises:
        CheckpointError: If it was not, or there is no checkpoint with the score.

    Example:
        >>> import tempfile, torch
        >>> from loopkit.checkpoint.checkpointer import Checkpointer
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Checkpointer(folder, monitor="loss") as checkpoints:
        ...         for state.step, loss in enumerate([0.3, 0.1, 0.2]):
        ...             _ = checkpoints.save(state, {"loss": loss})
        ...     load_best(state)
        >>> state.step
        1
    """
    check_state("lk.load_best(state)", state)
    if state.checkpoints is None:
        raise CheckpointError(
            "lk.load_best(state)",
            "a state that no Checkpointer saved or restored",
            "checkpoints.save(state, scores) before, or checkpoints.restore(state, 'best')",
        )
    state.checkpoints.load_best(state)
