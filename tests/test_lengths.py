"""Samples of unequal lengths: batches of like ones, and padding."""

import collections
import itertools

import loopkit as lk
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loopkit.position import set_epoch
from torch.utils.data import DataLoader

from ranks import Ranks, plain, real, samples

LENGTHS = st.lists(st.integers(0, 50), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 7), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_each_sample_comes_once_and_the_length_is_right(lengths, size, pool, neighbours, drop):
    """An epoch is a permutation, in batches of the size; at most one of them is smaller."""
    batches = lk.group_by_length(
        lengths, size, pool=pool, neighbours=neighbours, drop_last=drop, seed=3
    )
    found = [*batches]
    assert len(found) == len(batches)
    sizes = collections.Counter(map(len, found))
    left = len(lengths) % size
    assert (
        sizes
        == collections.Counter(
            {size: len(lengths) // size} | ({left: 1} if left and not drop else {})
        )
        or left == size
    )
    seen = [*itertools.chain(*found)]
    assert len(seen) == len({*seen})
    if not drop:
        assert sorted(seen) == [*range(len(lengths))]


def padding(lengths, batches):
    """Padded places over all places."""
    real = sum(lengths)
    return 1 - real / sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)


def test_batches_have_little_padding_and_a_random_order():
    """A tenth of the padding of a plain shuffle; neither lengths nor companions are in order."""
    lengths = torch.randint(10, 500, (4000,)).tolist()
    batches = lk.group_by_length(lengths, 16)
    found = [*batches]
    shuffled = torch.randperm(4000).view(-1, 16).tolist()
    assert padding(lengths, found) < padding(lengths, shuffled) / 10
    longest = torch.tensor([float(max(lengths[i] for i in batch)) for batch in found])
    assert torch.corrcoef(torch.stack([longest[1:], longest[:-1]]))[0, 1].abs() < 0.2
    batches.set_epoch(1)
    companions = {frozenset(batch) for batch in found}
    assert not companions & {frozenset(batch) for batch in batches}


def test_the_order_follows_from_the_seed_and_the_epoch_alone():
    """Whatever was drawn before; other seeds and epochs have other orders."""
    lengths = torch.randint(1, 9, (50,))
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        found = []
        for _ in range(2):
            torch.rand(3)
            batches = lk.group_by_length(lengths, 4, seed=seed)
            before = torch.get_rng_state()
            set_epoch(DataLoader(range(50), batch_sampler=batches), epoch)
            found.append([*batches])
            assert torch.equal(before, torch.get_rng_state())
        assert found[0] == found[1]
        orders.append(found[0])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_ranks_deal_the_groups_out_and_go_on_in_them():
    """Two ranks, then three: each sample once; neighbours of like lengths go to one update."""
    lengths = [*range(1, 49)]

    def make(size=4):
        batches = lk.group_by_length(lengths, size, neighbours=2)
        return DataLoader(range(48), batch_sampler=batches, collate_fn=plain)

    ranks = Ranks(make, 2).begin()
    rounds = ranks.take(3)
    for row in rounds:
        assert max(itertools.chain(*row)) - min(itertools.chain(*row)) < 8
    again = Ranks(make, 3)
    again.go_on(ranks.positions[0].now(ranks.parts[0]), 3)
    rest = again.take(2)
    assert samples(real(rounds) + real(rest)) == dict.fromkeys(range(48), 1)
    with pytest.raises(lk.DataError, match=r"batches of 6 samples .*, where they were of 4"):
        Ranks(lambda: make(6), 2).go_on(ranks.positions[0].now(ranks.parts[0]), 3)


SEQUENCES = st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=6), min_size=1, max_size=5)


@given(SEQUENCES, st.integers(1, 4), st.sampled_from(["left", "right"]), st.integers(-5, 5))
def test_padding_is_the_loop_that_one_would_write(sequences, multiple, side, pad):
    """Each row is its sequence and then the padding, up to the longest, or a multiple."""
    collate = lk.pad_collate(pad, multiple_of=multiple, side=side)
    longest = -(-max(map(len, sequences)) // multiple) * multiple
    expected = []
    for row in sequences:
        fill = [pad] * (longest - len(row))
        expected.append(row + fill if side == "right" else fill + row)
    for kind in (torch.tensor, np.array, list):
        assert collate([kind(row) for row in sequences]).tolist() == expected


Pair = collections.namedtuple("Pair", "text label")


def test_fields_keep_their_names_and_kinds():
    """Tuples, named tuples and mappings; frames of features; numbers and text by torch's way."""
    collate = lk.pad_collate({1: -100, "labels": -1})
    first, second = collate([(torch.ones(2, 3), [1, 2]), (torch.ones(4, 3), [3])])
    assert first.shape == (2, 4, 3)
    assert first[0, 2:].eq(0).all()
    assert second.tolist() == [[1, 2], [3, -100]]
    pair = collate([Pair("a", 1), Pair("b", 2)])
    assert type(pair) is Pair
    assert pair.text == ["a", "b"]
    assert pair.label.tolist() == [1, 2]
    batch = collate([{"labels": [1], "n": 0.5}, {"labels": [2, 3], "n": 1.5}])
    assert batch["labels"].tolist() == [[1, -1], [2, 3]]
    assert batch["n"].tolist() == [0.5, 1.5]


def test_a_mask_says_what_is_real():
    """Of the first field that is padded, on the side where the padding is not."""
    rows = [{"i": 0, "ids": [1, 2, 3]}, {"i": 1, "ids": [4]}]
    batch = lk.pad_collate(mask="real", side="left", multiple_of=4)(rows)
    assert batch["real"].tolist() == [[False, True, True, True], [False, False, False, True]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_groups_and_pads(workers):
    """Both together in a real loader: every sample arrives whole."""
    rows = [torch.full((n,), float(n)) for n in (5, 1, 4, 2, 3, 6)]
    batches = lk.group_by_length([len(row) for row in rows], 2)
    data = DataLoader(rows, batch_sampler=batches, collate_fn=lk.pad_collate(), num_workers=workers)
    found = [[*map(sum, batch.tolist())] for batch in data]
    assert sorted(itertools.chain(*found)) == [n * n for n in range(1, 7)]


WRONG = {
    "no lengths": (lambda: lk.group_by_length([], 2), r"shape \(0,\)"),
    "lengths of text": (lambda: lk.group_by_length(["a"], 2), "list as the lengths"),
    "lengths in a table": (lambda: lk.group_by_length([[1, 2]], 2), r"shape \(1, 2\)"),
    "a batch of none": (lambda: lk.group_by_length([1], 0), "batch_size = 0"),
    "a pool of none": (lambda: lk.group_by_length([1], 1, pool=0), "pool = 0"),
    "an unknown side": (lambda: lk.pad_collate(side="top"), "side = 'top'"),
    "no multiple": (lambda: lk.pad_collate(multiple_of=0), "multiple_of = 0"),
    "a mask of nothing": (lambda: lk.pad_collate(mask="m")([{"a": 1}]), r"fields \['a'\]"),
    "a mask in a field's place": (lambda: lk.pad_collate(mask="a")([{"a": [1]}]), r"\['a'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(case):
    """Lengths, sizes and names that cannot be raise at once, naming what was found."""
    wrong, found = WRONG[case]
    with pytest.raises(lk.UsageError, match=found):
        wrong()
