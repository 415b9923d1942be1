"""Seeding every source of random numbers."""

import random
import sys

import torch

from loopkit.errors import UsageError


def seed_everything(seed: int, workers: bool = True) -> torch.Generator | None:
    """Seed Python, NumPy, and torch on every device.

    DataLoader workers take their seeds from torch's generator, each its own, for
    torch, NumPy and Python, so they are seeded by this as well. But then shuffling and
    augmentation also depend on how many numbers the model drew before. The generator
    that is returned makes them depend on the seed and the epoch alone:
    `DataLoader(..., generator=seed_everything(0))`.

    Args:
        seed: From 0 to 2**32 - 1, which is what NumPy takes.
        workers: Return a generator for the loaders; None without.

    Raises:
        UsageError: For a seed outside that range.

    Example:
        >>> _ = seed_everything(0); a = torch.rand(1)
        >>> _ = seed_everything(0); torch.equal(a, torch.rand(1))
        True

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UsageError(
            f"lk.seed_everything({seed!r})", f"seed = {seed!r}", "an int from 0 to 2**32 - 1"
        )
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    return torch.Generator().manual_seed(seed) if workers else None
