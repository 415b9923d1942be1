"""Saving and restoring: what users call."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from loguru import logger

from loopkit.check import at_least_one, one_of
from loopkit.checkpoint.disk import is_folder
from loopkit.checkpoint.folder import (
    Broken,
    Checkpoint,
    Retention,
    contents,
    ranked,
    read_checkpoint,
)
from loopkit.checkpoint.messages import RESTORE, SAVE
from loopkit.checkpoint.options import CheckpointOptions
from loopkit.checkpoint.owner import check_owner
from loopkit.checkpoint.remote import Place, place_of
from loopkit.checkpoint.restore import Restored, restore_first, restore_one
from loopkit.checkpoint.saver import Saver
from loopkit.checkpoint.saving import Saving
from loopkit.checkpoint.snapshot import Scores, checked_scores
from loopkit.closing import Closing
from loopkit.errors import CheckpointError, CheckpointWarning, RankError, UsageError
from loopkit.every import Every, Interval, Moment
from loopkit.given import check_state
from loopkit.ranks import ALONE, together
from loopkit.state import TrainState

WORDS = ("latest", "best")


def _check_keep_last(checkpointer: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    call = f"Checkpointer(dir, keep_last={value!r})"
    if value is not None and at_least_one(call, "keep_last", value) == 1:
        raise UsageError(
            call,
            "one checkpoint: if a disk damages it nothing is left to go on from",
            "keep_last=2, or more; None keeps all",
        )


def _check_mode(checkpointer: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    one_of(f"Checkpointer(mode={value!r})", "mode", value, ("min", "max"))


def _check_keep_best(checkpointer: Any, attribute: Any, value: Any) -> None:  # noqa: ARG001
    at_least_one(f"Checkpointer(keep_best={value!r})", "keep_best", value)


@attrs.define(eq=False)
class Checkpointer(Closing):
    """Saves a state into a folder, and restores it from there.

    Whenever the process or the machine stops, each checkpoint on disk is complete, and the
    run that is restored from one goes on bit for bit as the first would have. A save copies
    the state to host memory and returns; it is written in the background, where one failure
    loses nothing that was saved before. Reading a checkpoint executes no code of it.

    Args:
        dir: The folder of the run; made if it is not there. One process at a time saves in it.
            Or an address in an object store, `"s3://bucket/run"`: fsspec finds credentials
            and endpoint, in the environment or in `fsspec.config.conf["s3"]`.
        monitor: Name of the score that says which checkpoint is best.
        mode: `"min"` or `"max"`: whether a low or a high score is good.
        keep_best: How many of the best are kept; counts only with `monitor`.
        keep_last: How many of the last are kept, at least 2; None keeps all.
        every: How often `wrap` saves, as `lk.every` takes it: 500, "10min", "epoch".
        async_save: Write in the background; otherwise `save` returns when it is on disk.
        options: Rare settings.

    Attributes:
        restored: What the state was restored from, what was damaged, and what it changed.

    Raises:
        UsageError: For a setting that cannot be right.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpoints:
        ...     first = checkpoints.restore(state)
        ...     saved = checkpoints.save(state, {"loss": 0.5})
        ...     first, checkpoints.restore(state), checkpoints.latest
        (False, True, Checkpoint(step=0, loss=0.5))
    """

    dir: Place = attrs.field(converter=place_of)
    monitor: str | None = attrs.field(default=None, kw_only=True)
    mode: str = attrs.field(default="min", kw_only=True, validator=_check_mode)
    keep_best: int = attrs.field(default=1, kw_only=True, validator=_check_keep_best)
    keep_last: int | None = attrs.field(default=2, kw_only=True, validator=_check_keep_last)
    every: Interval | None = attrs.field(default=None, kw_only=True)
    async_save: bool = attrs.field(default=True, kw_only=True)
    options: CheckpointOptions = attrs.field(factory=CheckpointOptions, kw_only=True)
    restored: Restored | None = attrs.field(default=None, init=False, repr=False)
    _saver: Saver = attrs.field(init=False, repr=False)
    _saved_step: int | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.every is not None:
            self._how_often()
        self._saver = Saver(self.dir, self.options, self._retention())

    def _retention(self) -> Retention:
        return Retention(self.keep_last, self.keep_best, self.monitor, self.mode)

    def __deepcopy__(self, memo: object) -> "Checkpointer":
        return self  # a copy of a state saves in the same folder

    @property
    def failures(self) -> int:
        """Saves in a row that could not be written."""
        return self._saver.failures

    # Saving

    def save(self, state: TrainState, scores: Scores | None = None) -> bool:
        """Save a state, as it is now.

        Args:
            state: Between two updates.
            scores: What an evaluation of it gave; without, it cannot be the best.

        Returns:
            Whether it is saved or being saved; False where a policy of `options` dropped it.

        Raises:
            UsageError: If the state holds what is no plain data, or a score is missing.
            NonFiniteError: If a parameter is not finite; of a save in the background, the next
                one, `wait` or `close` says so, and nothing of it is there.
            CheckpointError: If an earlier save failed, another process saves in the folder,
                or the folder holds later checkpoints that the state does not come from.
        """
        check_state("checkpoints.save(state)", state)
        numbers = {} if scores is None else checked_scores(scores, self.monitor)
        ranks, saver = state.ranks, self._saver
        if ranks.from_first(saver.drops):
            return False
        known = self._is_known()
        if not together(ranks, SAVE, lambda: saver.ready(state, known=known)):
            return False
        taken = saver.take(state, numbers)
        place = together(ranks, SAVE, lambda: saver.begin(state)) if ranks.spread else None
        if ranks.spread and place is None:
            return False
        saver.start(taken, place, ranks.aside() if ranks.spread else ALONE.everyone)
        saved: bool = self.async_save or together(ranks, SAVE, self.wait)
        if saved:
            state.checkpoints, self._saved_step = self, state.step
        return saved

    def wait(self) -> bool:
        """Return when the last save is on disk.

        Returns:
            Whether nothing failed since this was last asked.

        Raises:
            CheckpointError: If a save failed, and `options` do not say to go on.
        """
        return self._saver.wait()

    def ensure(self, state: TrainState) -> bool:
        """Have a state on disk when this returns: save it, unless that is done, and wait.

        An earlier save that failed is no reason not to try this one. Of several ranks all have
        to call it.

        Raises:
            CheckpointError: If it could not be saved, and `options` do not say to go on.
        """
        try:
            self.wait()
        except (CheckpointError, RankError) as error:
            logger.warning("{}", error)
        done = self._saved_step == state.step and not self.failures
        if not state.ranks.agree(not done):  # the first rank alone knows of a save that failed
            return True
        return self.save(state) and self.wait()

    def close(self) -> None:
        """Wait for the last save, and leave the folder to other processes.

        Raises:
            CheckpointError: If a save failed, and `options` do not say to go on.
        """
        self._saver.close()

    def wrap(self, run: Iterable[TrainState]) -> Saving:
        """The states of `run`, saved every so often, and at its end.

        `for state in checkpoints.wrap(run(...)): ...`; a state is saved when the body of the
        loop is through with it, without scores, unless the body saved it. A `run` of your own
        may yield once for many updates: it is time when a multiple lies among them.

        Raises:
            UsageError: Without `every`.
        """
        if self.every is None:
            raise UsageError(
                "checkpoints.wrap(run)",
                "a Checkpointer that does not say how often",
                'Checkpointer(dir, every=500), every="10min" or every="epoch"',
            )
        return Saving(run, self._how_often(), self._save_once, self.wait, self._restored_at())

    def _restored_at(self) -> Moment:
        """Where a run goes on; no part of an epoch, which at worst saves once more."""
        if self.restored is None:
            return Moment()
        manifest = self.restored.checkpoint.manifest
        return Moment(manifest.step, manifest.samples, manifest.epoch)

    def _how_often(self) -> Every:
        assert self.every is not None
        return Every.of(self.every, f"Checkpointer(dir, every={self.every!r})")

    def _is_known(self) -> bool:
        """Whether what is saved goes on from a checkpoint in this folder."""
        if self.restored is None:
            return False
        return self.restored.checkpoint.path.resolve().parent == self.dir.resolve()

    def _save_once(self, state: TrainState) -> None:
        if self._saved_step != state.step:
            self.save(state)

    # Restoring

    def restore(self, state: TrainState, which: str | Place | Checkpoint = "latest") -> bool:
        """Load a checkpoint into a state: all of it, or, where that cannot be, nothing.

        A checkpoint that is damaged is passed over for the next one, with a warning; see
        `restored`. A state without an optimizer, to evaluate, takes the model.

        Args:
            state: Made like the one that was saved.
            which: `"latest"`, `"best"`, or one of `list()` or its folder.

        Returns:
            False if there is nothing to restore yet.

        Raises:
            DamageError: If there are checkpoints, and none is intact.
            CheckpointError: If it does not fit the state: with all that differs; or if it is
                not this user's, and `options` ask for that.
            UsageError: For `"best"` without a `monitor`.
        """
        check_state("checkpoints.restore(state)", state)
        order, broken = together(state.ranks, RESTORE, lambda: self._order(which))
        self._saver.join()
        if which in WORDS:
            restored = restore_first(state, order, broken)
        else:
            restored = restore_one(state, order[0])
        if restored is None:
            return False
        state.checkpoints, self.restored, self._saved_step = self, restored, state.step
        if restored.skipped:
            damaged = "; ".join(restored.skipped)
            message = f"restored {restored.checkpoint}; passed over damaged ones: {damaged}"
            logger.warning("{}", message)
            warnings.warn(message, CheckpointWarning, stacklevel=2)
        return True

    def _order(self, which: str | Place | Checkpoint) -> "tuple[Sequence[Checkpoint], Broken]":
        """The checkpoints to try, the first choice first; and the folders that are not intact."""
        self._saver.join()
        order, broken = self._choice(str(which)) if which in WORDS else ([self._at(which)], ())
        check_owner(order, self.options.owner)
        return order, broken

    def load_best(self, state: TrainState) -> None:
        """Load the best checkpoint into a state, at the end of a run.

        Raises:
            CheckpointError: If there is none; otherwise as `restore`.
        """
        if not self.restore(state, "best"):
            raise CheckpointError(
                "lk.load_best(state)",
                f"no checkpoint in {self.dir}",
                "checkpoints.save(state, scores) before",
            )

    def _choice(self, which: str) -> "tuple[Sequence[Checkpoint], Broken]":
        """The checkpoints to try, the first choice first; and the folders that are not intact."""
        found = contents(self.dir)
        if which == "latest":
            return found.intact[::-1], found.broken
        if self.monitor is None:
            raise UsageError(
                'checkpoints.restore(state, "best")',
                "a Checkpointer that does not say by which score",
                'Checkpointer(dir, monitor="accuracy", mode="max")',
            )
        best = ranked(found.intact, self.monitor, self.mode)
        if found.intact and not best:
            raise CheckpointError(
                f'checkpoints.restore(state, "best") with monitor={self.monitor!r}',
                f"the scores {sorted({n for c in found.intact for n in c.scores})}",
                "one of those names as the monitor, or checkpoints.save(state, scores) before",
            )
        return best, found.broken

    def _at(self, which: str | Place | Checkpoint) -> Checkpoint:
        if isinstance(which, Checkpoint):
            return which
        for path in (place_of(which), self.dir / str(which)):
            if is_folder(path):
                return read_checkpoint(path)
        raise CheckpointError(
            f"checkpoints.restore(state, {str(which)!r})",
            f"no such folder (a link to one is not followed); there are {self.list()}",
            '"latest", "best", the folder of a checkpoint, or one of checkpoints.list()',
        )

    # What there is

    def list(self) -> "list[Checkpoint]":
        """The checkpoints in the folder, in the order in which they were saved."""
        self._saver.join()
        return [*contents(self.dir).intact]

    @property
    def latest(self) -> Checkpoint | None:
        """The one that was saved last; None if there is none."""
        return next(iter(self.list()[::-1]), None)

    @property
    def best(self) -> Checkpoint | None:
        """The one with the best score; None if there is none."""
        return next(iter(ranked(self.list(), self.monitor, self.mode)), None)
