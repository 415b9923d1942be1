"""Sharding of streams, of what is shared out already, of loaders with workers; and wrong uses."""

import functools
import threading
import weakref

import loopkit as lk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.data.order import Uneven
from loopkit.feed import reading
from loopkit.limits import known_length
from loopkit.position import Position, begun, moved, reopened, set_epoch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from feeds import children
from ranks import Numbers, Ranks, plain, real, samples


class Agreement:
    """What a sum of flags over ranks does: they are threads, and each waits for the others."""

    def __init__(self, world):
        self.flags = [False] * world
        self.barrier = threading.Barrier(world, timeout=20)

    def of(self, rank):
        def count(flag):
            self.flags[rank] = flag
            self.barrier.wait()
            found = sum(self.flags)
            self.barrier.wait()
            return found

        return count


def together(world, function):
    """What `function(rank, count)` returns on each rank, or the error that it raised."""
    found, agreement = [None] * world, Agreement(world)

    def call(rank):
        try:
            found[rank] = function(rank, agreement.of(rank))
        except (lk.LoopkitError, threading.BrokenBarrierError) as error:
            found[rank] = error
            agreement.barrier.abort()

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


STREAMS = {
    "a stream": lambda n: DataLoader(Numbers(n), 3, collate_fn=plain),
    "a generator": lambda n: ([i] for i in range(n)),
    "an iterable": lambda n: {f"{i}": i for i in range(n)},
}


@settings(deadline=None)
@given(st.sampled_from(sorted(STREAMS)), st.integers(0, 20), st.integers(2, 4))
def test_a_stream_is_split_into_every_wth_batch(kind, count, world):
    """Each rank reads the whole stream and keeps its part; those that ran out get fillers."""
    whole = [*STREAMS[kind](count)]
    ranks = Ranks(lambda: STREAMS[kind](count), world, stream="split").begin()
    rounds = ranks.take(-(-len(whole) // world))
    assert real(rounds) == whole
    assert all(None not in row for row in rounds)
    assert [next(batches, None) for batches in ranks.iterators] == [None] * world


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(2, 4), st.integers(2, 4), st.integers(1, 5))
def test_a_split_stream_goes_on_with_another_number_of_ranks(count, before, after, cut):
    """The batches of the stream that were taken are passed over, and no other."""
    make = functools.partial(STREAMS["a stream"], count)
    whole, ranks = [*make()], Ranks(make, before, stream="split").begin()
    seen = real([[b for b in row if b is not None] for row in ranks.take(cut)])
    saved = ranks.positions[0].now(ranks.parts[0])
    again = Ranks(make, after, stream="split")
    again.go_on(saved, cut)
    seen += real([[b for b in row if b is not None] for row in again.take(len(whole))])
    assert seen == whole


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_a_stream_without_a_policy_is_an_error(make):
    """Never the same samples on all ranks silently: the error names the two policies."""
    with pytest.raises(lk.DataError, match="same samples on all ranks") as caught:
        lk.sharded(make(5), 0, 2)
    assert 'stream="split"' in caught.value.instead
    assert 'stream="sharded"' in caught.value.instead


LENGTHS = st.lists(st.integers(0, 7), min_size=2, max_size=4)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.sampled_from(["exact", "drop", "pad"]))
def test_streams_of_unequal_lengths_end_together(lengths, uneven):
    """Ranks that ran dry go on with fillers, or all stop at the shortest; none waits."""
    world = len(lengths)

    def read(rank, count):
        data = ([rank, i] for i in range(lengths[rank]))
        if uneven == "pad":
            data = Repeatable([[rank, i] for i in range(lengths[rank])])
        part = lk.sharded(data, rank, world, uneven, stream="sharded", count=count)
        return [*part]

    found = together(world, read)
    if uneven != "drop" and 0 in lengths and any(lengths):
        assert any("no batch in it" in str(error) for error in found)
        return
    rounds = min(lengths) if uneven == "drop" else max(lengths)
    for rank, batches in enumerate(found):
        own = [[rank, i] for i in range(lengths[rank])]
        if uneven == "exact":
            missing = [sum(n <= i for n in lengths) for i in range(rounds)]
            given = [own[i] if i < len(own) else [rank, 0] for i in range(rounds)]
            assert batches == [
                Uneven(batch, missing[i], i >= len(own)) if missing[i] else batch
                for i, batch in enumerate(given)
            ]
        else:
            assert batches == [own[i % len(own)] for i in range(rounds)]


