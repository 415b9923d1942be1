"""Norms over many tensors, some of which may be spread over ranks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def total_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all tensors together, DTensors of several meshes among them.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    meshes: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        meshes.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    if not meshes:
        return torch.tensor(0.0)  # as torch has it where there is no gradient
    norms: list[Any] = [nn.utils.get_total_norm(held, norm_type) for held in meshes.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    found: Tensor = torch.linalg.vector_norm(torch.stack(whole), norm_type)
    return whole[0] if len(whole) == 1 else found
