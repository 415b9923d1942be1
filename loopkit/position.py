"""Where a run is in its data, so that it goes on with the very batches that were left."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import attrs
import torch
from torch.utils.data import DataLoader, IterableDataset

from loopkit.data.order import SINGLE, Dealt, Order, Part, Share, sample_order
from loopkit.errors import DataError
from loopkit.plain import is_stateful
from loopkit.rng import rng_state, set_rng_state

_CPU = torch.device("cpu")  # loaders and samplers draw there


@attrs.define
class Position:
    """How an epoch of some data began, and how the data can be opened there again.

    The order of a shuffled epoch follows from the random numbers at its beginning; so
    these are kept (a few kilobytes), and the epoch is opened with them again. What was
    taken before is passed over in the sampler: no sample is loaded for it. A loader with a
    `state_dict` of its own is asked for it instead.

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
    """

    start: dict[str, Any] | None = None
    generators: list[torch.Tensor] | None = None
    loader: dict[str, Any] | None = None
    size: int | None = None
    counts: str = "batches"
    world: int = 1
    at: int = 0
    items: int = 0

    @classmethod
    def beginning(cls, data: object) -> "Position":
        """The position before the first batch of an epoch; on all ranks the one of the first."""
        if type(data) in {list, tuple, range}:  # whose order draws no numbers
            return cls()
        start = {"rng": rng_state(_CPU), "generators": _states(data)}
        if isinstance(data, Part) and data.share_start is not None:
            start = data.share_start(start)
        order = order_of(data)
        return cls(
            start,
            size=order.size,
            counts=order.counts,
            world=order.share.world,
        )

    def keep(self, data: object) -> None:
        """Note the state of a loader that has one, before more is read than was trained on."""
        data = _stateful(data)
        if is_stateful(data):
            self.loader = data.state_dict()

    def now(self, data: object) -> dict[str, Any]:
        """The position as plain data, for a checkpoint."""
        own = _stateful(data)
        loader = own.state_dict() if self.loader is None and is_stateful(own) else self.loader
        generators = self.generators if data is None else _states(data)
        plain = {name: getattr(self, name) for name in ("size", "counts", "world", "at", "items")}
        return {"start": self.start, "generators": generators, "loader": loader, **plain}

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
        return Order("batches", size, share, _length(batches))
    return Order("samples", batches.batch_size, share, _length(batches.sampler), batches.drop_last)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def moved(data: object, position: Position, batch: int) -> int:
    """The batches that each rank has taken, as `data` counts them, after a restore.

    With as many ranks and as large batches as before they are `batch`. Otherwise the position
    is noted as a count of samples, and the batches are those of the whole epoch
    without the ones that are left: ceil(23 / 4) - ceil((23 - 16) / 4) = 4.

    Args:
        data: What the epoch goes on with.
        position: Of the epoch that was interrupted; changed in place.
        batch: Batches that were taken of it by each rank.

    Raises:
        DataError: If the place cannot be found in this data.
    """
    order = order_of(data)
    if not batch or _same(order, position):
        return batch
    if order.counts != position.counts or order.counts == "share":
        _refuse(order, position, batch)
    if order.counts == "batches" and order.size != position.size:
        _refuse(order, position, batch)
    taken = position.taken(batch)
    whole, left = order.rounds_after(0), order.rounds_after(taken)
    position.at = taken // order.share.world if whole is None or left is None else whole - left
    position.items, position.size, position.world = taken, order.size, order.share.world
    return position.at


def _same(order: Order, position: Position) -> bool:
    return (order.counts, order.size, order.share.world) == (
        position.counts, position.size, position.world
    )  # fmt: skip


def _refuse(order: Order, position: Position, batch: int) -> NoReturn:
    def described(size: int | None, counts: str, world: int) -> str:
        of = "a size that is not known" if size is None else f"{size} samples"
        return f"of {of} (counted: {counts}, ranks: {world})"

    now = described(order.size, order.counts, order.share.world)
    before = described(position.size, position.counts, position.world)
    raise DataError(
        f"going on after batch {batch} of an epoch",
        f"batches {now}, where they were {before}",
        "the batch size, sampler and ranks from before until the epoch is over,"
        " or state.batch = 0 to begin it anew",
    )


def begun(data: Iterable[Any], position: Position) -> Iterator[Any]:
    """An iterator over `data` from the beginning of an epoch.

    Args:
        data: What is iterated over.
        position: `Position.beginning(data)`. Where `data` is dealt to ranks all of them draw
            the order from its random states; those of the first rank go on from there.
    """
    if not isinstance(data, Part) or data.order.counts == "share":
        return iter(data)
    own = rng_state(_CPU)
    _go_to_start(data, position)
    batches = data.opened(0)
    if data.share.rank:
        set_rng_state(own, _CPU)
    return batches


def reopened(data: Iterable[Any], position: Position, taken: int) -> Iterator[Any]:
    """An iterator over `data` without the first `taken` batches, in the order of the epoch.

    Args:
        data: What is iterated over; not an iterator itself.
        position: How the epoch began.
        taken: Batches of it that each rank took.

    Raises:
        DataError: If the position is one in other batches; see `moved`.
    """
    now = rng_state(_CPU)
    try:
        return _opened_there(data, position, taken)
    finally:
        set_rng_state(now, _CPU)  # opening draws numbers, which the run has drawn before


def _opened_there(data: Iterable[Any], position: Position, taken: int) -> Iterator[Any]:
    order, own = order_of(data), _stateful(data)
    if position.start is None:  # nothing is known but the batch
        position = attrs.evolve(position, size=order.size, counts=order.counts)
        position.world = order.share.world
    elif not _same(order, position):
        _refuse(order, position, taken)
    if position.loader is not None and hasattr(own, "load_state_dict"):
        own.load_state_dict(position.loader)
        position.loader = None
        return iter(data)
    _go_to_start(data, position)
    if isinstance(data, Part):
        return data.opened(position.taken(taken))
    return _passed_over(data, position.taken(taken))


def _go_to_start(data: object, position: Position) -> None:
    if position.start is not None:
        set_rng_state(position.start["rng"], _CPU)
        _restore(data, position.start["generators"])


def _passed_over(data: Iterable[Any], taken: int) -> Iterator[Any]:
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        batches = iter(data)
        for _ in itertools.islice(batches, taken):
            pass
        return batches
    loader, rest = dealing(data, SINGLE)
    rest.skip = taken
    vars(loader)["persistent_workers"] = False
    batches = iter(loader)
    rest.walk.begin()
    return batches


def dealing(loader: DataLoader[Any], share: Share) -> tuple[DataLoader[Any], Dealt]:
    """A copy of a map-style loader that gives one rank's batches, and what deals them."""
    name = index_name(loader)
    dealt, dealing = Dealt(getattr(loader, name), share), copy.copy(loader)
    # DataLoader refuses to set it, lest its workers miss it; a copy without workers has none
    vars(dealing).update({name: dealt, "_iterator": None})
    return dealing, dealt


def index_name(loader: DataLoader[Any]) -> str:
    """The name of what gives a map-style loader its indices: a sampler if it makes no batches."""
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


def _stateful(data: Any) -> Any:
    return data.stateful if isinstance(data, Part) else data


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


def _restore(data: object, states: Iterable[torch.Tensor]) -> None:
    for generator, state in zip(generators_of(data), states, strict=False):
        generator.set_state(state)


def take_up(data: object, position: Position) -> None:
    """Put the generators of `data` where they were when the position was saved."""
    if position.generators is not None:
        _restore(data, position.generators)


def set_epoch(data: Any, epoch: int) -> None:
    """Tell samplers and datasets that ask for it which epoch it is (`set_epoch`)."""
    data = data.read if isinstance(data, Part) else data
    batch_sampler = getattr(data, "batch_sampler", None)
    parts = [data, getattr(data, "sampler", None), batch_sampler, getattr(data, "dataset", None)]
    parts.append(getattr(batch_sampler, "sampler", None))
    for part in {id(part): part for part in parts}.values():
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