class Repeatable:
    """Batches that can be read again, without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_the_share_of_a_stream_goes_on_on_as_many_ranks_only():
    """Each rank passes over its own batches; with other ranks nobody knows whose they are."""

    def share(world):
        return lk.sharded(DataLoader(Numbers(9), 2), 1, world, stream="sharded")

    part = share(2)
    position = Position.beginning(part)
    batches = begun(part, position)
    seen = [next(batches).tolist() for _ in range(2)]
    saved = position.now(part)
    rest = reopened(share(2), Position(**saved), moved(share(2), Position(**saved), 2))
    assert seen + [batch.tolist() for batch in rest] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    with pytest.raises(lk.DataError, match=r"ranks: 3\), where they were .*ranks: 2\)"):
        moved(share(3), Position(**saved), 2)


class Announced(Dataset):
    """A dataset that is a rank's share, and is told the epoch."""

    world_size, rank, epoch = 2, 1, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


class Config:
    rank, world_size = 1, 2


class Elsewhere(IterableDataset):
    """As Hugging Face's streams say that they were split by node."""

    _distributed = Config()

    def __iter__(self):
        return iter(range(5))


def shared_out(rank=1, world=2):
    sampler = DistributedSampler(range(9), world, rank, shuffle=True)
    return {
        "a sampler": DataLoader(range(9), 2, sampler=sampler),
        "a batch sampler": DataLoader(
            range(9), batch_sampler=torch.utils.data.BatchSampler(sampler, 2, drop_last=False)
        ),
        "a dataset": DataLoader(Announced(), 2),
        "a stream": DataLoader(Elsewhere(), 2),
    }


@pytest.mark.parametrize("kind", shared_out())
def test_what_is_shared_out_already_is_left_alone(kind):
    """A distributed sampler and the like: this rank reads just what they give it."""
    data = shared_out()[kind]
    set_epoch(data, 3)
    alone = [batch.tolist() for batch in data]
    part = lk.sharded(data, 1, 2)
    set_epoch(part, 3)
    assert [batch.tolist() for batch in part] == alone
    with pytest.raises(lk.DataError, match="share of rank 1 of 2"):
        lk.sharded(data, 0, 2)
    with pytest.raises(lk.DataError, match="share of rank 1 of 2"):
        lk.sharded(data, 1, 4)


def test_samplers_within_a_share_are_told_the_epoch():
    """Distributed samplers shuffle each epoch anew, also within a batch sampler."""
    for kind in ("a sampler", "a batch sampler"):
        part, orders = lk.sharded(shared_out()[kind], 1, 2), []
        for epoch in (0, 1, 0):
            set_epoch(part, epoch)
            orders.append([batch.tolist() for batch in part])
        assert orders[0] != orders[1]
        assert orders[0] == orders[2]
    dataset = Announced()
    set_epoch(lk.sharded(DataLoader(dataset), 1, 2), 4)
    assert dataset.epoch == 4


def test_a_distributed_sampler_has_a_length_and_another_share_has_none():
    """DistributedSampler gives all ranks as many; others have to agree before each batch."""
    parts = {k: lk.sharded(d, 1, 2, count=int) for k, d in shared_out().items()}
    assert known_length(parts["a sampler"]) == 3
    assert known_length(parts["a dataset"]) is None
    assert known_length(parts["a stream"]) is None


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_loaders_with_workers_are_dealt_alike(world, persistent):
    """Workers read this rank's samples only; the order is that of one process, in each epoch."""
    make = functools.partial(
        DataLoader, range(17), 2, shuffle=True, num_workers=2, persistent_workers=persistent,
        collate_fn=plain,
    )  # fmt: skip
    before, ranks = children(), Ranks(make, world)
    for epoch in range(2):
        rounds = ranks.begin(epoch).take()
        assert samples(real(rounds)) == dict.fromkeys(range(17), 1)
        assert [next(batches, None) for batches in ranks.iterators] == [None] * world
    for part in ranks.parts:
        if persistent:
            part.read._iterator._shutdown_workers()
    assert children() <= before


