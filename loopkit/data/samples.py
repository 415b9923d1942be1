"""Random numbers by counters: each sample's own, whoever loads it and whatever was drawn before."""

import hashlib
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from loopkit.data.epoch import datasets_within, tell_epoch
from loopkit.errors import UsageError

Reseed = Callable[[int], object]


class Seeded(Dataset[Any]):
    """A dataset whose samples are drawn with random states of their own; made by `seeded`.

    Attributes:
        dataset: Where the samples come from.
        seed: Of all of them.
        also: What else is given the seed of each sample.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, also: tuple[Reseed, ...] = ()) -> None:
        import numpy as np

        self.dataset, self.seed, self.also = dataset, seed, also
        self._numpy = np.random.MT19937(0)
        epoch: Any = torch.zeros((), dtype=torch.int64)
        # Shared memory: workers that persist, or are spawned, see what is written here later
        self._epoch: torch.Tensor = epoch.share_memory_()

    @property
    def epoch(self) -> int:
        """What `set_epoch` said last."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other numbers for each sample; `run` calls it at the beginning of an epoch."""
        self._epoch.fill_(epoch)
        tell_epoch(datasets_within(self), epoch)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        words = sample_words(self.seed, self.epoch, index)
        if get_worker_info() is not None:  # where nobody else draws: nothing to put back
            self._reseed(words)
            return self.dataset[index]
        with _generators_kept(self._numpy):
            self._reseed(words)
            return self.dataset[index]

    def _reseed(self, words: tuple[int, int, int]) -> None:
        import numpy as np

        for_torch, for_python, for_numpy = words
        torch.default_generator.manual_seed(for_torch)  # torch.manual_seed visits every device
        random.seed(for_python)
        np.random.seed(for_numpy)
        for reseed in self.also:
            reseed(for_numpy)


def sample_words(seed: int, epoch: int, index: object) -> tuple[int, int, int]:
    """The seeds of a sample, for torch, Python and NumPy: 64, 64 and 32 bits of a hash.

    Example:
        >>> sample_words(0, 1, 2) == sample_words(0, 1, torch.tensor(2))
        True
        >>> sample_words(0, 1, 2) == sample_words(0, 2, 1)
        False
    """
    try:
        key: object = operator.index(index)  # type: ignore[arg-type]
    except TypeError:
        key = index
    digest = hashlib.blake2b(repr((seed, epoch, key)).encode(), digest_size=20).digest()
    cut = (digest[:8], digest[8:16], digest[16:])
    return tuple(int.from_bytes(word, "little") for word in cut)  # type: ignore[return-value]


@contextmanager
def _generators_kept(for_numpy: Any) -> Iterator[None]:
    """Put the process's generators back, which the model draws from as well.

    NumPy's is put aside for another one, not saved: reading its 624 words takes longer than
    all the rest. That forgets the second of a pair of normal numbers, if one was drawn before;
    always, so that a resumed run forgets it too.
    """
    import numpy.random

    numpy_random: Any = numpy.random
    python, on_cpu = random.getstate(), torch.default_generator.get_state()
    aside = numpy_random.get_bit_generator()
    numpy_random.set_bit_generator(for_numpy)
    try:
        yield
    finally:
        numpy_random.set_bit_generator(aside)
        torch.default_generator.set_state(on_cpu)
        random.setstate(python)


def seeded(dataset: Dataset[Any], *, seed: int, also: Reseed | tuple[Reseed, ...] = ()) -> Seeded:
    """The same dataset, where each sample's random numbers follow from (seed, epoch, index).

    So augmentation is the same bit for bit with any number of workers, any batch size and
    number of ranks, and after a resume; and another one in each epoch. While a sample is loaded
    the global generators of torch (CPU), Python and NumPy are seeded for it, and are afterwards
    as they were before. In a worker nothing else draws from them, so there they stay.
    It costs about 20 microseconds a sample in a worker, and 50 in the main process.

    `run` says which epoch it is, also to a dataset within a Subset or ConcatDataset. In a loop of
    your own call `set_epoch`. Workers that persist, and spawned ones, are told as well.

    Args:
        dataset: A map-style dataset. Its `__getitem__` is called for each sample, also where it has
            `__getitems__`, which makes many with one state.
        seed: Of this dataset; another one where two are concatenated.
        also: Called with each sample's seed, from 0 to 2**32 - 1: for generators of your own, such
            as Albumentations' `transform.set_random_seed`.

    Raises:
        UsageError: For a stream, whose samples have no index, or a seed that is no int.

    Example:
        >>> class Noise(Dataset):
        ...     def __len__(self):
        ...         return 3
        ...     def __getitem__(self, index):
        ...         return random.random(), torch.rand(())
        >>> data = seeded(Noise(), seed=0)
        >>> first = data[1]
        >>> data[1] == first, data[2] == first
        (True, False)
        >>> data.set_epoch(1); data[1] == first
        False

    Source: counters in place of states: Salmon et al., "Parallel random numbers: as easy as 1, 2,
    3", SC 2011.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError("lk.seeded(dataset, seed=...)", f"seed = {seed!r}", "an int")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            "lk.seeded(dataset, seed=...)",
            f"a {type(dataset).__name__}, whose samples have no index",
            "a map-style dataset, or in the stream random.Random(f'{seed} {epoch} {number}')",
        )
    return Seeded(dataset, seed, (also,) if callable(also) else tuple(also))
