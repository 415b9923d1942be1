"""Batches of samples of unequal lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from loopkit.check import at_least_one, one_of
from loopkit.errors import UsageError

Pad = float | Mapping[Any, float]


@attrs.frozen
class PadCollate:
    """A `collate_fn` that pads; made by `pad_collate`.

    Attributes:
        pad: What is put in, for all fields or by name.
        mask: The name of the field that says what is real.
        multiple_of: Of which the padded length is a multiple.
        side: Where it is put.
    """

    pad: Pad
    mask: str | None
    multiple_of: int
    side: str

    def __call__(self, samples: Sequence[Any]) -> Any:
        """The batch of these samples."""
        first = samples[0]
        if isinstance(first, Mapping):
            return self._mapping(samples)
        if isinstance(first, tuple):
            fields = [
                self._field(i, [*field]) for i, field in enumerate(zip(*samples, strict=True))
            ]
            return type(first)(*fields) if hasattr(first, "_fields") else tuple(fields)
        return self._field(None, samples)

    def _mapping(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = {name: self._field(name, [s[name] for s in samples]) for name in samples[0]}
        if self.mask is not None:
            padded = next((n for n in samples[0] if _is_sequence(samples[0][n])), None)
            if padded is None or self.mask in batch:
                raise UsageError(
                    f"pad_collate(mask={self.mask!r})",
                    f"samples with the fields {[*batch]}",
                    "samples with a field to pad, and a name for the mask that is none of theirs",
                )
            ones = [torch.ones(len(s[padded]), dtype=torch.bool) for s in samples]
            batch[self.mask] = self._padded(ones, 0)
        return batch

    def _field(self, name: object, values: Sequence[Any]) -> Any:
        if not _is_sequence(values[0]):
            return default_collate([*values])
        pad = self.pad if not isinstance(self.pad, Mapping) else self.pad.get(name, 0)
        return self._padded([torch.as_tensor(value) for value in values], pad)

    def _padded(self, values: list[Tensor], pad: float) -> Tensor:
        longest = max(len(value) for value in values)
        if missing := -longest % self.multiple_of:
            i = max(range(len(values)), key=lambda i: len(values[i]))
            filler = values[i].new_full((missing, *values[i].shape[1:]), pad)
            pair = [values[i], filler] if self.side == "right" else [filler, values[i]]
            values[i] = torch.cat(pair)
        return pad_sequence(values, batch_first=True, padding_value=pad, padding_side=self.side)


def _is_sequence(value: object) -> bool:
    """Whether it has a length to pad: a tensor or array with a dimension, or a list of numbers."""
    if isinstance(value, list):
        return not value or isinstance(value[0], int | float)
    return getattr(value, "ndim", 0) > 0


def pad_collate(
    pad: Pad = 0, *, mask: str | None = None, multiple_of: int = 1, side: str = "right"
) -> PadCollate:
    """A `collate_fn` for a loader over samples of unequal lengths: each field is padded.

    A field is an item of a tuple or a mapping, or the sample itself. Tensors, arrays and lists of
    numbers are padded in their first dimension to the longest of the batch, (length, ...) to
    (batch, longest, ...), by torch's `pad_sequence`; all else goes to `default_collate`.

    Args:
        pad: What is put in; by the name (or number) of the field where they differ, and 0
            for those that are not named: `{"labels": -100}`.
        mask: Adds a field of this name to mappings, (batch, longest): True where the first
            padded field is real.
        multiple_of: Pad further, to a multiple: 8 suits matrix units, and fewer shapes
            suit `torch.compile`.
        side: `"right"` or `"left"`, for models that generate.

    Raises:
        UsageError: For a side or a multiple that cannot be, or a mask without a padded field.

    Example:
        >>> collate = pad_collate({"labels": -100}, mask="mask")
        >>> batch = collate([{"ids": [5, 6], "labels": [6, 7]}, {"ids": [8], "labels": [9]}])
        >>> batch["ids"].tolist(), batch["labels"].tolist()
        ([[5, 6], [8, 0]], [[6, 7], [9, -100]])
        >>> batch["mask"].tolist()
        [[True, True], [True, False]]

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.rnn.pad_sequence.html
    """
    call = "lk.pad_collate(...)"
    at_least_one(call, "multiple_of", multiple_of)
    one_of(call, "side", side, ("right", "left"))
    return PadCollate(pad, mask, multiple_of, side)
