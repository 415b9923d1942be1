"""The folder of a run: the checkpoints in it, their order, and which of them may go."""

import json
import math
import re
from collections.abc import Mapping, Sequence

import attrs

from loopkit.checkpoint.disk import is_folder, names, read_bytes
from loopkit.checkpoint.manifest import LIMIT, MANIFEST, Manifest
from loopkit.checkpoint.messages import ANOTHER_COPY, RESTORE
from loopkit.checkpoint.remote import UNFINISHED, Place
from loopkit.errors import DamageError

NAME = re.compile(r"step-(\d{12})(?:-\d{1,9})?")  # with a number where a step is saved again
TEMPORARY = re.compile(r"\.tmp-\d{12}-[0-9a-f]{8}")


@attrs.frozen(repr=False)
class Checkpoint:
    """A checkpoint on disk; it prints its step and its scores.

    Attributes:
        path: Its folder.
        manifest: What it holds.

    Example:
        >>> from pathlib import Path
        >>> manifest = Manifest(1200, 3, 38400, 7, 1, {"accuracy": 0.9341}, {}, {})
        >>> Checkpoint(Path("runs/step-000000001200"), manifest)
        Checkpoint(step=1200, accuracy=0.9341)
    """

    path: Place
    manifest: Manifest = attrs.field(eq=False)

    @property
    def step(self) -> int:
        """Updates up to it."""
        return self.manifest.step

    @property
    def scores(self) -> Mapping[str, float]:
        """The scores that it was saved with."""
        return self.manifest.scores

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.manifest.files.values())

    def __repr__(self) -> str:
        # As JSON a name stays on its line, whatever is in it
        names = {name: json.dumps(name)[1:-1] for name in self.scores}
        scores = [f"{names[name]}={score:.6g}" for name, score in self.scores.items()]
        return f"Checkpoint({', '.join([f'step={self.step}', *scores])})"


Broken = tuple[tuple[int, str], ...]
"""Step and damage of folders that have the name of a checkpoint, and are none."""


@attrs.frozen
class Contents:
    """What a folder holds.

    Attributes:
        intact: Checkpoints whose manifest holds, in the order in which they were saved.
        broken: Step and damage of each other folder with the name of one, the newest first.
    """

    intact: tuple[Checkpoint, ...]
    broken: Broken


def contents(root: Place) -> Contents:
    """The checkpoints in a folder: order is the manifests', never the file system's.

    Example:
        >>> from pathlib import Path
        >>> contents(Path("/there/is/no/such/folder"))
        Contents(intact=(), broken=())
    """
    intact, broken = [], []
    for entry in names(root):
        if (name := NAME.fullmatch(entry)) and is_folder(path := root / entry):
            try:
                intact.append(read_checkpoint(path))
            except DamageError as error:
                if UNFINISHED not in names(path):
                    broken.append((int(name[1]), error.found))
    intact.sort(key=lambda checkpoint: (checkpoint.manifest.serial, checkpoint.step))
    return Contents(tuple(intact), tuple(sorted(broken, reverse=True)))


def read_checkpoint(path: Place) -> Checkpoint:
    """The checkpoint in a folder; its other files are not read yet.

    Raises:
        DamageError: If its manifest does not hold.
    """
    manifest = Manifest.from_bytes(bytes(read_bytes(path / MANIFEST, limit=LIMIT)))
    if (named := NAME.fullmatch(path.name)) and int(named[1]) != manifest.step:
        raise DamageError(RESTORE, f"{MANIFEST} damaged (of step {manifest.step})", ANOTHER_COPY)
    return Checkpoint(path, manifest)


def ranked(
    checkpoints: Sequence[Checkpoint], monitor: str | None, mode: str
) -> tuple[Checkpoint, ...]:
    """Those that have the score, the best first; of equals the one saved first.

    A score that is not a number is none.
    """
    sign = 1 if mode == "min" else -1
    scored = [c for c in checkpoints if not math.isnan(c.scores.get(monitor or "", math.nan))]
    return tuple(sorted(scored, key=lambda c: sign * c.scores[monitor or ""]))


@attrs.frozen
class Retention:
    """Which checkpoints of a folder stay: the last ones, and the best.

    Example:
        >>> Retention(None, 1, None, "min").expendable([])
        []
    """

    keep_last: int | None
    keep_best: int
    monitor: str | None
    mode: str

    def expendable(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those that may go, of all in the order in which they were saved."""
        if self.keep_last is None:
            return []
        best = ranked(checkpoints, self.monitor, self.mode)[: self.keep_best]
        kept = {*checkpoints[-self.keep_last :], *best}
        return [checkpoint for checkpoint in checkpoints if checkpoint not in kept]


def free_name(root: Place, step: int) -> Place:
    """The name for a checkpoint: `step-<12 digits>`, with a number if that is taken.

    A folder cannot be replaced in one step, so a step that is saved again gets a name of
    its own, and the older one stays until the new one is complete.
    """
    taken, name, again = names(root), f"step-{step:012d}", 1
    while name in taken:
        again += 1
        name = f"step-{step:012d}-{again}"
    return root / name
