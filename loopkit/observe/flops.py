"""Counting the FLOPs that torch computes."""

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which also knows the CPU's attention kernel (torch 2.13 counts it as 0).

    Example:
        >>> with flop_counter() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> counter.get_total_flops()
        48
    """
    counter, aten = FlopCounterMode(display=False), torch.ops.aten
    for suffix in ("", "_backward"):
        known = getattr(aten, f"_scaled_dot_product_flash_attention{suffix}")
        alike = getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}", None)
        if alike is not None and known in counter.flop_registry:
            counter.flop_registry.setdefault(alike, counter.flop_registry[known])
    return counter
