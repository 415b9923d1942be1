"""Counting updates."""

from typing import Any

import attrs
from torch import Tensor

from loopkit.arriving import Arriving


@attrs.define
class Count:
    """Applied updates so far; saved with the state that keeps it.

    Attributes:
        updates: The count, less what is on its way; see `now`.
        arriving: Whether the last update counts, where a device decides that.

    Example:
        >>> count = Count(); count.load_state_dict({"updates": 3}); count
        Count(updates=3)
    """

    updates: int = 0
    arriving: Arriving | None = attrs.field(default=None, eq=False, repr=False)

    def add(self, applied: bool | Tensor) -> None:
        """Count an update if it was applied; what a device decided is asked for, not waited for.

        Example:
            >>> count = Count(); count.add(True); count.add(False); count.now()
            1
        """
        self.now()
        if isinstance(applied, Tensor) and applied.device.type != "cpu":
            self.arriving = Arriving.of(applied)
        else:
            self.updates += bool(applied)

    def now(self) -> int:
        """The count; where a device decided on the last update this waits until it has done it."""
        if self.arriving is not None:
            self.updates += bool(self.arriving.value())
            self.arriving = None
        return self.updates

    def __deepcopy__(self, memo: dict[int, Any]) -> "Count":
        return Count(self.now())  # events do not copy

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"updates": self.now()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count back."""
        self.updates, self.arriving = state_dict["updates"], None
