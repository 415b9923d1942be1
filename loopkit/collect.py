"""Joining what `predict` yields: the outputs of all batches as one, on the host."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopkit.errors import DataError, UsageError
from loopkit.nested import children_of, map_container, map_tensors


def collect(outputs: Iterable[Any]) -> Any:
    """Join the outputs of all batches into one of the same form, on the host.

    Tensors and arrays are joined along their first dimension, and lists (and tuples of texts) end
    to end. Mappings, tuples and dataclasses keep their form. What has no samples in it comes once
    for each batch: a 0-d tensor in a tensor of shape `(batches,)`, anything else in a list. Each
    output is moved to the host as it comes, so that the device holds one at a time.

    On several ranks `predict` yields the outputs of all on each; all have to go through them.

    Args:
        outputs: What `predict` yields, or any other iterable of outputs of one form.

    Raises:
        UsageError: For a single output in the place of many.
        DataError: If there are none, if their forms differ, or sizes beyond the first do.

    Example:
        >>> batches = [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])]
        >>> collect({"sum": batch.sum(1), "largest": batch.max()} for batch in batches)
        {'sum': tensor([ 3,  7, 11]), 'largest': tensor([4, 6])}

    Source: https://huggingface.co/docs/transformers/internal/trainer_utils
    """
    if not isinstance(outputs, Iterable) or isinstance(outputs, Tensor | Mapping | str):
        raise UsageError(
            "lk.collect(outputs)",
            f"a {type(outputs).__name__}, which is no iterable of the outputs of batches",
            "lk.collect(lk.predict(step, state, loader))",
        )
    parts = [map_tensors(_to_host, output) for output in outputs]
    if not parts:
        raise DataError("lk.collect(outputs)", "no outputs", "those of one batch at least")
    return _joined(parts, "output")


def _to_host(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf.to("cpu")


def _joined(parts: list[Any], name: str) -> Any:
    """What the outputs have under one name, as one."""
    first = parts[0]
    _check_alike(parts, name)
    if _is_sequence(first):
        return [item for part in parts for item in part]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else torch.stack(parts)
    if _is_array(first):
        numpy = sys.modules["numpy"]  # who has an array has imported it
        return numpy.concatenate(parts) if first.ndim else numpy.stack(parts)
    inside = children_of(first)
    if inside is None:
        return parts
    children = [children_of(part) or {} for part in parts]
    joined = iter([_joined([c[key] for c in children], f"{name}[{key!r}]") for key in inside])
    return map_container(lambda _: next(joined), first)


def _check_alike(parts: list[Any], name: str) -> None:
    forms = [_form(part) for part in parts]
    other = next((i for i, form in enumerate(forms) if form != forms[0]), None)
    if other is not None:
        raise DataError(
            "lk.collect(outputs)",
            f"{name} as {forms[0]} in batch 0, and as {forms[other]} in batch {other}",
            "outputs of one form; tensors of unequal sizes padded to one in the step function, or"
            " as a list with an item for each sample, [*tensor], which is joined end to end",
        )


def _form(part: Any) -> str:
    """What has to agree in all batches, in words."""
    kind = f"a {type(part).__name__}"
    if isinstance(part, Tensor) or _is_array(part):
        sizes = ", ".join(["*", *map(str, part.shape[1:])])
        return f"{kind} of shape ({sizes})" if part.ndim else f"{kind} without a dimension"
    if _is_sequence(part):
        return "a list"
    inside = children_of(part)
    return "no tensor" if inside is None else f"{kind} of {sorted(map(str, inside))}"


def _is_sequence(part: Any) -> bool:
    """Whether it has an item for each sample: a list, or the tuple of texts of a collate."""
    texts = isinstance(part, tuple) and part and all(isinstance(item, str) for item in part)
    return isinstance(part, list) or bool(texts)


def _is_array(part: Any) -> bool:
    return type(part).__module__ == "numpy" and hasattr(part, "ndim")
