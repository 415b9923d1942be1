"""Nested plain data as JSON with named tensors beside it, and back, exactly."""

import base64
import json
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.checkpoint.messages import ANOTHER_COPY, PLAIN_DATA, RESTORE, SAVE
from loopkit.checkpoint.tensors import BY_NAME, DTYPES
from loopkit.errors import DamageError, UsageError
from loopkit.parts import Part, Scattered

Json = Any
Path = tuple[str, ...]
PLAIN = {type(None), bool, int, str}  # what JSON has itself
DEPTH = 100  # of nesting: far more than a state needs, far less than Python's stack


@attrs.define
class Encoder:
    """Turns a tree into JSON, and collects its tensors by file and name.

    Two places that hold the very same tensor (tied weights) refer to one copy of it.

    Attributes:
        files: The tensors, by the first key on the way to them and a name made of the rest.
        parts: What this process has of tensors in parts, by all keys on the way to them.
    """

    files: dict[str, dict[str, Tensor]] = attrs.field(factory=dict)
    parts: dict[str, Part] = attrs.field(factory=dict)
    _seen: dict[tuple[Any, ...], Json] = attrs.field(factory=dict)

    def encode(self, value: Any, path: Path = ()) -> Json:
        """The JSON that stands for `value`.

        Raises:
            UsageError: For what is no plain data, naming where it is.

        Example:
            >>> Encoder().encode({"a": (1, float("nan")), "b": {0: None}})
            {'a': {'$tuple': [1, {'$float': 'nan'}]}, 'b': {'$dict': [[0, None]]}}
        """
        if type(value) in PLAIN:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if len(path) > DEPTH:
            raise UsageError(SAVE, f"nesting without end at {_at(path[:5])}", PLAIN_DATA)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if type(value) is Part:
            return self._part(value, path)
        return self._container(value, path)

    def _container(self, value: Any, path: Path) -> Json:
        kind = type(value)
        if kind is list:
            return self._items(value, path)
        if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        if kind in MAPPINGS:
            return {MAPPINGS[kind]: self._pairs(value, path)}
        if kind in SEQUENCES:
            tag, items = SEQUENCES[kind]
            return {tag: self._items(items(value), path)}
        if kind in LEAVES:
            tag, write = LEAVES[kind]
            return {tag: write(value)}
        return self._other(value, path)

    def _items(self, values: Iterable[Any], path: Path) -> Json:
        values = [*values]
        if PLAIN.issuperset(map(type, values)):  # the hundreds of a random generator's state
            return values
        return [self.encode(value, (*path, str(i))) for i, value in enumerate(values)]

    def _pairs(self, values: Mapping[Any, Any], path: Path) -> Json:
        encoded = []
        for key, value in values.items():
            if isinstance(key, Tensor):
                raise UsageError(SAVE, f"a tensor as a key at {_at(path)}", PLAIN_DATA)
            encoded.append([self.encode(key, path), self.encode(value, (*path, str(key)))])
        return encoded

    def _tensor(self, tensor: Tensor, path: Path) -> Json:
        _check_tensor(tensor, path)
        if tensor.dtype is torch.complex128:
            return {"$complex128": self._tensor(torch.view_as_real(tensor.resolve_conj()), path)}
        key = identity(tensor)
        if key not in self._seen:
            file = self.files.setdefault(path[0], {})
            name = "/".join(path[1:])
            while name in file or name in {"", "__metadata__"}:
                name += "_"
            file[name] = tensor
            self._seen[key] = {"$tensor": [path[0], name]}
        return self._seen[key]

    def _part(self, part: Part, path: Path) -> Json:
        if part.tensor.dtype not in DTYPES:
            raise UsageError(SAVE, f"a tensor of {part.tensor.dtype} at {_at(path)}", PLAIN_DATA)
        self.parts["/".join(path)] = part
        return {"$parts": ["/".join(path), [*part.shape], DTYPES[part.tensor.dtype]]}

    def _other(self, value: Any, path: Path) -> Json:
        numpy = sys.modules.get("numpy")
        if isinstance(value, str | bytes):  # of a StrEnum or of NumPy: equal to their values
            return self.encode(str.__str__(value) if isinstance(value, str) else bytes(value), path)
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            tag = "$array" if isinstance(value, numpy.ndarray) else "$scalar"
            try:
                native = numpy.array(value, dtype=value.dtype.newbyteorder("="))
                return {tag: self._tensor(torch.from_numpy(native), path)}
            except TypeError as error:
                found = f"a NumPy array of dtype {value.dtype} at {_at(path)}"
                raise UsageError(SAVE, found, PLAIN_DATA) from error
        if isinstance(value, int | float):  # of an IntEnum
            return self.encode(json.loads(json.dumps(value)), path)
        found = f"a {type(value).__module__}.{type(value).__qualname__} at {_at(path)}"
        raise UsageError(SAVE, found, PLAIN_DATA)


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are one in memory."""
    if tensor.numel() == 0:  # which has no memory to share
        return (id(tensor),)
    place = tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *place, tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _check_tensor(tensor: Tensor, path: Path) -> None:
    if type(tensor) not in {Tensor, nn.Parameter}:
        raise UsageError(SAVE, f"a {type(tensor).__qualname__} at {_at(path)}", PLAIN_DATA)
    if tensor.layout is not torch.strided or tensor.is_meta:
        found = f"a tensor of layout {tensor.layout} on {tensor.device} at {_at(path)}"
        raise UsageError(SAVE, found, PLAIN_DATA)
    if tensor.dtype not in DTYPES and tensor.dtype is not torch.complex128:
        raise UsageError(SAVE, f"a tensor of {tensor.dtype} at {_at(path)}", PLAIN_DATA)


def _at(path: Path) -> str:
    return ".".join(path)


@attrs.define
class Decoder:
    """Turns JSON back into the tree; what it does not know raises, and nothing is executed.

    Attributes:
        files: The tensors by file and name.
        used: The names that were asked for.
        scattered: Those that lie in parts, by name.
    """

    files: Mapping[str, Mapping[str, Tensor]]
    used: set[tuple[str, str]] = attrs.field(factory=set)
    scattered: dict[str, Scattered] = attrs.field(factory=dict)

    def decode(self, node: Json, depth: int = 0) -> Any:
        """What the JSON stands for.

        Raises:
            DamageError, ValueError, TypeError, KeyError: For what `Encoder` cannot have written.

        Example:
            >>> Decoder({}).decode({"a": {"$tuple": [1, {"$float": "nan"}]}})
            {'a': (1, nan)}
        """
        if depth > 4 * DEPTH:  # a level of the tree is up to three of JSON
            raise DamageError(RESTORE, "a tree nested too deep", ANOTHER_COPY)
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        if len(node) == 1 and (tag := next(iter(node))).startswith("$"):
            return self._tagged(tag, node[tag], depth + 1)
        return {key: self.decode(value, depth + 1) for key, value in node.items()}

    def _tagged(self, tag: str, node: Json, depth: int) -> Any:
        if tag == "$tensor":
            return self._tensor(*node)
        if tag == "$parts":
            return self._scattered(*node)
        if tag in FROM_LEAF:
            return FROM_LEAF[tag](node)
        return FROM_TREE[tag](self.decode(node, depth))

    def _tensor(self, file: str, name: str) -> Tensor:
        self.used.add((file, name))
        return self.files[file][name]  # the same one each time: what was tied stays tied

    def _scattered(self, name: str, shape: list[int], dtype: str) -> Scattered:
        self.scattered[name] = Scattered(torch.Size(shape), BY_NAME[dtype])
        return self.scattered[name]


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise DamageError(RESTORE, f"{name!r:.60} as a dtype", ANOTHER_COPY)
    return found


def _in_order(values: set[Any] | frozenset[Any]) -> list[Any]:
    return sorted(values, key=repr)


# For each type what stands for a value: text or numbers (LEAVES), or a list of further values
# (SEQUENCES) or of pairs (MAPPINGS). Read backwards they decode.
LEAVES: dict[type, tuple[str, Callable[[Any], Json]]] = {
    torch.Size: ("$size", list),
    complex: ("$complex", repr),
    bytes: ("$bytes", lambda value: base64.b64encode(value).decode("ascii")),
    torch.dtype: ("$dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("$device", str),
}
FROM_LEAF: dict[str, Callable[[Json], Any]] = {
    "$float": float,
    "$size": torch.Size,
    "$complex": complex,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$dtype": _dtype,
    "$device": torch.device,
}
SEQUENCES: dict[type, tuple[str, Callable[[Any], Iterable[Any]]]] = {
    tuple: ("$tuple", iter),
    set: ("$set", _in_order),
    frozenset: ("$frozenset", _in_order),
}
MAPPINGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}
FROM_TREE: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$dict": dict,
    "$ordered": OrderedDict,
    "$counter": lambda pairs: Counter(dict(pairs)),
    "$complex128": torch.view_as_complex,
    "$array": lambda tensor: tensor.numpy(),
    "$scalar": lambda tensor: tensor.numpy()[()],
}
