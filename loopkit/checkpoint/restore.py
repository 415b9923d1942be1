"""Loading a checkpoint into a state: all of it, or nothing."""

import contextlib
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from loguru import logger

from loopkit.checkpoint.difference import check, completed
from loopkit.checkpoint.folder import Checkpoint
from loopkit.checkpoint.messages import RESTORE
from loopkit.checkpoint.read import Loaded, read
from loopkit.errors import CheckpointError, DamageError, LoopkitError
from loopkit.nested import map_tensors
from loopkit.parts import Scattered, map_scattered
from loopkit.plain import restore
from loopkit.ranks import everywhere
from loopkit.state import TrainState


@attrs.frozen
class Restored:
    """What a state was restored from.

    Attributes:
        checkpoint: The checkpoint.
        skipped: For each one that would have come first: its step, and how it is damaged.
        changes: Settings of the state that are now the checkpoint's.

    Example:
        >>> import tempfile, torch
        >>> from loopkit.checkpoint.checkpointer import Checkpointer
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpoints:
        ...     _ = checkpoints.save(state)
        ...     state.optimizer.param_groups[0]["lr"] = 0.2
        ...     _ = checkpoints.restore(state)
        ...     print(checkpoints.restored.changes)
        ('optimizer: lr of group 0 from 0.2 to 0.1',)
    """

    checkpoint: Checkpoint
    skipped: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def restore_first(
    state: TrainState, order: Sequence[Checkpoint], broken: Sequence[tuple[int, str]]
) -> Restored | None:
    """Restore a state from the first of the checkpoints that is intact.

    Args:
        state: Where to.
        order: The checkpoints to try.
        broken: Step and damage of those whose manifest does not even hold.

    Returns:
        What was done; None where there is no checkpoint at all.

    Raises:
        DamageError: If none is intact; the state is as it was.
        CheckpointError: If the first that is intact does not fit the state.
    """
    damage: list[tuple[int, str]] = []
    for checkpoint in order:
        try:
            restored = restore_one(state, checkpoint)
        except DamageError as error:
            damage.append((checkpoint.step, error.found))
        else:
            damage += [(step, found) for step, found in broken if step >= checkpoint.step]
            return attrs.evolve(restored, skipped=_lines(damage))
    if not damage and not broken:
        return None
    raise DamageError(
        RESTORE,
        "\n    ".join(["no checkpoint that is intact:", *_lines([*damage, *broken])]),
        "a copy of one of them from elsewhere, or another folder to start from nothing",
    )


def _lines(damage: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    newest_first = sorted(damage, key=lambda one: -one[0])
    return tuple(f"step {step}: {found}" for step, found in newest_first)


def restore_one(state: TrainState, checkpoint: Checkpoint) -> Restored:
    """Restore a state from a checkpoint; of several ranks all have to call it.

    Raises:
        DamageError: If it is not intact; the state is as it was.
        CheckpointError: If it does not fit the state, which is as it was.
    """
    loaded, changes = everywhere(state.ranks.everyone, RESTORE, lambda: _read(state, checkpoint))
    everywhere(state.ranks.everyone, RESTORE, lambda: _apply(state, loaded, checkpoint))
    for change in changes:
        logger.info("restored {}: {}", checkpoint, change)
    return Restored(checkpoint, changes=changes)


def _read(state: TrainState, checkpoint: Checkpoint) -> tuple[Loaded, tuple[str, ...]]:
    """What of a checkpoint this rank needs, and what it changes in the settings of the state."""
    loaded = read(checkpoint)
    changes = check(state, checkpoint.manifest, loaded)
    loaded.state["model"] = completed(state, loaded)
    if state.optimizer is None:
        loaded.state["optimizer"] = None
    if loaded.pieces.scattered:
        fitted = state.ranks.fitted(state, loaded.state)  # asks for what this rank has parts of
        loaded.state.update(map_scattered(Scattered.want_whole, fitted))
        loaded.pieces.fill(checkpoint, state.ranks.rank, state.ranks.size)
    return loaded, changes


def _apply(state: TrainState, loaded: Loaded, checkpoint: Checkpoint) -> None:
    before, names = _copied(state.state_dict()), {*state.extras}
    data, position = state.data, state.position
    try:
        state.load_state_dict(loaded.state)
    except BaseException as error:
        _roll_back(state, before)
        state.data, state.position = data, position
        for name in {*state.extras} - names:
            del state.extras[name]
        if isinstance(error, LoopkitError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            RESTORE,
            f"that {checkpoint} cannot be loaded ({type(error).__name__}: {error}); the state is"
            " as it was",
            "the code that it was saved with, or load_state_dict methods that take what it holds",
        ) from error


def _roll_back(state: TrainState, before: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):
        state.load_state_dict({**before, "extras": {}})
    for name, value in before["extras"].items():
        with contextlib.suppress(Exception):  # one that fails to load fails at this, too
            restore(state.extras, {name: value})


def _copied(tree: Any) -> Any:
    with torch.no_grad():
        return map_tensors(lambda leaf: leaf.detach().to("cpu", copy=True), tree)
