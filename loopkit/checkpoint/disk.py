"""The operations on files that a checkpoint is written and read by."""

import errno
import functools
import hashlib
import os
import stat
import zlib
from pathlib import Path
from typing import Any

from loopkit.checkpoint.manifest import File
from loopkit.checkpoint.messages import ANOTHER_COPY, RESTORE
from loopkit.checkpoint.tensors import CHUNK
from loopkit.errors import DamageError

# Windows has neither flag; there a folder cannot be opened, and its entries are durable at once
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a pipe in the place of a file must not hang us
BINARY = getattr(os, "O_BINARY", 0)


class Disk:
    """What a save does to the file system, an operation each; the seam for other stores.

    Permissions are the process's umask's. Nothing is ever opened that exists.
    """

    def make_folder(self, path: Path, mode: int = 0o777) -> None:
        """Make a folder that is not there."""
        path.mkdir(mode)

    def create(self, path: Path) -> int:
        """Open a new file for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINKS | BINARY, 0o666)

    def write(self, file: int, data: memoryview) -> int:
        """Write; the number of bytes that were taken may be fewer."""
        return os.write(file, data)

    def sync(self, file: int) -> None:
        """Return when the file's bytes would survive a power cut."""
        os.fsync(file)

    def close(self, file: int) -> None:
        """Close the file."""
        os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        """Give it another name, in one step."""
        source.rename(target)

    def sync_folder(self, path: Path) -> None:
        """Return when the folder's entries would survive a power cut."""
        if os.name == "posix":
            folder = os.open(path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def remove_file(self, path: Path) -> None:
        """Remove a file, or a link; never what a link points to."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()


# What is read is asked of the place itself: a path of the file system, or one elsewhere, for
# which `remote` registers its own.


@functools.singledispatch
def names(folder: Any) -> list[str]:
    """The names in a folder, links included; none where there is no folder."""
    try:
        return os.listdir(folder)  # noqa: PTH208  # the half of Path.iterdir's time
    except (FileNotFoundError, NotADirectoryError):
        return []


@functools.singledispatch
def is_folder(path: Any) -> bool:
    """Whether it is a folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


@functools.singledispatch
def read_bytes(path: Any, *, size: int | None = None, limit: int | None = None) -> bytearray:
    """The bytes of a regular file.

    Args:
        path: The file; links are not followed.
        size: How many bytes it must have.
        limit: How many it may have.

    Raises:
        DamageError: If it cannot be read, is no regular file, or has another size.
    """
    try:
        file = os.open(path, os.O_RDONLY | NO_LINKS | NO_WAIT | BINARY)
        with os.fdopen(file, "rb", buffering=0) as opened:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise DamageError(RESTORE, f"{path.name} damaged (no regular file)", ANOTHER_COPY)
            check_size(path.name, found.st_size, size, limit)
            data = bytearray(found.st_size)
            view, read = memoryview(data), 0
            while count := opened.readinto(view[read : read + CHUNK]):
                read += count
    except OSError as error:
        raise DamageError(
            RESTORE, f"{path.name} damaged ({_reason(error)})", ANOTHER_COPY
        ) from error
    if read != len(data):
        raise DamageError(RESTORE, f"{path.name} damaged (it ends early)", ANOTHER_COPY)
    return data


def check_size(name: str, found: int, size: int | None, limit: int | None) -> None:
    """Compare what a file is with what it must be, before memory is taken for it.

    Raises:
        DamageError: If they differ.
    """
    if size not in (None, found) or (limit and found > limit):
        raise DamageError(RESTORE, f"{name} damaged (its size is {found})", ANOTHER_COPY)


def _reason(error: OSError) -> str:
    known = {errno.ENOENT: "missing", errno.ELOOP: "a link", errno.ENOTDIR: "no folder"}
    return known.get(error.errno or 0, str(error.strerror))


def read_checked(path: Any, file: File) -> bytearray:
    """The bytes of a file, if size and checksums are those of the manifest.

    Raises:
        DamageError: If they are not.
    """
    data = read_bytes(path, size=file.size)
    if f"{zlib.crc32(data):08x}" != file.crc32:
        raise DamageError(RESTORE, f"{path.name} damaged (crc32)", ANOTHER_COPY)
    if file.sha256 is not None and hashlib.sha256(data).hexdigest() != file.sha256:
        raise DamageError(RESTORE, f"{path.name} damaged (sha256)", ANOTHER_COPY)
    return data
