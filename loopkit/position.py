"""Where a run is in its data, so that it goes on with the very batches that were left."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, IterableDataset

from loopkit.errors import DataError
from loopkit.plain import is_stateful
from loopkit.rng import rng_state, set_rng_state

_CPU = torch.device("cpu")  # loaders and samplers draw there


@attrs.define
class Position:
    """How an epoch of some data began, and how the data can be opened there again.

    The order of a shuffled epoch follows from the random numbers at its beginning; so
    these are kept (a few kilobytes), and the epoch is opened with them again. The batches
    that were taken before are passed over in the sampler: no sample is loaded for them.
    A loader with a `state_dict` of its own is asked for it instead. Workers that persist over
    epochs cannot be gone on with: theirs begin anew, and so does the shuffling of later epochs.

    Attributes:
        start: Random states at the beginning of the epoch.
        generators: The states of the loader's own generators, now.
        loader: The loader's own state dict, if it has one.
        size: The loader's batch size.
    """

    start: dict[str, Any] | None = None
    generators: list[torch.Tensor] | None = None
    loader: dict[str, Any] | None = None
    size: int | None = None

    @classmethod
    def beginning(cls, data: object) -> "Position":
        """The position before the first batch of an epoch."""
        if type(data) in {list, tuple, range}:  # whose order draws no numbers
            return cls()
        start = {"rng": rng_state(_CPU), "generators": _states(data)}
        return cls(start, size=getattr(data, "batch_size", None))

    def keep(self, data: object) -> None:
        """Note the state of a loader that has one, before more is read than was trained on."""
        if is_stateful(data):
            self.loader = data.state_dict()

    def now(self, data: object) -> dict[str, Any]:
        """The position as plain data, for a checkpoint."""
        loader = data.state_dict() if self.loader is None and is_stateful(data) else self.loader
        generators = self.generators if data is None else _states(data)
        return {
            "start": self.start, "generators": generators, "loader": loader, "size": self.size
        }  # fmt: skip


def reopened(data: Iterable[Any], position: Position, taken: int) -> Iterator[Any]:
    """An iterator over `data` without its first `taken` batches, in the order of the epoch.

    Args:
        data: What is iterated over; not an iterator itself.
        position: How the epoch began.
        taken: Batches of it that were taken.

    Raises:
        DataError: If the batches have another size now, so that `taken` of them are others.
    """
    now = rng_state(_CPU)
    try:
        return _opened_there(data, position, taken)
    finally:
        set_rng_state(now, _CPU)  # opening draws numbers, which the run has drawn before


def _opened_there(data: Iterable[Any], position: Position, taken: int) -> Iterator[Any]:
    if position.loader is not None and hasattr(data, "load_state_dict"):
        data.load_state_dict(position.loader)
        position.loader = None
        return iter(data)
    size = getattr(data, "batch_size", None)
    if size != position.size and None not in (size, position.size):
        raise DataError(
            f"going on after batch {taken} of an epoch",
            f"batches of {size} samples, where they were of {position.size}",
            "the batch size from before until the epoch is over, or state.batch = 0 to begin anew",
        )
    if position.start is not None:
        set_rng_state(position.start["rng"], _CPU)
        _restore(data, position.start["generators"])
    return _passed_over(data, taken)


def _passed_over(data: Iterable[Any], taken: int) -> Iterator[Any]:
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        batches = iter(data)
        for _ in itertools.islice(batches, taken):
            pass
        return batches
    loader = copy.copy(data)
    name = "sampler" if data.batch_sampler is None else "batch_sampler"
    rest = Rest(getattr(data, name), taken)
    # DataLoader refuses to set it, lest its workers miss it; a copy without workers has none
    vars(loader).update({name: rest, "_iterator": None, "persistent_workers": False})
    batches = iter(loader)
    rest.begin()
    return batches


class Rest:
    """A sampler without its first items, which are passed over when it is first asked.

    Not before: a loader draws the seed of its workers between making the sampler's
    iterator and asking it, and the order of draws has to stay.
    """

    def __init__(self, sampler: Any, taken: int) -> None:
        self._sampler, self._taken = sampler, taken
        self._items: Iterator[Any] | None = None
        self._first: list[Any] = []

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._taken)

    def __iter__(self) -> Iterator[Any]:
        self._items = itertools.islice(iter(self._sampler), self._taken, None)
        return self

    def __next__(self) -> Any:
        assert self._items is not None
        return self._first.pop() if self._first else next(self._items)

    def begin(self) -> None:
        """Pass over the first items now; a loader with workers has done so already."""
        if self._items is not None and not self._first:
            self._first.extend(itertools.islice(self._items, 1))


def generators_of(data: object) -> list[torch.Generator]:
    """The random generators that a loader and its samplers have of their own."""
    batch_sampler = getattr(data, "batch_sampler", None)
    owners = (data, getattr(data, "sampler", None), getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    own = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return [*own.values()]


def _states(data: object) -> list[torch.Tensor]:
    return [generator.get_state() for generator in generators_of(data)]


def _restore(data: object, states: Iterable[torch.Tensor]) -> None:
    for generator, state in zip(generators_of(data), states, strict=False):
        generator.set_state(state)


def take_up(data: object, position: Position) -> None:
    """Put the generators of `data` where they were when the position was saved."""
    if position.generators is not None:
        _restore(data, position.generators)


def set_epoch(data: Any, epoch: int) -> None:
    """Tell samplers and datasets that ask for it which epoch it is (`set_epoch`)."""
    for part in (data, *(getattr(data, n, None) for n in ("sampler", "batch_sampler", "dataset"))):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
