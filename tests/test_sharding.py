"""Sharding: ranks take each batch once between them, in one order, however many they are."""

import functools
import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.data.order import Uneven
from torch.utils.data import DataLoader

from ranks import LOADERS, POLICIES, SIZED, DrawsOnItsWay, Ranks, alone, real, samples


@settings(deadline=None)
@given(SIZED)
def test_ranks_take_the_batches_of_one_process_in_their_order(drawn):
    """Rank r has batches r, r + w, ... of the order on one process; fillers come last, and few."""
    kind, count, size, world = drawn
    make = functools.partial(LOADERS[kind], count, size)
    whole, ranks = alone(make), Ranks(make, world)
    if whole == []:
        assert [[*part] for part in ranks.parts] == [[] for _ in range(world)]
        return
    rounds = ranks.begin().take()
    assert real(rounds) == whole
    assert len(rounds) == -(-len(whole) // world)
    assert all(None not in row for row in rounds)
    assert [next(batches, None) for batches in ranks.iterators] == [None] * world
    fillers = [b.batch for row in rounds for b in row if type(b) is Uneven and b.filler]
    assert fillers == [whole[0]] * (len(rounds) * world - len(whole))


@settings(deadline=None)
@given(SIZED, st.sampled_from(POLICIES))
def test_all_ranks_have_equally_many_batches_and_say_so(drawn, uneven):
    """The length of a part is the number of its batches, the same on all ranks."""
    kind, count, size, world = drawn
    ranks = Ranks(lambda: LOADERS[kind](count, size), world, uneven)
    lengths = [len(part) for part in ranks.parts]
    assert lengths == [len([*batches]) for batches in ranks.begin().iterators]
    assert len({*lengths}) == 1


@settings(deadline=None)
@given(SIZED)
def test_the_uneven_end_is_dropped_or_padded_from_the_start(drawn):
    """`drop` leaves out the last, incomplete round; `pad` repeats from the epoch's start."""
    kind, count, size, world = drawn
    make = functools.partial(LOADERS[kind], count, size)
    whole = alone(make)
    full = len(whole) // world * world
    assert real(Ranks(make, world, "drop").begin().take()) == whole[:full]
    padded = -(-len(whole) // world) * world
    expected = [*itertools.islice(itertools.cycle(whole), padded)]
    assert real(Ranks(make, world, "pad").begin().take()) == expected


@settings(deadline=None)
@given(SIZED, st.integers(0, 30), st.sampled_from(POLICIES))
def test_an_epoch_goes_on_with_the_very_batches(drawn, cut, uneven):
    """Cut after any update, the other updates have the batches that they would have had."""
    kind, count, size, world = drawn
    make = functools.partial(LOADERS[kind], count, size)
    whole = Ranks(make, world, uneven).begin().take()
    first = Ranks(make, world, uneven).begin()
    cut = min(cut, len(whole))
    rounds = first.take(cut)
    saved = first.positions[0].now(first.parts[0])
    again = Ranks(make, world, uneven)
    assert again.go_on(saved, cut) == cut
    assert rounds + again.take(len(whole) - cut) == whole
    assert [next(batches, None) for batches in again.iterators] == [None] * world


WORLDS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=2, max_size=4)


@settings(deadline=None)
@given(SIZED, WORLDS)
def test_an_epoch_goes_on_with_another_number_of_ranks(drawn, worlds):
    """Two ranks, then one, then four, ...: each sample of the epoch once, and none twice."""
    kind, count, size, _ = drawn
    make = functools.partial(LOADERS[kind], count, size)
    seen, saved, batch = [], None, 0
    for number, (world, updates) in enumerate(worlds):
        ranks = Ranks(make, world)
        if saved is None or not batch:
            ranks.begin()
            seen, batch = [], 0
        else:
            batch = ranks.go_on(saved, batch)
        left = len(ranks.parts[0]) - batch
        assert left >= 0
        more = left if number == len(worlds) - 1 else min(updates, left)
        seen += real(ranks.take(more))
        batch += more
        saved = ranks.positions[0].now(ranks.parts[0])
    assert [next(batches, None) for batches in ranks.iterators] == [None] * world
    assert seen == alone(make)


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(0, 4)), min_size=2, max_size=4
    ),
)
def test_an_epoch_goes_on_with_another_batch_size(count, parts):
    """Where torch cuts the batches the position is one in samples: any size, any ranks."""
    seen, saved, batch = [], None, 0
    for number, (world, size, updates) in enumerate(parts):
        ranks = Ranks(lambda: LOADERS["shuffled"](count, size), world)
        if not batch:
            ranks.begin()
            seen = []
        else:
            batch = ranks.go_on(saved, batch)
        left = len(ranks.parts[0]) - batch
        more = left if number == len(parts) - 1 else min(updates, left)
        seen += real(ranks.take(more))
        batch += more
        saved = ranks.positions[0].now(ranks.parts[0])
    assert samples(seen) == dict.fromkeys(range(count), 1)


def test_a_sampler_that_draws_on_its_way_has_one_order_on_all_ranks():
    """The ranks draw the whole order at the beginning, from the first rank's random states."""
    make = functools.partial(DataLoader, range(20), batch_sampler=DrawsOnItsWay(20, 3))
    ranks = Ranks(make, 3).begin()
    first = ranks.take(1)
    random.seed(77)  # what a model may do
    rounds = first + ranks.take(2)
    assert samples(batch.tolist() for batch in real(rounds)) == dict.fromkeys(range(20), 1)
    saved = ranks.positions[0].now(ranks.parts[0])
    again = Ranks(make, 2)
    again.go_on(saved, 2)
    assert real(again.take(1))[0].tolist() == real(rounds[2:])[0].tolist()
