"""Telling samplers and datasets which epoch it is."""

from collections.abc import Iterable
from typing import Any


def tell_epoch(parts: Iterable[Any], epoch: int) -> None:
    """Call `set_epoch` of each part that has it, once."""
    for part in {id(part): part for part in parts}.values():
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def datasets_within(holder: Any) -> list[Any]:
    """The datasets that a loader, a Subset or a ConcatDataset holds, and those within them.

    One that has `set_epoch` tells those within itself.

    Example:
        >>> from torch.utils.data import ConcatDataset, Subset
        >>> datasets_within(Subset(ConcatDataset([[1], [2]]), [0]))[1:]
        [[1], [2]]
    """
    held = [getattr(holder, "dataset", None), *(getattr(holder, "datasets", None) or ())]
    found = []
    for dataset in held:
        if dataset is not None:
            found.append(dataset)
            if not callable(getattr(dataset, "set_epoch", None)):
                found += datasets_within(dataset)
    return found
