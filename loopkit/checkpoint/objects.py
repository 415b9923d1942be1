"""How a checkpoint gets into an object store and out of it, where nothing can be renamed."""

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterable, Mapping

import attrs

from loopkit.checkpoint.disk import names, read_bytes
from loopkit.checkpoint.folder import NAME, Checkpoint, free_name, read_checkpoint
from loopkit.checkpoint.lock import LOCK
from loopkit.checkpoint.manifest import FILE_NAME, MANIFEST, File, Manifest
from loopkit.checkpoint.messages import SAVE
from loopkit.checkpoint.remote import UNFINISHED, Remote
from loopkit.errors import CheckpointError, DamageError


class ObjectLock:
    """Says which process saves in a folder: the one that came last.

    No lock of a store ends with its process, and a job that was killed must be able to go
    on at once. So whoever comes takes the folder, and who had it is told at its next save.

    Args:
        root: The folder.
    """

    def __init__(self, root: Remote) -> None:
        self._place, self._process = root / LOCK, os.getpid()
        me = {"pid": os.getpid(), "host": socket.gethostname(), "token": secrets.token_hex(8)}
        self._text = json.dumps(me).encode()
        self._place.write([memoryview(self._text)])

    def is_held(self) -> bool:
        """Whether it still is; not where the folder was removed.

        Raises:
            CheckpointError: If another process has come.
        """
        found = self._found()
        if found not in (None, self._text):
            raise CheckpointError(
                SAVE,
                f"that another run has begun to save there: {found!r:.200}",
                "a folder of its own for each run",
            )
        return found is not None

    def release(self) -> None:
        """Leave the folder to others."""
        if os.getpid() == self._process and self._found() == self._text:
            self._place.remove()

    def _found(self) -> bytes | None:
        with contextlib.suppress(DamageError):
            return bytes(read_bytes(self._place, limit=4096))
        return None


@attrs.frozen
class ObjectStore:
    """Writes checkpoints into a folder of an object store, and removes them.

    A folder holds an object `.unfinished` from before its first file to after its manifest,
    which is the last; a folder with both is complete, one with neither is damaged, and one
    without a manifest was never a checkpoint. Removing goes the same way back.

    Attributes:
        root: The folder.
        sha256: Whether the manifest has sha256 beside crc32.
    """

    root: Remote
    sha256: bool = False

    def make_root(self) -> None:
        """Nothing: a folder is there when something is in it."""

    def lock(self) -> ObjectLock:
        """Take the folder."""
        return ObjectLock(self.root)

    def begin(self, step: int) -> str:
        """Make the place of a checkpoint, and remove what killed writers have left; its name.

        Raises:
            OSError: If the store does not answer.
        """
        self.clean()
        target = self.root / free_name(self.root, step).name
        (target / UNFINISHED).write([])
        return target.name

    def write(self, place: str, files: Mapping[str, Iterable[memoryview]]) -> dict[str, File]:
        """Write files into a place that was begun, here or by another process.

        Raises:
            OSError: If one could not be written.
        """
        return {
            name: (self.root / place / name).write(chunks, sha256=self.sha256)
            for name, chunks in files.items()
        }

    def finish(self, place: str, manifest: Manifest) -> Checkpoint:
        """Make it a checkpoint; when this returns, the store has it.

        Raises:
            OSError: If it could not be; then nothing of it is left, as far as the store
                answers, and what was there before is untouched.
        """
        target = self.root / place
        try:
            (target / MANIFEST).write([memoryview(manifest.to_bytes())])
            (target / UNFINISHED).remove()
        except BaseException:
            self.abandon(place)
            raise
        return Checkpoint(target, manifest)

    def abandon(self, place: str) -> None:
        """Remove what was begun, as far as the store answers."""
        with contextlib.suppress(OSError):
            self._remove(self.root / place)

    def discard(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Remove checkpoints; a folder that holds anything else is left as it is."""
        for checkpoint in checkpoints:
            path = self.root / checkpoint.path.name
            if {*names(path)} <= {*checkpoint.manifest.files, MANIFEST, UNFINISHED}:
                self._remove(path)

    def clean(self) -> None:
        """Remove what writers that were killed have left."""
        for path in [self.root / name for name in names(self.root) if NAME.fullmatch(name)]:
            if UNFINISHED in names(path):
                try:
                    read_checkpoint(path)
                except DamageError:
                    self._remove(path)
                else:
                    (path / UNFINISHED).remove()

    def _remove(self, folder: Remote) -> None:
        (folder / UNFINISHED).write([])  # before the manifest goes: else it would look damaged
        (folder / MANIFEST).remove()
        for name in names(folder):
            if FILE_NAME.fullmatch(name):
                (folder / name).remove()
        (folder / UNFINISHED).remove()
        folder.remove_folder()
