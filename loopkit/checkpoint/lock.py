"""One writer for a folder."""

import contextlib
import errno
import json
import os
import socket
import weakref
from pathlib import Path
from typing import Any

from loopkit.checkpoint.disk import BINARY, NO_LINKS
from loopkit.checkpoint.messages import SAVE
from loopkit.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has other locks; there a folder is not guarded
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}


class Lock:
    """Held by the one process that writes into a folder.

    The kernel's lock on the file `.lock` decides: it ends with the process that held it, and
    holds across hosts where the file system does that. Where it has no locks, the process
    and host in the file decide: one that lives on this host holds it.

    Args:
        root: The folder.

    Raises:
        CheckpointError: If another writer is at work there.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / LOCK
        self._file = self._acquire()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(_me()).encode(), 0)
        self.release = weakref.finalize(self, _release, self.path, self._file)

    def is_held(self) -> bool:
        """Whether it still is: the file may have been removed, and then be another's."""
        return self.release.alive and _is_at(self.path, self._file)

    def _acquire(self) -> int:
        while True:
            flags = os.O_RDWR | os.O_CREAT | NO_LINKS | BINARY
            file = os.open(self.path, flags, 0o666)
            try:
                if self._take(file):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _take(self, file: int) -> bool:
        """Whether this file is ours now; if not, there will be another in its place."""
        if _try_lock(file):
            return _is_at(self.path, file)
        holder = _holder(file)
        if not _is_dead(holder):
            raise CheckpointError(
                SAVE,
                f"process {holder.get('pid')} on {holder.get('host')} saving in {self.path.parent}",
                "a folder of its own for each run, or checkpoints.close() there before",
            )
        if _is_at(self.path, file):  # held by orphaned data workers of a run that was killed
            self.path.unlink(missing_ok=True)
        return False


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _try_lock(file: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        holder = _holder(file)
        return holder.get("host") != _me()["host"] or holder == _me() or _is_dead(holder)
    return True


def _holder(file: int) -> dict[str, Any]:
    holder: Any = None
    with contextlib.suppress(ValueError):
        holder = json.loads(os.pread(file, 4096, 0))
    return holder if isinstance(holder, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") != _me()["host"] or type(holder.get("pid")) is not int:
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _release(path: Path, file: int) -> None:
    with contextlib.suppress(OSError):
        if _is_at(path, file):
            path.unlink()  # while it is held: after that it may be another's
    os.close(file)
