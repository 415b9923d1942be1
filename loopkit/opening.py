"""Opening data at a position: an epoch's order again, without what was taken of it."""

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, IterableDataset

from loopkit.data.order import SINGLE, AtFirst, Dealt, Part, Share
from loopkit.position import (
    CPU,
    Position,
    index_name,
    lives,
    order_of,
    own_state,
    persists,
    refuse,
    restore_generators,
    same_place,
    set_epoch,
)
from loopkit.rng import rng_state, set_rng_state
from loopkit.window import Ahead


def opened(
    data: Iterable[Any], position: Position, epoch: int, batch: int
) -> tuple[Position, Iterator[Any]]:
    """An iterator over the rest of an epoch, or over a new one, and its position.

    Args:
        data: What is iterated over; an iterator goes on where it is.
        position: The last one: of this epoch if it was interrupted, or of the epoch before.
        epoch: Its number, which samplers and datasets are told.
        batch: Batches that each rank has taken of it.

    Raises:
        DataError: If the position is one in other batches; see `moved`.
    """
    set_epoch(data, epoch)
    if position.interrupted(epoch, batch) and not isinstance(data, Iterator):
        return position, reopened(data, position, batch)
    position = Position.beginning(data, position)
    return position, begun(data, position)


def begun(data: Iterable[Any], position: Position) -> Iterator[Any]:
    """An iterator over `data` from the beginning of an epoch.

    Args:
        data: What is iterated over.
        position: `Position.beginning(data)`. Where `data` is dealt to ranks all of them draw
            the order from its random states; those of the first rank go on from there.
    """
    if not isinstance(data, Part):
        unseeded = persists(data) and position.warm and not lives(data)
        return _passed_over(data, 0, position) if unseeded else iter(data)
    if data.order.counts == "share":
        return iter(data)
    own = rng_state(CPU)
    _go_to_start(data, position)
    batches = data.opened(0, _first_draws(data, position))
    if data.share.rank:
        set_rng_state(own, CPU)
    return batches


def read_again(batches: Ahead, position: Position, device: torch.device) -> None:
    """Read the batch that had been read ahead before, with the random numbers that it drew then."""
    if position.ahead is not None:
        now = rng_state(device)
        set_rng_state(position.ahead, device)
        batches.at_end  # noqa: B018  # asked, it reads
        set_rng_state(now, device)


def reopened(data: Iterable[Any], position: Position, taken: int) -> Iterator[Any]:
    """An iterator over `data` without the first `taken` batches, in the order of the epoch.

    Args:
        data: What is iterated over; not an iterator itself.
        position: How the epoch began.
        taken: Batches of it that each rank took.

    Raises:
        DataError: If the position is one in other batches; see `moved`.
    """
    now = rng_state(CPU)
    try:
        return _opened_there(data, position, taken)
    finally:
        set_rng_state(now, CPU)  # opening draws numbers, which the run has drawn before


def _opened_there(data: Iterable[Any], position: Position, taken: int) -> Iterator[Any]:
    order, own = order_of(data), own_state(data)
    if position.start is None:  # nothing is known but the batch
        position = attrs.evolve(position, size=order.size, counts=order.counts)
        position.world = order.share.world
    elif not same_place(order, position):
        refuse(order, position, taken)
    if position.loader is not None and hasattr(own, "load_state_dict"):
        own.load_state_dict(position.loader)
        position.loader = None
        return iter(data)
    _go_to_start(data, position)
    if isinstance(data, Part):
        return data.opened(position.taken(taken), _first_draws(data, position))
    return _passed_over(data, position.taken(taken), position)


def _go_to_start(data: object, position: Position) -> None:
    if position.start is not None:
        set_rng_state(position.start["rng"], CPU)
        restore_generators(data, position.start["generators"])


def _passed_over(data: Iterable[Any], taken: int, position: Position) -> Iterator[Any]:
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        batches = iter(data)
        for _ in itertools.islice(batches, taken):
            pass
        return batches
    loader, rest = dealing(data, SINGLE)
    if not persists(data):
        return rest.opened(loader, taken)
    if (workers := vars(data)["_iterator"]) is not None:
        vars(workers)["_index_sampler"] = rest
        vars(loader)["_iterator"] = workers
    batches = rest.opened(loader, taken, _first_draws(data, position))
    # Later epochs are read from the loader itself, by these workers, in its own order
    vars(batches)["_index_sampler"] = getattr(data, index_name(data))
    vars(data)["_iterator"] = batches
    return batches


def dealing(loader: DataLoader[Any], share: Share) -> tuple[DataLoader[Any], Dealt]:
    """A copy of a map-style loader that gives one rank's batches, and what deals them."""
    name = index_name(loader)
    dealt, dealing = Dealt(getattr(loader, name), share), copy.copy(loader)
    # DataLoader refuses to set it, lest its workers miss it; a copy without workers has none
    vars(dealing).update({name: dealt, "_iterator": None})
    return dealing, dealt


def _first_draws(data: object, position: Position) -> AtFirst | None:
    """What puts the generators where a loader with persisting workers had them when it shuffled.

    It draws a seed for its workers when it makes them, so in its first epoch only.
    """
    return functools.partial(_draw_at_first, data, position) if persists(data) else None


def _draw_at_first(data: object, position: Position) -> None:
    read: Any = data.read if isinstance(data, Part) else data
    _go_to_start(data, position)
    if not position.warm:
        torch.empty((), dtype=torch.int64).random_(generator=read.generator)
