"""collect: the outputs of all batches as one, on the host, in the order of the data."""

import collections

import attrs
import loopkit as lk
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from feeds import Samples, tiny_state

Pair = collections.namedtuple("Pair", "preds names")


@attrs.frozen
class Answer:
    logits: torch.Tensor
    score: torch.Tensor


def test_the_usual_outputs_are_one_tensor():
    """What `torch.cat` of all outputs would be, from batches of any size."""
    state = tiny_state()
    for size in (1, 3, 7):
        loader = DataLoader(Samples(7), batch_size=size)
        found = lk.collect(lk.predict(lambda s, x: s.model(x), state, loader))
        torch.testing.assert_close(found, state.model(torch.arange(7.0)[:, None]).detach())
        assert not found.requires_grad
        assert not found.is_inference()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 2))
def test_any_sizes_of_batches_give_the_whole(sizes, dimensions):
    """A batch may be empty; sizes beyond the first dimension stay."""
    whole = torch.randn(sum(sizes), *[3] * dimensions)
    parts = ({"a": (part,)} for part in whole.split(sizes))
    assert torch.equal(lk.collect(parts)["a"][0], whole)


def test_every_container_keeps_its_form():
    """Mappings, tuples with names or without, and classes of one's own, in any nesting."""
    found = lk.collect(
        {"x": (torch.tensor([n]), Pair(torch.tensor([[n, n]]), ["a", "b"])), "y": Answer(
            torch.tensor([n, n]), torch.tensor(n))}
        for n in (1, 2)
    )  # fmt: skip
    first, pair = found["x"]
    assert type(pair) is Pair
    assert type(found["y"]) is Answer
    assert (first.tolist(), pair.preds.tolist()) == ([1, 2], [[1, 1], [2, 2]])
    assert pair.names == ["a", "b", "a", "b"]
    assert (found["y"].logits.tolist(), found["y"].score.tolist()) == ([1, 1, 2, 2], [1, 2])


def test_keys_may_come_in_another_order():
    """A mapping is joined by its keys."""
    one, two = torch.tensor([1]), torch.tensor([2])
    found = lk.collect([{"a": one, "b": two}, {"b": two, "a": one}])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [1, 1], "b": [2, 2]}


@pytest.mark.parametrize(
    ("outputs", "joined"),
    [
        ([("a", "b"), ("c",)], ["a", "b", "c"]),  # as a loader gives texts
        ([["a", "b"], []], ["a", "b"]),
        ([{"n": 1}, {"n": 2}], {"n": [1, 2]}),
        ([(1, "one"), (2, "two")], ([1, 2], ["one", "two"])),
        ([None, None], [None, None]),
        ([torch.tensor(0.5), torch.tensor(1.0)], torch.tensor([0.5, 1.0])),
        ([np.ones((2, 3)), np.zeros((1, 3))], np.array([[1.0] * 3, [1.0] * 3, [0.0] * 3])),
        ([np.float64(0.5), np.float64(1.0)], np.array([0.5, 1.0])),
        ([[torch.ones(2)], [torch.zeros(3)]], [torch.ones(2), torch.zeros(3)]),
        ([[{"boxes": torch.ones(2, 4)}], []], [{"boxes": torch.ones(2, 4)}]),  # as detectors give
    ],
)
def test_texts_numbers_lists_and_arrays(outputs, joined):
    """Lists and texts end to end; what has no samples once for each batch; arrays as tensors."""
    assert repr(lk.collect(outputs)) == repr(joined)


def test_what_moves_itself_is_left_whole():
    """A packed sequence cannot be joined: it comes once for each batch."""
    packed = pack_sequence([torch.ones(2)])
    assert [type(part) for part in lk.collect([packed, packed])] == [type(packed)] * 2


def test_outputs_leave_the_device_as_they_come():
    """Each is a tensor on the host, without its graph, before the next one is asked for."""
    weight, moved = torch.ones(2, requires_grad=True), []

    class Output(torch.Tensor):
        def cpu(self):
            moved.append(len(moved))
            return torch.Tensor.cpu(self.as_subclass(torch.Tensor))

    def outputs():
        for number in range(3):
            assert len(moved) == number
            yield (weight * number).as_subclass(Output)

    found = lk.collect(outputs())
    assert found.tolist() == [0, 0, 1, 1, 2, 2]
    assert not found.requires_grad


U, D, T = lk.UsageError, lk.DataError, torch.zeros
WRONG = {
    "a single tensor": (T(3), U, "a Tensor", "lk.predict"),
    "a single mapping": ({"a": T(3)}, U, "a dict", "lk.predict"),
    "a function": (print, U, "a builtin_function_or_method", "lk.predict"),
    "nothing": ([], D, "no outputs", "one batch"),
    "lengths that differ": (
        [{"ids": T(2, 7)}, {"ids": T(2, 9)}], D,
        "output['ids'] as a Tensor of shape (*, 7) in batch 0, and as a Tensor of shape (*, 9) in",
        "padded to one",
    ),
    "dimensions that differ": ([T(2), T(2, 1)], D, "shape (*, 1)", "of one form"),
    "a scalar among tensors": ([T(2), T(())], D, "without a dimension in batch 1", "of one form"),
    "keys that differ": (
        [{"a": 1}, {"a": 1}, {"a": 1, "b": 2}], D, "a dict of ['a', 'b'] in batch 2", "of one form",
    ),
    "tuples of two lengths": ([(1,), (1, 2)], D, "a tuple of ['0', '1']", "of one form"),
    "a tensor that is not always there": ([(T(1),), (None,)], D, "output[0] as", "of one form"),
    "a mapping that is not always there": ([{"a": 1}, T(1)], D, "a Tensor of shape", "of one form"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_joined_is_an_error_that_teaches(case):
    """It says where in the outputs, in which batch, and what to write."""
    outputs, kind, found, remedy = WRONG[case]
    with pytest.raises(kind) as caught:
        lk.collect(outputs)
    assert caught.value.wrote == "lk.collect(outputs)"
    assert found in caught.value.found
    assert remedy in caught.value.instead
