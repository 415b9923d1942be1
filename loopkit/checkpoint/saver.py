"""Getting snapshots into a folder, one at a time, and old ones out of it."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import attrs
from loguru import logger

from loopkit.checkpoint.commit import Store
from loopkit.checkpoint.folder import Retention, contents
from loopkit.checkpoint.lock import Lock
from loopkit.checkpoint.manifest import File, Manifest
from loopkit.checkpoint.messages import SAVE
from loopkit.checkpoint.objects import ObjectLock, ObjectStore
from loopkit.checkpoint.options import CheckpointOptions
from loopkit.checkpoint.remote import Place, Remote
from loopkit.checkpoint.snapshot import Snapshot, take
from loopkit.checkpoint.tensors import TensorFile
from loopkit.checkpoint.writer import Writer
from loopkit.errors import CheckpointError, CheckpointWarning, RankError, UsageError
from loopkit.parallel.environment import environment
from loopkit.plain import unsaveable
from loopkit.ranks import Exchange, everywhere
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
    _last: dict[str, TensorFile] = attrs.field(factory=dict)
    _told: bool = False

    @property
    def drops(self) -> bool:
        """Whether a save would come too early, and is to be left out then."""
        return self._writer.busy and self.options.when_busy == "drop"

    def ready(self, state: TrainState, *, known: bool) -> bool:
        """Have written the save before, and the folder for this process; on the first rank.

        Args:
            state: What is saved.
            known: Whether the state comes from a checkpoint in the folder.

        Returns:
            False where that failed, and the policy is to go on.
        """
        self.wait()
        if (lost := unsaveable(state.extras)) and not self._told:
            self._told = True
            _tell_unsaved(lost)
        return self._tried(lambda: self._claim(state, known=known)) is not None

    def take(self, state: TrainState, scores: dict[str, float]) -> Snapshot | None:
        """Copy what this rank has of a state; on all ranks."""
        self._writer.join()
        self._writer.error()  # which the first rank has told of
        kinds = {"allow_nonfinite": self.options.allow_nonfinite, "frozen": self.options.frozen}
        return take(state, state.ranks.in_parts(state), scores, self._last, **kinds)

    def begin(self, state: TrainState) -> str | None:
        """Make the place that all ranks write into; None where that failed."""
        place: str | None = self._tried(lambda: self._store().begin(state.step))
        return place

    def start(self, taken: Snapshot | None, place: str | None, exchange: Exchange) -> None:
        """Begin to write what was copied.

        Args:
            taken: What this rank writes.
            place: Where, if it is there already.
            exchange: What tells the ranks of each other's writing.
        """
        if place is not None or taken is not None:
            self._writer.start(functools.partial(self._write, taken, place, exchange))

    def _tried(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            self._fail(error)
            return None

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

    def _claim(self, state: TrainState, *, known: bool) -> bool:
        """Make the folder this process's own."""
        if self._lock is not None and self._lock.is_held():
            return True
        self._store().make_root()
        try:
            self._lock = self._store().lock()
            self._check_later(state, known=known)
        except CheckpointError as error:
            if state.ranks.alone and not isinstance(error, OSError):
                _explain_apart(error)
            raise
        return True

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

    def _write(self, taken: Snapshot | None, place: str | None, exchange: Exchange) -> None:
        """Write what this rank has; the first rank makes a checkpoint of what all have written."""
        store, manifest = self._store(), None if taken is None else taken.manifest
        place = place or store.begin(manifest.step)  # type: ignore[union-attr]
        try:
            own = everywhere(exchange, SAVE, lambda: _written(store, place, taken))
            written = {name: file for held in exchange(own) for name, file in held.items()}
        except BaseException:
            if manifest is not None:
                store.abandon(place)
            raise
        everywhere(exchange, SAVE, lambda: self._commit(store, place, manifest, written))
        self.failures = 0

    def _commit(
        self,
        store: Store | ObjectStore,
        place: str,
        manifest: Manifest | None,
        written: dict[str, File],
    ) -> None:
        if manifest is None:
            return
        try:
            found = contents(self.root).intact
        except BaseException:
            store.abandon(place)
            raise
        serial = 1 + max((c.manifest.serial for c in found), default=0)
        saved = store.finish(place, attrs.evolve(manifest, serial=serial, files=written))
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
        if not isinstance(error, OSError | CheckpointError | RankError):
            raise error  # by no policy: it would not go away
        told = isinstance(error, CheckpointError | RankError)
        failure = error if told else self._not_written(error)  # type: ignore[arg-type]
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


def _written(store: Store | ObjectStore, place: str, taken: Snapshot | None) -> dict[str, File]:
    if taken is None:
        return {}
    taken.check()
    return store.write(place, taken.files())


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
    warnings.warn(message, CheckpointWarning, stacklevel=6)  # where checkpoints.save was called