def test_reading_a_part_ends_its_workers():
    """A break within an epoch leaves no process behind."""
    data = DataLoader(range(40), 2, num_workers=2)
    before = children()
    with reading(lk.sharded(data, 1, 2)) as batches:
        next(batches)
        assert children() - before
    assert children() <= before


def test_a_loader_has_one_part_for_each_rank():
    """Workers that persist are found again by the next run; the part goes with its loader."""
    data = DataLoader(range(40), 2)
    part = lk.sharded(data, 1, 2)
    assert lk.sharded(data, 1, 2) is part
    assert lk.sharded(data, 0, 2) is not part
    gone = weakref.ref(part)
    del part, data
    assert gone() is None


def test_one_process_reads_the_data_itself():
    """On one rank nothing stands between: loaders, lists and streams come back as they are."""
    for data in ([1], DataLoader(range(3)), iter([1]), DataLoader(Numbers(3))):
        assert lk.sharded(data, 0, 1) is data


def test_lists_read_their_own_batches_only():
    """Numbered batches of other ranks are never read."""

    class Batches(Dataset):
        def __init__(self):
            self.read = []

        def __len__(self):
            return 7

        def __getitem__(self, index):
            self.read.append(index)
            return index

    data = Batches()
    assert [*lk.sharded(data, 1, 3)] == [1, 4, Uneven(0, 2, True)]
    assert data.read == [1, 4, 0]


def test_a_run_of_each_rank_makes_equally_many_updates():
    """`run` takes a part as it takes a loader: the clock, windows and the epochs' ends agree."""
    taken = 0
    for rank in range(3):
        model = torch.nn.Linear(1, 1)
        state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        part = lk.sharded(DataLoader(torch.arange(10.0)[:, None], 1), rank, 3)
        step = lk.with_grad_accum(2)(lambda state, batch: state.model(batch).mean())
        ends = [s.step for s in lk.run(step, state, part, max_epochs=2) if s.epoch_end]
        assert ends == [2, 4]
        taken += state.samples
    assert taken == 20  # fillers are no samples


WRONG = {
    "a rank too high": (lambda: lk.sharded([1], 2, 2), lk.UsageError, "rank 2 of 2"),
    "no rank": (lambda: lk.sharded([1], None, 2), lk.UsageError, "rank None of 2"),
    "an unknown policy": (lambda: lk.sharded([1], 0, 2, "join"), lk.UsageError, "'join'"),
    "an unknown policy for streams": (
        lambda: lk.sharded([1], 0, 2, stream="all"), lk.UsageError, "'all'",
    ),
    "batches out of order": (
        lambda: lk.sharded(DataLoader([1], num_workers=1, in_order=False), 0, 2),
        lk.DataError, "fillers could not be told",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(case):
    """A wrong rank or policy raises at once, naming what was found."""
    wrong, kind, found = WRONG[case]
    with pytest.raises(kind, match=found):
        wrong()


def test_a_position_in_other_batches_is_refused():
    """Samples and batches, or batches of other sizes that a sampler made, have no common place."""
    cut = DataLoader(range(12), 3)
    made = [DataLoader(range(12), batch_sampler=[[i] for i in range(12)]), [1, 2, 3]]
    position = Position.beginning(cut)
    for other in made:
        with pytest.raises(lk.DataError, match="counted: batches"):
            moved(other, position, 2)
        with pytest.raises(lk.DataError, match="counted: batches"):
            reopened(other, position, 2)
