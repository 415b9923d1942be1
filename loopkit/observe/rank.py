"""Which process writes."""

import os

import torch


def is_main_rank() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one.

    Example:
        >>> is_main_rank()
        True
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # launched by torchrun, and not joined yet
