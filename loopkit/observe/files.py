"""Records in files: CSV and JSONL."""

import csv
import errno
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import attrs

from loopkit.observe.record import Record, Value, spelled
from loopkit.observe.sink import Opening, Sink

CLOCK = ("step", "epoch", "samples", "time")


def _row(record: Record) -> dict[str, Value]:
    clock = {name: getattr(record, name) for name in CLOCK}
    clash = {f"values/{k}" if k in clock else k: spelled(v) for k, v in record.values.items()}
    return {**clock, **clash}


@attrs.define
class File(Sink):
    """A file of rows that a resumed run goes on with."""

    path: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    _file: FileIO | None = attrs.field(default=None, init=False, repr=False, eq=False)
    _torn: bool = attrs.field(default=False, init=False, repr=False, eq=False)

    NAME = ""

    def open(self, run: Opening) -> None:
        """Drop what belongs to updates that are made again, and go on behind the rest."""
        self.path = run.dir / (self.path or self.NAME)
        kept = [row for row in self.rows(self.path) if _step_of(row) <= run.kept]
        if self.path.exists() and not kept and self.path.stat().st_size:
            _put_aside(self.path)
        self._rewrite(kept)

    def rows(self, path: Path) -> Iterator[dict[str, Any]]:
        """The rows of a file, from the start; none if there is no file."""
        raise NotImplementedError

    def text(self, rows: list[dict[str, Any]]) -> str:
        """Rows as they stand in the file, all of it."""
        raise NotImplementedError

    def flush(self) -> None:
        """Return when it would survive the machine."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with file:  # closed, though the disk may refuse what is left
                os.fsync(file.fileno())

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Put these rows in the file's place, in one step, and go on behind them."""
        if self._file is not None:
            self._file.close()
        temporary = self._path().with_name(f".{self._path().name}.tmp")
        temporary.write_text(self.text(rows), encoding="utf-8", newline="")
        temporary.replace(self._path())
        self._file = FileIO(self._path(), "a")

    def _append(self, line: str) -> None:
        """One line in one write, so that a process that is killed leaves no half of one."""
        file = self._file = self._file or FileIO(self._path(), "a")
        data = ("\n" * self._torn + line).encode()
        self._torn = True
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path()))
        self._torn = False

    def _path(self) -> Path:
        return self.path or Path(self.NAME)


def _put_aside(path: Path) -> None:
    """Give the records of an earlier run another name: nobody asked to throw them away."""
    number = 1
    while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(other)


def _step_of(row: Mapping[str, Any]) -> float:
    try:
        return float(row["step"])
    except (KeyError, TypeError, ValueError):
        return math.inf  # no record of ours: dropped


class JSONL(File):
    """A line of JSON for each record, in `metrics.jsonl` of the run's folder.

    A resumed run goes on behind the records that its checkpoint has seen; a run from
    the start gives the file of an earlier one another name (`metrics.1.jsonl`). Numbers that are
    not finite are the text "NaN", "Infinity", "-Infinity", so that each line is JSON.

    Args:
        path: Another name, within the run's folder, or a path of its own.

    Example:
        >>> JSONL()
        JSONL(path=None)
    """

    NAME = "metrics.jsonl"

    def write(self, record: Record) -> None:
        """Add a line."""
        self._append(json.dumps(_row(record), allow_nan=False) + "\n")

    def rows(self, path: Path) -> Iterator[dict[str, Any]]:
        """The lines that are whole."""
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                    except ValueError:  # a line that a full disk cut short
                        continue
                    if isinstance(row, dict):
                        yield row

    def text(self, rows: list[dict[str, Any]]) -> str:
        """The lines."""
        return "".join(json.dumps(row) + "\n" for row in rows)


@attrs.define
class CSV(File):
    """A row for each record, in `metrics.csv` of the run's folder; a column for each name.

    What a record does not hold is empty. A name that comes later adds a column: the file is
    written anew, in one step. Resuming and earlier runs are as for `JSONL`.

    Args:
        path: Another name, within the run's folder, or a path of its own.

    Example:
        >>> CSV("val.csv").path.name
        'val.csv'
    """

    _columns: list[str] = attrs.field(factory=list, init=False, repr=False, eq=False)

    NAME = "metrics.csv"

    def write(self, record: Record) -> None:
        """Add a row."""
        row = _row(record)
        if new := [name for name in row if name not in self._columns]:
            rows = [*self.rows(self._path())]
            self._columns += new
            self._rewrite(rows)
        self._append(_csv([[row.get(name, "") for name in self._columns]]))

    def rows(self, path: Path) -> Iterator[dict[str, Any]]:
        """The rows, without the cells that are empty."""
        if path.exists():
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                for row in csv.DictReader(file):
                    if None not in row.values() and None not in row:  # else a full disk cut it
                        yield {name: cell for name, cell in row.items() if cell != ""}

    def text(self, rows: list[dict[str, Any]]) -> str:
        """The header and the rows."""
        names = dict.fromkeys([*CLOCK, *self._columns, *(name for row in rows for name in row)])
        self._columns = [*names]
        lines = [[row.get(name, "") for name in self._columns] for row in rows]
        return _csv([self._columns, *lines])


def _csv(lines: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that `JSONL` or `CSV` wrote, by its suffix."""
    return (CSV() if path.suffix == ".csv" else JSONL()).rows(path)
