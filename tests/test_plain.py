"""Plain data: what can be saved without running code to load it."""

import collections

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.plain import is_plain, is_stateful, restore, saveable, saved
from loopkit.testing import assert_bitwise_equal
from torch import nn

PLAIN = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
        st.builds(torch.arange, st.integers(0, 3)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
    ),
    max_leaves=10,
)  # fmt: skip


@attrs.define
class Counter:
    """Something of the user's with a state."""

    count: int = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class HalfStateful:
    """It can be saved, but not restored."""

    def state_dict(self):
        return {}


@given(value=PLAIN)
@settings(max_examples=100, deadline=None)
def test_nestings_of_plain_values_are_plain(value):
    """Numbers, text, tensors, and lists, tuples and dicts of those, however deep."""
    assert is_plain(value)
    assert not is_plain([value, {"inner": (object(),)}])


@pytest.mark.parametrize("value", [{1, 2}, frozenset({"a"}), b"bytes", 1 + 2j, {"a": {1}}])
def test_what_json_has_no_word_for_is_plain_all_the_same(value):
    """Sets, bytes and complex numbers are part of a checkpoint as well."""
    assert is_plain(value)


@pytest.mark.parametrize(
    "value",
    [object(), len, int, {(1, 2): 3}, {None: 1}, {1.5: 1}, {"a": {len}},
     collections.deque(), torch.float32, nn.Linear(1, 1),
     np.array(["a"]), np.array([None]), np.ma.array([1, 2], mask=[0, 1]), np.datetime64(0, "s")],
)  # fmt: skip
def test_what_needs_code_to_load_is_not_plain(value):
    """Functions, classes, other containers, and dicts with other keys are left out."""
    assert not is_plain(value)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i8", "u2", "u4", "u8", "?", "c8", "c16"])
def test_arrays_and_scalars_of_numbers_are_plain(kind):
    """NumPy's arrays and scalars, alone and in containers, in either order of bytes."""
    for dtype in (np.dtype(kind), np.dtype(kind).newbyteorder()):
        assert is_plain(np.ones((2, 3), dtype))
        assert is_plain({"in": [np.ones((), dtype)[()]]})


def test_what_can_be_restored_is_stateful():
    """It takes both methods, on an object: a class is not its own instance."""
    assert is_stateful(Counter())
    assert is_stateful(nn.Linear(1, 1))
    assert not is_stateful(HalfStateful())
    assert not is_stateful(Counter)
    assert not is_stateful(nn.Linear)


def test_only_what_can_be_held_is_saved():
    """The rest of the extras is the user's, and is left alone."""
    extras = {"n": 3, "c": Counter(2), "class": nn.Linear, "f": len, "half": HalfStateful()}
    assert saveable(extras) == {"n": 3, "c": {"count": 2}}


@given(value=PLAIN)
@settings(max_examples=50, deadline=None)
def test_what_was_restored_is_a_copy(value):
    """Restoring gives the same values, and shares nothing with what was loaded."""
    loaded = {"value": value, "new": [torch.ones(1)]}
    values = {"value": None, "kept": 1}
    restore(values, loaded)
    assert_bitwise_equal(values, {"value": value, "kept": 1, "new": [torch.ones(1)]})
    values["new"][0].zero_()
    assert loaded["new"][0] == 1


def test_what_is_stateful_is_restored_in_place():
    """The user's object stays the user's object."""
    counter = Counter(1)
    values = {"c": counter}
    restore(values, {"c": saved(Counter(5))})
    assert values["c"] is counter
    assert counter.count == 5
