"""What a log writes into: the contract of a sink."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from loopkit.observe.record import Record, Value, spelled


@attrs.frozen
class Opening:
    """What a sink is told when it is opened.

    Attributes:
        dir: The folder of the run; it is there.
        config: The settings of the run, flat, escaped and redacted.
        kept: What was logged up to this update stays; what was logged after it belongs to
            updates that a resumed run makes again. -1 for a run from the start.
    """

    dir: Path
    config: Mapping[str, Value]
    kept: int

    @property
    def resumes(self) -> bool:
        """Whether the run goes on, rather than starts."""
        return self.kept >= 0

    def make_folder(self) -> None:
        """Make the folder, with the settings in it, unless it is there."""
        self.dir.mkdir(parents=True, exist_ok=True)
        if self.config:
            settings = {name: spelled(value) for name, value in self.config.items()}
            (self.dir / "config.json").write_text(json.dumps(settings, allow_nan=False))


class Sink:
    """Where records go; a sink of your own needs only `write`.

    Its methods are called on one rank only, in order. One that raises costs the run nothing
    but a warning.

    Example:
        >>> class Printed(Sink):
        ...     def write(self, record):
        ...         print(record.step, dict(record.values))
        >>> Printed().write(Record(1, 0, 8, 0.0, {"loss": 0.5}))
        1 {'loss': 0.5}
    """

    def open(self, run: Opening) -> None:
        """Called once, before the first record."""

    def write(self, record: Record) -> None:
        """Take a record."""
        raise NotImplementedError

    def flush(self) -> None:
        """Put what was taken where it survives the process."""

    def close(self) -> None:
        """Called once, after the last record, if it was opened."""


@attrs.frozen
class Function(Sink):
    """A function of a record, as a sink."""

    function: Callable[[Record], Any]

    def write(self, record: Record) -> None:
        """Call it."""
        self.function(record)
