"""What is written is what is read: every kind of plain data, exactly."""

import enum
import http
import json
import math
from collections import Counter, OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.checkpoint.format import Decoder, Encoder
from loopkit.checkpoint.read import MALFORMED
from loopkit.checkpoint.tensors import DTYPES, copy_to_host, parse
from loopkit.errors import DamageError, UsageError

from trainings import digest


def round_trip(value):
    """Through the very bytes that a checkpoint has on disk."""
    encoder = Encoder()
    tree = json.dumps(encoder.encode({"part": value}), allow_nan=False)
    files = {}
    for name, tensors in encoder.files.items():
        files[name] = parse(bytearray(b"".join(copy_to_host(tensors).chunks())))
    return Decoder(files).decode(json.loads(tree))["part"]


def tensors_of_every_kind():
    for dtype in [*DTYPES, torch.complex128]:
        for shape in [(), (0,), (3,), (2, 0, 3), (2, 3)]:
            raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
            yield raw.contiguous().view(dtype).reshape(shape)


def test_tensors_of_every_dtype_and_shape_come_back_bit_for_bit():
    """Every dtype of the format, 0-d, empty and not."""
    values = [*tensors_of_every_kind()]
    assert digest(round_trip(values)) == digest(values)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[1:, 1],
        lambda t: t.expand(3, 4, 6),
        lambda t: torch.complex(t, t).conj(),
        lambda t: torch.complex(t, t).conj().imag,
        lambda t: t.to(memory_format=torch.contiguous_format).requires_grad_(),
        lambda t: torch.tensor([math.nan, -math.inf, -0.0, 5e-324], dtype=torch.float64),
    ],
)
def test_tensors_that_are_views_come_back_as_what_they_show(make):
    """Transposed, strided, expanded, conjugated, and with odd numbers in them."""
    tensor = make(torch.randn(4, 6))
    back = round_trip(tensor)
    assert digest(back) == digest(tensor.resolve_conj().resolve_neg())
    assert not back.requires_grad


def test_a_tensor_in_two_places_is_written_once_and_read_as_one():
    """Tied weights take their size once, and stay tied; views that only overlap do not."""
    weight = torch.randn(100)
    back = round_trip({"a": weight, "b": weight.detach(), "c": weight[:50], "d": weight.clone()})
    encoder = Encoder()
    encoder.encode({"part": {"a": weight, "b": weight.detach()}})
    assert len(encoder.files["part"]) == 1
    assert back["a"] is back["b"]
    back["a"].zero_()
    assert torch.equal(back["c"], weight[:50])
    assert torch.equal(back["d"], weight)


VALUES = [
    None, True, False, 0, -1, 2**200, 0.1, 5e-324, 1.7976931348623157e308, -0.0, "",
    "a\nb\0é\ud800",
    math.nan, math.inf, -math.inf, 1 + 2j, complex(math.nan, -0.0), b"\x00\xff", (), (1,),
    (1, (2, [])),
    [], {}, {1: "int", "1": "text", (1, 2): "tuple", None: 0, False: 1, 1.5: 2, b"a": 3},
    {"$tensor": ["a", "b"]}, {"$": 1}, {"$tuple": [1], "b": 2}, {"a": {0: {1: {}}}}, set(),
    {1, 2, "a"},
    frozenset({(1, 2)}), OrderedDict(b=1, a=2), Counter({3: 2, 7: 1}), torch.float32,
    torch.bfloat16,
    torch.device("cuda:1"), torch.Size([2, 3]), np.arange(6).reshape(2, 3),
    np.float32(1.5), np.float64(0.1), np.int64(3), np.bool_(True),
    np.zeros((0, 2)), np.array(5), np.arange(6)[::-2],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_come_back_with_their_types(value):
    """Numbers, text and containers keep value, type and order."""
    back = round_trip({"value": value})["value"]
    assert digest(back) == digest(value)


class Color(enum.StrEnum):
    RED = "red"


def test_members_of_an_enum_come_back_as_their_values():
    """They equal them; a class is never looked up by a name in a file."""
    back = round_trip([Color.RED, http.HTTPStatus.OK])
    assert back == [Color.RED, http.HTTPStatus.OK]
    assert [type(value) for value in back] == [str, int]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.just("$dict"), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_any_nesting_comes_back_exactly(value):
    """Whatever plain data is nested in whatever way."""
    back = round_trip({"value": value})["value"]
    assert repr(back) == repr(value)


def itself():
    loop = []
    loop.append(loop)
    return loop


REFUSED = {
    "an object": lambda: object(),
    "a function": lambda: print,
    "a class": lambda: int,
    "a named tuple": lambda: torch.max(torch.ones(2, 2), dim=0),
    "a default dict": lambda: __import__("collections").defaultdict(list),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a meta tensor": lambda: torch.ones(3, device="meta"),
    "a quantized tensor": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "a tensor as a key": lambda: {torch.ones(1): 1},
    "an array of objects": lambda: np.array([object()]),
    "a list that holds itself": itself,
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning")
def test_what_is_no_plain_data_is_refused_with_its_place(case):
    """What could not come back as it was is refused, naming where it is."""
    with pytest.raises(UsageError, match=r"extras\.mine"):
        Encoder().encode({"extras": {"mine": REFUSED[case]()}})


def test_files_of_tensors_are_safetensors():
    """The safetensors library reads what is written, and its files are read here."""
    tensors = {
        "a": torch.randn(3, 2, dtype=torch.bfloat16),
        "b.c": torch.arange(5),
        "é": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    data = b"".join(copy_to_host(tensors, metadata={"format": "pt"}).chunks())
    theirs = safetensors.torch.load(data)
    ours = parse(bytearray(safetensors.torch.save(tensors)))
    for name, tensor in tensors.items():
        assert digest(theirs[name]) == digest(tensor)
        assert digest(ours[name]) == digest(tensor)


HEADERS = [
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
    {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}},
    {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
    {"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "stride": [0]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    {"a": [1]},
    {"a": {}},
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_headers_that_lie_are_refused(header):
    """Offsets, shapes and types that do not fit each other or the file never reach memory."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with pytest.raises(MALFORMED):
        parse(bytearray(len(text).to_bytes(8, "little") + text + bytes(8)))


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xff" * 8, b"\xff" * 64, bytes(8), b"\x08" + bytes(15)]
)
def test_files_that_are_none_are_refused(data):
    """Too short, a header of any length: an error, no allocation."""
    with pytest.raises(MALFORMED):
        parse(bytearray(data))


TREES = [
    {"$unknown": 1}, {"$dtype": "load"}, {"$dtype": "__name__"}, {"$tensor": ["a", "b"]},
    {"$tensor": 1},
    {"$dict": [1]}, {"$dict": [[[], 1]]}, {"$set": [[]]}, {"$device": "import os"}, {"$float": "x"},
    {"$bytes": "*"}, {"$size": ["a"]}, {"$array": 1}, {"$complex128": 1}, {"$counter": [[1]]},
]  # fmt: skip


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_trees_that_lie_are_refused(tree):
    """A tag that is none, or holds something else, is an error and nothing more."""
    with pytest.raises(MALFORMED):
        Decoder({}).decode(tree)


def test_deep_nesting_is_refused_on_reading():
    """A tree that would overflow the stack is an error."""
    tree = []
    for _ in range(5000):
        tree = [tree]
    with pytest.raises(DamageError, match="too deep"):
        Decoder({}).decode(tree)
