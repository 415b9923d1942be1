"""Whose checkpoints are restored."""

import os
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path

from loguru import logger

from loopkit.checkpoint.folder import Checkpoint
from loopkit.checkpoint.manifest import MANIFEST
from loopkit.checkpoint.messages import RESTORE
from loopkit.errors import CheckpointError, CheckpointWarning


def check_owner(checkpoints: Iterable[Checkpoint], policy: str) -> None:
    """Look whether others own the checkpoints, or could have changed them.

    Once folders and files are this user's and closed to others nobody else can exchange
    them, so nothing is lost by looking before they are opened. Places in an object store
    have no owners, and are not looked at; nor is anything where there are no user ids.

    Args:
        checkpoints: Those that may be restored.
        policy: `"any"`, `"warn"` or `"refuse"`.

    Raises:
        CheckpointError: If one is somebody else's, and the policy is to refuse it.
    """
    if policy == "any" or not hasattr(os, "geteuid"):
        return
    found = dict.fromkeys(line for checkpoint in checkpoints for line in _strange(checkpoint))
    if not found:
        return
    error = CheckpointError(
        f"{RESTORE} with owner={policy!r}",
        "; ".join([*found][:5]),
        "chown and chmod go-w, if you know where they come from; or owner='any'",
    )
    if policy == "refuse":
        raise error
    logger.warning("{}", error)
    warnings.warn(str(error), CheckpointWarning, stacklevel=4)


def _strange(checkpoint: Checkpoint) -> Iterable[str]:
    folder = checkpoint.path
    if isinstance(folder, Path):
        files = [folder / name for name in (MANIFEST, *checkpoint.manifest.files)]
        for path in (folder.absolute().parent, folder, *files):
            yield from _findings(path)


def _findings(path: Path) -> Iterable[str]:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return  # which reading it will tell
    if status.st_uid not in {os.geteuid(), 0}:
        yield f"{path} of user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(status.st_mode):
        yield f"{path} that others may write ({stat.filemode(status.st_mode)})"
