"""Updates that were skipped in a row, counted without waiting for a device."""

from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.arriving import Arriving

LOOK_EVERY = 64  # updates; a number that set out so long ago has arrived


@attrs.define
class Skips:
    """How many updates in a row were skipped, up to the last one; a state holds it.

    Where the optimizer decides on the device whether it skips, the count is kept there, by one
    small kernel for each update, `count = skipped * (count + 1)`, and read every 64 updates, as it
    was 64 updates before: on all ranks at the same one.

    Attributes:
        in_a_row: The count, as far as the host knows it.
    """

    in_a_row: int = 0
    _last: int | None = None
    _on_device: Tensor | None = None
    _arriving: Arriving | None = None

    def count(self, state: Any) -> int:
        """Count the last update of a state, once however often it is told; the count so far.

        Updates that it is not told of were applied. One over nothing neither counts nor ends
        what was counted.

        Example:
            >>> from types import SimpleNamespace as Space
            >>> outcome = Space(is_empty=lambda: False)
            >>> skips, skipped = Skips(), {"applied": False, "outcome": outcome}
            >>> [skips.count(Space(step=step, **skipped)) for step in (1, 2, 2, 3, 5)]
            [1, 2, 2, 3, 1]
        """
        step, applied = state.step, state.applied
        if step == self._last:
            return self.in_a_row
        follows, self._last = self._last == step - 1, step
        if state.outcome.is_empty():
            self.in_a_row *= follows
        elif isinstance(applied, Tensor) and applied.device.type != "cpu":
            self._count_on_device(step, state.verdict)
        else:
            self.in_a_row = 0 if applied else self.in_a_row * follows + 1
        return self.in_a_row

    def _count_on_device(self, step: int, verdict: Tensor | None) -> None:
        if verdict is None:  # an optimizer's own decision
            return
        if self._on_device is None:
            self._on_device = torch.zeros_like(verdict)
        count = torch.addcmul(verdict, verdict, self._on_device, out=self._on_device)
        if step % LOOK_EVERY:
            return
        if self._arriving is not None:
            self.in_a_row = int(self._arriving.value())
        self._arriving = Arriving.of(count)
