"""How a checkpoint gets on disk and off it: complete, or not there at all."""

import contextlib
import errno
import secrets
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs

from loopkit.checkpoint.disk import Disk, is_folder, names
from loopkit.checkpoint.folder import TEMPORARY, Checkpoint, free_name
from loopkit.checkpoint.lock import Lock
from loopkit.checkpoint.manifest import FILE_NAME, MANIFEST, File, Manifest

Chunks = Iterable[memoryview]


def write_file(disk: Disk, path: Path, chunks: Chunks, *, sha256: bool = False) -> File:
    """Write a new file; when this returns, its bytes survive a power cut.

    Raises:
        OSError: If it is there already, or cannot be written.
    """
    chunks = [*chunks]  # parts of memory that is there already
    with ThreadPoolExecutor(1) as beside:  # a checksum takes as long as the writing
        file = beside.submit(File.of, chunks, sha256=sha256)
        with _created(disk, path) as opened:
            for chunk in chunks:
                while len(chunk):
                    chunk = chunk[disk.write(opened, chunk) :]  # noqa: PLW2901
            disk.sync(opened)
        return file.result()


@contextlib.contextmanager
def _created(disk: Disk, path: Path) -> Iterator[int]:
    file = disk.create(path)
    try:
        yield file
    finally:
        disk.close(file)


@attrs.frozen
class Store:
    """Writes checkpoints into a folder, and removes them.

    All of it is written beside its place, the manifest last, and then renamed; whenever the
    process or the machine stops, the folder holds only complete checkpoints, and temporary
    folders that `clean` knows by their names.

    Attributes:
        root: The folder.
        disk: What does the single operations.
        sha256: Whether the manifest has sha256 beside crc32.
        private: Whether only their owner may open the folders.
    """

    root: Path
    disk: Disk
    sha256: bool = False
    private: bool = False

    def make_root(self) -> None:
        """Make the folder where it is not there, and its name durable."""
        missing = []
        path = self.root.absolute()
        while not path.exists():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            try:
                self._make_folder(path, private=self.private and path == missing[0])
            except FileExistsError:  # another process was first; the lock is for one of them
                if not path.is_dir():
                    raise
            self.disk.sync_folder(path.parent)

    def _make_folder(self, path: Path, *, private: bool) -> None:
        self.disk.make_folder(path, *((0o700,) if private else ()))

    def lock(self) -> Lock:
        """Make the folder this process's own.

        Raises:
            CheckpointError: If another process is at work there.
        """
        return Lock(self.root)

    def begin(self, step: int) -> str:
        """Make the place of a checkpoint, and remove what killed writers have left; its name.

        Raises:
            OSError: If it could not be made.
        """
        self.clean()
        temporary = self._temporary(step)
        self._make_folder(temporary, private=self.private)
        return temporary.name

    def write(self, place: str, files: Mapping[str, Chunks]) -> dict[str, File]:
        """Write files into a place that was begun, here or by another process.

        Raises:
            OSError: If one could not be written.
        """
        return {
            name: write_file(self.disk, self.root / place / name, chunks, sha256=self.sha256)
            for name, chunks in files.items()
        }

    def finish(self, place: str, manifest: Manifest) -> Checkpoint:
        """Make it a checkpoint; when this returns, it is there and survives a power cut.

        Raises:
            OSError: If it could not be; then nothing of it is left, as far as the disk
                allows, and what was there before is untouched.
        """
        temporary = target = self.root / place
        try:
            write_file(self.disk, temporary / MANIFEST, [memoryview(manifest.to_bytes())])
            self.disk.sync_folder(temporary)
            final = self.root / free_name(self.root, manifest.step).name
            self.disk.rename(temporary, final)
            target = final
            self.disk.sync_folder(self.root)
        except BaseException:
            self.abandon(target.name)
            raise
        return Checkpoint(target, manifest)

    def abandon(self, place: str) -> None:
        """Remove what was begun, as far as the disk allows."""
        with contextlib.suppress(OSError):
            self._remove(self.root / place)

    def _temporary(self, step: int) -> Path:
        return self.root / f".tmp-{step:012d}-{secrets.token_hex(4)}"

    def discard(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Remove checkpoints; a folder that holds anything else is left as it is."""
        renamed = []
        for checkpoint in checkpoints:
            expected = {*checkpoint.manifest.files, MANIFEST}
            path = self.root / checkpoint.path.name
            if is_folder(path) and {*names(path)} <= expected:
                renamed.append(self._temporary(checkpoint.step))
                self.disk.rename(path, renamed[-1])
        if renamed:
            self.disk.sync_folder(self.root)  # before a file goes: no half checkpoint has a name
        for path in renamed:
            self._remove(path)

    def clean(self) -> None:
        """Remove what writers that were killed have left."""
        for name in names(self.root):
            if TEMPORARY.fullmatch(name) and is_folder(self.root / name):
                self._remove(self.root / name)

    def _remove(self, folder: Path) -> None:
        if not TEMPORARY.fullmatch(folder.name):  # committed, but not known to be durable
            renamed = self._temporary(0)
            self.disk.rename(folder, renamed)
            folder = renamed
        for name in names(folder):
            if FILE_NAME.fullmatch(name):
                self.disk.remove_file(folder / name)
        try:
            self.disk.remove_folder(folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
