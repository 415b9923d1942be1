"""Where a run is in its data, so that it goes on with the very batches that were left."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import attrs
import torch
from torch.utils.data import DataLoader, IterableDataset

from loopkit.data.epoch import datasets_within, tell_epoch
from loopkit.data.order import SINGLE, Order, Part, Share, sample_order
from loopkit.errors import CheckpointWarning, DataError
from loopkit.plain import is_stateful
from loopkit.rng import rng_state

CPU = torch.device("cpu")  # loaders and samplers draw there
PLAIN = ("size", "counts", "world", "at", "items", "within", "total", "warm")


@attrs.define
class Position:
    """How an epoch of some data began, and how the data can be opened there again.

    The order of a shuffled epoch follows from the random numbers at its beginning; so
    these are kept (a few kilobytes), and the epoch is opened with them again. What was
    taken before is passed over in the sampler: no sample is loaded for it. A loader with a
    `state_dict` of its own is asked for it instead. Workers that persist are made anew; in
    later epochs they draw other numbers then, unless the dataset is `seeded`.

    Where a batch sampler is torch's own the position counts samples, else batches, of
    the one order that all ranks share: `items + (batch - at) * world * size`. So an epoch goes
    on exactly on another number of ranks, and with another batch size.

    Attributes:
        start: Random states at the beginning of the epoch.
        generators: The states of the loader's own generators, now.
        loader: The loader's own state dict, if it has one.
        size: The loader's batch size.
        counts: What `items` are: `"samples"`, `"batches"`, or batches of each rank's `"share"`.
        world: The ranks that the order is dealt to.
        at: The batch of each rank at which this counting began.
        items: How much of the order was gone then.
        within: The epoch that it was in then; None if this counts from an epoch's beginning.
        total: Samples or batches of the epoch, if known.
        warm: Whether workers that persist were there when the epoch began: a loader draws no
            seed for them then.
        live: Whether they were there when this was saved.
        ahead: The random states of this process before it read the batch that comes next, where
            that was read already, and here. They are each rank's own: see `random`.
    """

    start: dict[str, Any] | None = None
    generators: list[torch.Tensor] | None = None
    loader: dict[str, Any] | None = None
    size: int | None = None
    counts: str = "batches"
    world: int = 1
    at: int = 0
    items: int = 0
    within: int | None = None
    total: int | None = None
    warm: bool = False
    live: bool = False
    ahead: dict[str, Any] | None = None

    @classmethod
    def beginning(cls, data: object, before: "Position | None" = None) -> "Position":
        """The position before the first batch of an epoch; on all ranks the one of the first.

        Args:
            data: What is about to be iterated over.
            before: The position of the epoch before, as it may have been restored.
        """
        if type(data) in {list, tuple, range}:  # whose order draws no numbers
            return cls()
        start = {"rng": rng_state(CPU), "generators": _states(data)}
        if isinstance(data, Part) and data.share_start is not None:
            start = data.share_start(start)
        order = order_of(data)
        return cls(
            start,
            size=order.size,
            counts=order.counts,
            world=order.share.world,
            total=order.total,
            warm=lives(data) or (before is not None and before.live),
        )

    def keep(self, data: object, device: torch.device) -> None:
        """Note where the data is, and what it may draw from, before more is read of it."""
        self.loader = _told(own_state(data))
        self.ahead = rng_state(device) if _is_read_here(data) else None

    def now(self, data: object) -> dict[str, Any]:
        """The position as plain data, for a checkpoint."""
        loader = _told(own_state(data)) if self.loader is None else self.loader
        generators = self.generators if data is None else _states(data)
        plain = {name: getattr(self, name) for name in PLAIN}
        live = self.live if data is None else lives(data)
        return {
            "start": self.start, "generators": generators, "loader": loader, "live": live, **plain
        }  # fmt: skip

    def random(self) -> dict[str, Any]:
        """What a checkpoint of the random states needs beside those of now."""
        return {} if self.ahead is None else {"ahead": self.ahead}

    def interrupted(self, epoch: int, batch: int) -> bool:
        """Whether something of this epoch was taken: a part of the first batch, if now larger."""
        return bool(batch) or (self.within == epoch and self.at == 0)

    def taken(self, batch: int) -> int:
        """Samples or batches of the order that are gone when each rank has taken `batch` batches.

        Example:
            >>> Position(size=4, counts="samples", world=2).taken(3)
            24
        """
        each = (self.size or 1) if self.counts == "samples" else 1
        return self.items + (batch - self.at) * each * (1 if self.counts == "share" else self.world)


def order_of(data: object) -> Order:
    """What a position in `data` counts."""
    if isinstance(data, Part):
        return data.order
    size = getattr(data, "batch_size", None)
    if is_stateful(data):
        return Order("share", size)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        return sampler_order(getattr(data, index_name(data)), size)
    return Order("batches", size, total=_length(data))


def sampler_order(batches: Any, size: int | None, share: Share = SINGLE) -> Order:
    """What a position in a map-style loader counts."""
    if not sample_order(batches):
        known = getattr(batches, "batch_size", None) if size is None else size
        return Order("batches", known if type(known) is int else None, share, _length(batches))
    return Order("samples", batches.batch_size, share, _length(batches.sampler), batches.drop_last)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def moved(data: object, position: Position, batch: int, epoch: int = 0) -> int:
    """The batches that each rank has taken, as `data` counts them, after a restore.

    With as many ranks and as large batches as before they are `batch`. Otherwise the position
    is noted as a count of samples, and the batches are those of the whole epoch
    without the ones that are left: ceil(23 / 4) - ceil((23 - 16) / 4) = 4.

    Args:
        data: What the epoch goes on with.
        position: Of the epoch that was interrupted; changed in place.
        batch: Batches that were taken of it by each rank.
        epoch: Its number.

    Raises:
        DataError: If the place cannot be found in this data.
    """
    if isinstance(data, Iterator) and position.interrupted(epoch, batch):
        _warn_of_iterator(epoch, batch)
    order = order_of(data)
    if position.start is None:  # of a list: nothing is known but the batches
        position.counts, position.size = order.counts, order.size
    if not position.interrupted(epoch, batch) or same_place(order, position):
        return batch
    movable = order.counts == "samples" or (
        order.counts == "batches" and order.size == position.size
    )
    if not movable or order.counts != position.counts or _of_another_size(order, position):
        refuse(order, position, batch)
    taken = position.taken(batch)
    whole, left = order.rounds_after(0), order.rounds_after(taken)
    position.at = taken // order.share.world if whole is None or left is None else whole - left
    position.items, position.size, position.world = taken, order.size, order.share.world
    position.within = epoch
    return position.at


def _warn_of_iterator(epoch: int, batch: int) -> None:
    warnings.warn(
        f"run(step, state, data) goes on after batch {batch} of epoch {epoch}, with an iterator"
        " wherever that is; data that can be iterated anew is passed over up to there"
        " (state.batch = 0 says that the iterator is where it should be)",
        CheckpointWarning,
        stacklevel=2,
    )


def same_place(order: Order, position: Position) -> bool:
    """Whether a position counts what this order counts, by the same steps."""
    now = (order.counts, order.size, order.share.world)
    before = (position.counts, position.size, position.world)
    return now == before and not _of_another_size(order, position)


def _of_another_size(order: Order, position: Position) -> bool:
    """Whether the data has grown, or is other data: its epoch has another order then."""
    return None not in (order.total, position.total) and order.total != position.total


def refuse(order: Order, position: Position, batch: int) -> NoReturn:
    """Say that a place in other batches cannot be found in these.

    Raises:
        DataError: Always.
    """

    def described(size: int | None, counts: str, total: int | None, world: int) -> str:
        of = "a size that is not known" if size is None else f"{size} samples"
        return f"of {of} (counted: {counts}, in all: {total}, ranks: {world})"

    now = described(order.size, order.counts, order.total, order.share.world)
    before = described(position.size, position.counts, position.total, position.world)
    raise DataError(
        f"going on after batch {batch} of an epoch",
        f"batches {now}, where they were {before}",
        "the dataset, batch size, sampler and ranks from before until the epoch is over,"
        " or state.batch = 0 to begin it anew",
    )


def persists(data: object) -> bool:
    """Whether the workers of a loader outlive an epoch."""
    read: Any = data.read if isinstance(data, Part) else data
    torchs_own = isinstance(read, DataLoader) and not is_stateful(read)
    return torchs_own and bool(read.persistent_workers)


def lives(data: object) -> bool:
    """Whether the loader has workers that persist, which were made for an earlier epoch."""
    read = data.read if isinstance(data, Part) else data
    return persists(data) and getattr(read, "_iterator", None) is not None


def index_name(loader: DataLoader[Any]) -> str:
    """The name of what gives a map-style loader its indices: a sampler if it makes no batches."""
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


def own_state(data: Any) -> Any:
    """What may hold the position in its own `state_dict`."""
    return data.stateful if isinstance(data, Part) else data


def _told(data: object) -> dict[str, Any] | None:
    """Where data with a state of its own says that it is; None if it only counts.

    Torchdata's loader does no more over a stream that has no state. What it then reads again it
    counts twice (0.11), so a run that is resumed a second time would lose samples; the batches
    that were taken are counted here as well, and passed over.
    """
    state = data.state_dict() if is_stateful(data) else None
    if state is None or not isinstance(data, DataLoader):
        return state
    within = state.get("_snapshot", {}).get("_worker_snapshots", {"this process": state})
    return None if all(map(_has_no_place, within.values())) else state


def _has_no_place(reader: Mapping[str, Any]) -> bool:
    stream = reader.get("fetcher_state") or {"dataset_iter_state": "of no stream"}
    return stream.get("dataset_iter_state") is None and reader.get("dataset_state") is None


def _is_read_here(data: object) -> bool:
    """Whether samples are made in this process, and may draw from its generators."""
    read = data.read if isinstance(data, Part) else data
    return not isinstance(read, Iterator) and not getattr(read, "num_workers", 0)


def generators_of(data: object) -> list[torch.Generator]:
    """The random generators that a loader and its samplers have of their own."""
    data = data.read if isinstance(data, Part) else data
    batch_sampler = getattr(data, "batch_sampler", None)
    owners = (data, getattr(data, "sampler", None), getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    own = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return [*own.values()]


def _states(data: object) -> list[torch.Tensor]:
    return [generator.get_state() for generator in generators_of(data)]


def restore_generators(data: object, states: Iterable[torch.Tensor]) -> None:
    """Put the loader's own generators into these states."""
    for generator, state in zip(generators_of(data), states, strict=False):
        generator.set_state(state)


def take_up(data: object, position: Position) -> None:
    """Put the generators of `data` where they were when the position was saved."""
    if position.generators is not None:
        restore_generators(data, position.generators)


def set_epoch(data: Any, epoch: int) -> None:
    """Tell samplers and datasets that ask for it which epoch it is (`set_epoch`).

    Those of a loader and of its batch sampler, and datasets within a Subset or ConcatDataset.
    """
    data = data.read if isinstance(data, Part) else data
    batch_sampler = getattr(data, "batch_sampler", None)
    samplers = [getattr(data, "sampler", None), batch_sampler]
    samplers.append(getattr(batch_sampler, "sampler", None))
    tell_epoch([data, *samplers, *datasets_within(data)], epoch)
