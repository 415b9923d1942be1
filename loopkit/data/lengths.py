"""Batches of samples of like lengths, so that little of a batch is padding."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from loopkit.check import at_least_one
from loopkit.data.samples import sample_words
from loopkit.errors import UsageError


class LengthBatches(Sampler[list[int]]):
    """A batch sampler that puts samples of like lengths together; made by `group_by_length`.

    Its order follows from the seed and the epoch alone.

    Attributes:
        batch_size: Samples in a batch.
        epoch: What `set_epoch` said last.
    """

    def __init__(
        self, lengths: Tensor, batch_size: int, seed: int, pool: int, neighbours: int,
        *, drop_last: bool,
    ) -> None:  # fmt: skip
        self._lengths, self.batch_size, self._seed, self.epoch = lengths, batch_size, seed, 0
        self._pool, self._neighbours, self._drop_last = pool, neighbours, drop_last

    def set_epoch(self, epoch: int) -> None:
        """Shuffle otherwise; `run` calls it at the beginning of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        count, size = len(self._lengths), self.batch_size
        return count // size if self._drop_last else -(-count // size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(sample_words(self._seed, self.epoch, "order")[0])
        shuffled = torch.randperm(len(self._lengths), generator=generator)
        by_length = [
            pool[self._lengths[pool].argsort(descending=True, stable=True)].tolist()
            for pool in torch.split(shuffled, self._pool * self.batch_size)
        ]
        batches = [*_chunks([*itertools.chain(*by_length)], self.batch_size)]
        if self._drop_last and len(batches[-1]) < self.batch_size:
            batches.pop()
        runs = [*_chunks(batches, self._neighbours)]
        for run in torch.randperm(len(runs), generator=generator).tolist():
            yield from runs[run]


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def group_by_length(
    lengths: Sequence[int] | Tensor,
    batch_size: int,
    *,
    seed: int = 0,
    pool: int = 50,
    neighbours: int = 1,
    drop_last: bool = False,
) -> LengthBatches:
    """A batch sampler whose batches hold samples of like lengths, in an order that is random.

    The samples are shuffled and cut into pools; each pool is sorted by length and cut into batches;
    and these are shuffled. So each sample comes once in an epoch, and with a larger pool
    there is less padding and less chance in what comes together. The order follows from (seed,
    epoch): it draws from no generator, a run goes on in it exactly, and ranks deal it out.

    Args:
        lengths: Of each sample of the dataset: `[len(row["input_ids"]) for row in dataset]`.
        batch_size: Samples in a batch.
        seed: Of the order.
        pool: Batches in a pool.
        neighbours: Batches of one pool that stay together. With the number of ranks all of them
            have batches of like lengths, and wait less for each other.
        drop_last: Leave out the one batch that has fewer samples.

    Returns:
        For `DataLoader(dataset, batch_sampler=...)`.

    Raises:
        UsageError: For lengths that are none, and for sizes below 1.

    Example:
        >>> batches = group_by_length([5, 1, 5, 1], batch_size=2)
        >>> sorted(sorted(batch) for batch in batches)
        [[0, 2], [1, 3]]

    Source: the bucketing of Khomenko et al., "Accelerating recurrent neural network training using
    sequence bucketing and multi-GPU data parallelization", arXiv:1708.05604, with shuffled pools.
    """
    call = "group_by_length(lengths, batch_size)"
    for name, value in (("batch_size", batch_size), ("pool", pool), ("neighbours", neighbours)):
        at_least_one(call, name, value)
    try:
        known = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            call, f"{type(lengths).__name__} as the lengths", "a list of ints"
        ) from error
    if known.ndim != 1 or len(known) == 0:
        raise UsageError(call, f"lengths of shape {tuple(known.shape)}", "one int for each sample")
    return LengthBatches(known, batch_size, seed, pool, neighbours, drop_last=drop_last)
