"""Records on their way to the sinks, none of which may cost the run anything."""

import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from loopkit.errors import LogWarning
from loopkit.observe.fetch import Fetched
from loopkit.observe.record import Record, clean, redacted_text
from loopkit.observe.sink import Opening, Sink

MOST_WAITING = 256  # records whose numbers are on their way from the device
LONGEST_PAUSE_S = 300.0


@attrs.define
class Guarded:
    """A sink whose failures cost the run nothing: told once, and tried again after a while."""

    sink: Sink
    opened: bool = False
    failures: int = 0
    lost: int = 0
    _not_before: float = 0.0

    def write(self, record: Record, opening: Opening) -> None:
        """Give it a record, or count it as lost."""
        if (
            time.monotonic() < self._not_before
            or not self._did(self._open, opening)
            or not self._did(self.sink.write, record)
        ):
            self.lost += 1

    def flush(self) -> None:
        """Flush it, if it is open."""
        if self.opened:
            self._did(self.sink.flush)

    def close(self) -> None:
        """Close it, if it is open."""
        if self.opened:
            self._did(self.sink.close)
        self.opened = False

    def _open(self, opening: Opening) -> None:
        if not self.opened:
            opening.make_folder()
            self.sink.open(opening)
            self.opened = True

    def _did(self, action: Callable[..., object], *args: Any) -> bool:
        try:
            action(*args)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the run goes on
            self._failed(error)
            return False
        return True

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        # A server that does not answer may take its time to say so: ask it ever less often.
        self._not_before = time.monotonic() + min(2.0**self.failures, LONGEST_PAUSE_S)
        if self.failures == 1:
            said = redacted_text(f"{type(error).__name__}: {error}").strip().splitlines()[0]
            warnings.warn(
                f"{type(self.sink).__name__} failed ({said:.300}); the run goes on, and it is"
                " tried again from time to time, but records are lost; this is said once",
                LogWarning,
                stacklevel=2,
            )


@attrs.define
class Delivery:
    """Keeps the order of records, and writes each when its numbers have arrived.

    It is apart from `Log` so that it can still deliver when the log is dropped.

    Attributes:
        sinks: Where they go.
        opening: What the sinks are opened with.
        waiting: Records whose numbers may be on their way.
    """

    sinks: list[Guarded]
    opening: Opening | None = None
    waiting: deque[tuple[Record, Fetched]] = attrs.field(factory=deque)

    def add(self, record: Record, values: Fetched) -> None:
        """Take a record, and write those that have arrived."""
        self.waiting.append((record, values))
        self._write(at_most=MOST_WAITING)

    def flush(self) -> None:
        """Write all, waiting for the device, and flush the sinks."""
        self._write(at_most=0)
        for guarded in self.sinks:
            guarded.flush()

    def close(self) -> None:
        """Write all, and close the sinks."""
        self._write(at_most=0)
        for guarded in self.sinks:
            guarded.close()

    def _write(self, *, at_most: int) -> None:
        """Write the records that have arrived; wait for those above `at_most`."""
        while self.waiting and (len(self.waiting) > at_most or self.waiting[0][1].ready()):
            record, values = self.waiting.popleft()
            record = attrs.evolve(record, values=clean(values.values()))
            for guarded in self.sinks:
                guarded.write(record, self.opening)  # type: ignore[arg-type]
