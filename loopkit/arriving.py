"""A number on its way from a device to the host."""

from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Arriving:
    """A number that a device was asked for, which is read later; made by `Arriving.of`.

    To read a tensor of a device waits until that has done all it was given. A copy into page-locked
    memory does not: it is there once the device has come to it, which an event says.

    Attributes:
        there: Host memory that the number is copied to.
        arrived: The event of its arrival.
    """

    there: Tensor
    arrived: Any

    @classmethod
    def of(cls, number: Tensor) -> "Arriving":
        """Ask for a 0-d tensor of an accelerator as it is now, without waiting."""
        there = torch.empty_like(number, device="cpu", pin_memory=number.is_cuda)
        there.copy_(number, non_blocking=True)
        arrived = torch.Event(number.device)
        arrived.record(torch.accelerator.current_stream(number.device))
        return cls(there, arrived)

    def value(self) -> Any:
        """The number; waits for it alone, not for what the device was given after it."""
        self.arrived.synchronize()
        return self.there.item()
