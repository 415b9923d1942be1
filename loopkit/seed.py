"""Seeding every source of random numbers."""

import os
import random
import sys

import torch

from loopkit.errors import UsageError


def seed_everything(
    seed: int, workers: bool = True, *, deterministic: bool | str | None = None
) -> torch.Generator | None:
    """Seed Python, NumPy, and torch on every device.

    DataLoader workers take their seeds from torch's generator, each its own, for
    torch, NumPy and Python, so they are seeded by this as well. But then shuffling and
    augmentation also depend on how many numbers the model drew before. The generator
    that is returned makes them depend on the seed and the epoch alone:
    `DataLoader(..., generator=seed_everything(0))`.

    Args:
        seed: From 0 to 2**32 - 1, which is what NumPy takes.
        workers: Return a generator for the loaders; None without.
        deterministic: True: only operations that give the same bits each time, an error for
            others, and no cudnn benchmark, which picks kernels by their time. `"warn"`: a
            warning in place of the error. False: as torch begins. None: nothing is changed.

    Raises:
        UsageError: For a seed outside that range, or another word.

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
    if deterministic is not None:
        _set_deterministic(deterministic)
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    return torch.Generator().manual_seed(seed) if workers else None


def _set_deterministic(wanted: bool | str) -> None:
    if wanted not in (True, False, "warn"):
        raise UsageError(
            f"lk.seed_everything(..., deterministic={wanted!r})",
            f"deterministic = {wanted!r}",
            'True, False or "warn"',
        )
    if wanted:
        torch.backends.cudnn.benchmark = False
        # Read when cuBLAS starts; it has no deterministic products without (CUDA 10.2 on)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(bool(wanted), warn_only=wanted == "warn")
