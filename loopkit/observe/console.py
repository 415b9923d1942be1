"""Records as lines of the program's own log, through loguru."""

import sys

import attrs
from loguru import logger

from loopkit.observe.display import amount, aside
from loopkit.observe.record import Record
from loopkit.observe.sink import Sink


@attrs.frozen
class Console(Sink):
    """A line for each record in your loguru log, as if your own code had logged it.

    Where a bar of `progress` stands on the terminal the line goes above it.

    Args:
        level: Of the lines.

    Example:
        >>> Console().line(Record(20, 1, 640, 0.0, {"loss": 0.51234, "note": "warm"}))
        'step 20  epoch 1  loss 0.512  note warm'
    """

    level: str = "INFO"

    def write(self, record: Record) -> None:
        """Log the line."""
        with aside():
            logger.opt(depth=_frames_of_ours()).log(self.level, "{}", self.line(record))

    def line(self, record: Record) -> str:
        """The record as text."""
        parts = [f"step {record.step}", f"epoch {record.epoch}"]
        for name, value in record.values.items():
            parts.append(f"{name} {value if isinstance(value, str) else amount(value)}")
        return "  ".join(parts)


def _frames_of_ours() -> int:
    """How many callers up the user's code is: loguru is told to be silent about ours."""
    depth, frame = 0, sys._getframe(1)  # noqa: SLF001
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "loopkit":
        depth, frame = depth + 1, frame.f_back
    return depth
