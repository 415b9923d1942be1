"""Counting updates."""

from typing import Any

import attrs


@attrs.define
class Count:
    """Applied updates so far; saved with the state that keeps it.

    Example:
        >>> count = Count(); count.load_state_dict({"updates": 3}); count
        Count(updates=3)
    """

    updates: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count back."""
        self.updates = state_dict["updates"]
