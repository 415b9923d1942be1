"""Walking through a batch: every container keeps its own type."""

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import attrs
import loopkit as lk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.nested import batch_size, leaves_of, map_tensors
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

META = torch.device("meta")


class Pair(NamedTuple):
    first: Any
    second: Any


Plain = collections.namedtuple("Plain", ["to", "source"])


@attrs.frozen
class Frozen:
    first: Any
    second: Any


@attrs.define
class Slotted:
    first: Any
    second: Any


@attrs.define(slots=False)
class Open:
    first: Any
    second: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenData:
    first: Any
    second: Any


@dataclasses.dataclass
class Data:
    first: Any
    second: Any
    count: int = dataclasses.field(init=False, default=3)


class Moves:
    """An object that knows how to move, and is no container to us."""

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        return Moves(self.tensor.to(device))


class Bunch(dict):
    """A dict with attributes."""

    source = None


class Tagged(list):
    """A list made from more than its items."""

    def __init__(self, items, tag):
        super().__init__(items)
        self.tag = tag


def default(items):
    return collections.defaultdict(list, enumerate(items))


def ordered(items):
    return collections.OrderedDict((str(i), item) for i, item in enumerate(items))


PAIRS = [Pair, Plain, Frozen, Slotted, Open, FrozenData, Data]
LEAVES = st.one_of(
    st.builds(lambda n: torch.zeros(n), st.integers(0, 3)),
    st.builds(lambda n: Moves(torch.zeros(n)), st.integers(0, 3)),
    st.sampled_from(["text", b"bytes", None, 3, 2.5, True, object(), Tensor, frozenset({1}), len]),
)


def containers(inner):
    some = st.lists(inner, max_size=3)
    return st.one_of(
        some,
        some.map(tuple),
        some.map(ordered),
        some.map(default),
        some.map(lambda items: dict(enumerate(items))),
        some.map(lambda items: collections.UserDict(enumerate(items))),
        some.map(lambda items: types.MappingProxyType(dict(enumerate(items)))),
        some.map(lambda items: Bunch(enumerate(items))),
        some.map(lambda items: Tagged(items, "tag")),
        st.builds(lambda make, a, b: make(a, b), st.sampled_from(PAIRS), inner, inner),
    )


def parts_of(tree):
    """What a container holds, with everything else it carries; None for a leaf."""
    if isinstance(tree, collections.abc.Mapping):
        return [*tree.items(), ("extra", getattr(tree, "default_factory", None))]
    if isinstance(tree, Pair | Plain | Frozen | Slotted | Open | FrozenData | Data):
        return [("first", tree[0] if isinstance(tree, tuple) else tree.first),
                ("second", tree[1] if isinstance(tree, tuple) else tree.second)]  # fmt: skip
    if isinstance(tree, list | tuple):
        return [*enumerate(tree), ("tag", getattr(tree, "tag", None))]
    return None


def assert_moved(there, here):
    assert type(there) is type(here)
    if isinstance(here, Tensor):
        assert there.device == META
        assert there.shape == here.shape
    elif isinstance(here, Moves):
        assert there.tensor.device == META
    elif (parts := parts_of(here)) is None:
        assert there is here
    else:
        for (their_key, their), (our_key, our) in zip(parts_of(there), parts, strict=True):
            assert their_key == our_key
            assert_moved(their, our)


def tensors_by_hand(tree):
    if isinstance(tree, Tensor):
        return [tree]
    return [t for _, part in parts_of(tree) or [] for t in tensors_by_hand(part)]


TREES = st.recursive(LEAVES, containers, max_leaves=12)


@given(TREES)
@settings(max_examples=300, deadline=None)
def test_to_device_moves_every_tensor_and_keeps_every_type(tree):
    """Any nesting arrives whole: types, keys and order kept, what is no tensor the same object."""
    devices = [t.device for t in tensors_by_hand(tree)]
    assert_moved(lk.to_device(tree, META), tree)
    assert [t.device for t in tensors_by_hand(tree)] == devices


@given(TREES)
@settings(max_examples=200, deadline=None)
def test_the_tensors_of_a_nesting_are_all_found_in_order(tree):
    """leaves_of and map_tensors visit the same tensors, each once, in order."""
    found, mapped = [leaf for leaf in leaves_of(tree) if isinstance(leaf, torch.Tensor)], []
    map_tensors(lambda leaf: mapped.append(leaf) or leaf, tree)
    for ours in (found, [leaf for leaf in mapped if isinstance(leaf, Tensor)]):
        assert [id(t) for t in ours] == [id(t) for t in tensors_by_hand(tree)]


def test_what_comes_from_torch_keeps_its_type():
    """Packed sequences, results of torch functions, shapes and parameters move as they are."""
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert type(lk.to_device(packed, META)) is type(packed)
    assert lk.to_device(packed, META).data.device == META
    most = torch.ones(2, 3).max(dim=1)
    assert type(lk.to_device(most, META)) is type(most)
    assert lk.to_device(most, META).indices.device == META
    assert type(lk.to_device(torch.Size([2, 3]), META)) is torch.Size
    assert lk.to_device(torch.nn.Parameter(torch.ones(2)), META).device == META


def test_a_default_dict_keeps_its_default():
    """The copy makes new entries as the original does, and the original gets none of them."""
    original = collections.defaultdict(list, a=torch.ones(1))
    moved = lk.to_device(original, META)
    assert moved["new"] == []
    assert "new" not in original


def test_a_field_named_to_is_a_field():
    """A container with a tensor called `to`, an edge of a graph say, is walked through."""
    moved = lk.to_device(Plain(to=torch.ones(2), source=torch.ones(2)), META)
    assert (moved.to.device, moved.source.device) == (META, META)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(8, 3), 8),
        ((torch.zeros(8, 3), torch.zeros(8)), 8),
        ([torch.tensor(1.0), torch.zeros(5)], 5),
        ({"scale": torch.tensor(1.0), "x": {"y": [torch.zeros(4, 2)]}}, 4),
        (Frozen("text", torch.zeros(6)), 6),
        (Pair(None, Data(1, torch.zeros(2))), 2),
        (torch.zeros(0, 3), 0),
        (["a", "b", "c"], 3),
        ({"text": ["a", "b", "c"], "more": ["d", "e", "f"]}, 3),
        (torch.zeros(4, 2).numpy(), 4),
        ((torch.zeros(4, 2).numpy(), torch.zeros(4).numpy()), 4),
        ({"x": torch.zeros(4, 2).numpy(), "n": 3}, 4),
        (torch.tensor(1.0), 1),
        (7, 1),
        (None, 1),
        ({}, 0),
        ((), 0),
    ],
)
def test_the_size_of_a_batch_is_that_of_its_first_array(batch, size):
    """Samples are counted by the first array that has a dimension, else by length, else one."""
    assert batch_size(batch) == size
