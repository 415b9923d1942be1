"""Getting snapshots into a folder, one at a time, and old ones out of it."""

import warnings
from typing import Any

import attrs
from loguru import logger
from torch import Tensor

from loopkit.checkpoint.commit import Store
from loopkit.checkpoint.folder import Retention, contents
from loopkit.checkpoint.lock import Lock
from loopkit.checkpoint.messages import SAVE
from loopkit.checkpoint.objects import ObjectLock, ObjectStore
from loopkit.checkpoint.options import CheckpointOptions
from loopkit.checkpoint.remote import Place, Remote
from loopkit.checkpoint.snapshot import Snapshot, take
from loopkit.checkpoint.writer import Writer
from loopkit.errors import CheckpointError, CheckpointWarning, UsageError
from loopkit.parallel.environment import environment
from loopkit.plain import unsaveable
from loopkit.state import TrainState


@attrs.define(eq=False)
class Saver:
    """Copies states, and writes the copies in the background.

    Attributes:
        root: The folder.
        options: The policies.
        retention: Which checkpoints stay.
        failures: Saves in a row that could not be written.
    """

    root: Place
    options: CheckpointOptions
    retention: Retention
    failures: int = 0
    _writer: Writer = attrs.field(factory=Writer)
    _lock: Lock | ObjectLock | None = None
    _buffers: dict[str, Tensor] = attrs.field(factory=dict)
    _told: bool = False

    @property
    def drops(self) -> bool:
        """Whether a save would come too early, and is to be left out then."""
        return self._writer.busy and self.options.when_busy == "drop"

    def save(self, state: TrainState, whole: Any, scores: dict[str, float], *, known: bool) -> bool:
        """Copy a state and begin to write it, when the one before is written.

        Args:
            state: What is saved.
            whole: What gives its state dict.
            scores: What it is saved with.
            known: Whether the state comes from a checkpoint in the folder.

        Returns:
            False where that failed, and the policy is to go on.
        """
        self.wait()
        if (lost := unsaveable(state.extras)) and not self._told:
            self._told = True
            _tell_unsaved(lost)
        try:
            self._claim(state, known=known)
            kinds = {"allow_nonfinite": self.options.allow_nonfinite, "frozen": self.options.frozen}
            taken = take(state, whole(), scores, self._buffers, **kinds)
        except OSError as error:
            self._fail(error)
            return False
        self._writer.start(lambda: self._write(taken))
        return True

    def join(self) -> None:
        """Wait for the last save, without asking how it went."""
        self._writer.join()

    def wait(self) -> bool:
        """Wait for the last save; whether it went well."""
        self._writer.join()
        error = self._writer.error()
        if error is not None:
            self._fail(error)
        return error is None

    def close(self) -> None:
        """Wait for the last save, and leave the folder to others."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _claim(self, state: TrainState, *, known: bool) -> None:
        """Make the folder this process's own."""
        if self._lock is not None and self._lock.is_held():
            return
        self._store().make_root()
        try:
            self._lock = self._store().lock()
            self._check_later(state, known=known)
        except CheckpointError as error:
            if state.ranks.alone and not isinstance(error, OSError):
                _explain_apart(error)
            raise

    def _check_later(self, state: TrainState, *, known: bool) -> None:
        later = [c for c in contents(self.root).intact if c.step > state.step]
        if later and not known:
            raise CheckpointError(
                f"checkpoints.save(state) at step {state.step}",
                f"{later[-1]} of another run in {self.root}",
                "checkpoints.restore(state) before, to go on with that run; or another folder",
            )

    def _store(self) -> Store | ObjectStore:
        if isinstance(self.root, Remote):
            return ObjectStore(self.root, self.options.sha256)
        return Store(self.root, self.options.disk, self.options.sha256, self.options.private)

    def _write(self, taken: Snapshot) -> None:
        found, store = contents(self.root).intact, self._store()
        serial = 1 + max((c.manifest.serial for c in found), default=0)
        store.clean()
        saved = store.commit(taken.files(), attrs.evolve(taken.manifest, serial=serial))
        self.failures = 0
        logger.info("saved {} in {}", saved, self.root)
        try:
            store.discard(self.retention.expendable((*found, saved)))
        except OSError as error:
            raise CheckpointError(
                SAVE,
                f"{type(error).__name__}: {error}, removing older checkpoints; {saved} is saved",
                "permission to remove files in the folder; or CheckpointOptions(on_error='warn')",
            ) from error

    def _fail(self, error: BaseException) -> None:
        self.failures += 1
        if not isinstance(error, OSError | CheckpointError):
            raise error  # by no policy: it would not go away
        failure = error if isinstance(error, CheckpointError) else self._not_written(error)
        if self.options.on_error == "raise" or self.failures > self.options.max_failures:
            raise failure
        logger.warning("{}", failure)
        warnings.warn(str(failure), CheckpointWarning, stacklevel=4)

    def _not_written(self, error: OSError) -> CheckpointError:
        failure = CheckpointError(
            SAVE,
            f"{type(error).__name__}: {error}, writing in {self.root};"
            " what was saved before is untouched",
            "space and permission to write there; or CheckpointOptions(on_error='warn') to go on",
        )
        failure.__cause__ = error
        return failure


def _explain_apart(error: CheckpointError) -> None:
    """Say to one of several processes that do not train together that this is why.

    Those that are meant to train apart have a folder each, and never come here.
    """
    try:
        found = environment()
    except UsageError:  # said in part: then nobody can tell
        return
    if found is not None and found.world_size > 1:
        raise CheckpointError(
            error.wrote,
            f"{error.found}; this is rank {found.rank} of {found.world_size} that a launcher has"
            " started, which trains by itself: the step has no lk.distributed(), or has not set"
            " the state up yet",
            "@lk.distributed() on the step, with step.set_up(state) before a save that comes"
            " before the first update; or, for trainings apart, a folder for each:"
            " lk.Checkpointer(f'runs/{rank}')",
        ) from error


def _tell_unsaved(lost: dict[str, str]) -> None:
    extras = ", ".join(f"{name} ({kind})" for name, kind in lost.items())
    message = (
        f"not in the checkpoint: state.extras {extras}, neither plain data nor with state_dict and"
        " load_state_dict. A restored state keeps what it was made with: right for a tokenizer,"
        " wrong for what changes in training, to which give the two methods"
    )
    logger.warning("{}", message)
    warnings.warn(message, CheckpointWarning, stacklevel=7)  # where checkpoints.save was called
