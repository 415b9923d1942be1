"""Files of tensors, in the safetensors format: copied to host memory, written, and read."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.checkpoint.messages import ANOTHER_COPY, RESTORE
from loopkit.errors import DamageError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
CHUNK = 1 << 24  # bytes written, or read, at once


@attrs.frozen(eq=False)
class TensorFile:
    """The contents of a safetensors file, in host memory.

    Attributes:
        header: Its first bytes: length, and JSON with the place of each tensor.
        body: All tensors, one after the other; uint8.
        tensors: Each of them, in that memory.
    """

    header: bytes
    body: Tensor
    tensors: Mapping[str, Tensor]

    def fits(self, tensors: Mapping[str, Tensor], *, pinned: bool) -> bool:
        """Whether other tensors, of any device, would be laid out in the very same way."""
        return (
            self.body.is_pinned() == pinned
            and self.tensors.keys() == tensors.keys()
            and all(
                t.dtype is tensors[n].dtype and t.shape == tensors[n].shape
                for n, t in self.tensors.items()
            )
        )

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the file, in order."""
        yield memoryview(self.header)
        view = memoryview(self.body.numpy())  # type: ignore[arg-type]
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]


Places = dict[str, tuple[int, int]]


def _places(tensors: Mapping[str, Tensor]) -> Places:
    """Where each tensor begins and ends; wide types first, so that each is aligned.

    Large ones come before small ones: shifted by a single number, copying takes a tenth longer.
    """
    places, end = {}, 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), -tensors[n].numel())):
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        places[name] = begin, end
    return places


def _header(
    tensors: Mapping[str, Tensor], places: Places, metadata: Mapping[str, str] | None
) -> bytes:
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, place in places.items():
        dtype, shape = DTYPES[tensors[name].dtype], [*tensors[name].shape]
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [*place]}
    text = json.dumps(described, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_to_host(
    tensors: Mapping[str, Tensor],
    into: TensorFile | None = None,
    metadata: Mapping[str, str] | None = None,
) -> TensorFile:
    """A copy of the tensors as they are now, laid out as in the file.

    Args:
        tensors: By name, on any device.
        into: An earlier copy, to be written over where the tensors are like those: copying into
            memory that was used before is many times faster than into fresh memory.
        metadata: Text that the file carries.

    Example:
        >>> copy_to_host({"a": torch.ones(2)}).body.view(torch.float32)
        tensor([1., 1.])
    """
    pinned = any(tensor.device.type in {"cuda", "xpu"} for tensor in tensors.values())
    if into is None or not into.fits(tensors, pinned=pinned):
        into = _laid_out(tensors, metadata, pinned=pinned)
    if tensors:
        with torch.no_grad():
            sources = [tensors[name] for name in into.tensors]
            torch._foreach_copy_([*into.tensors.values()], sources, non_blocking=pinned)
    for device in {tensor.device for tensor in tensors.values()} if pinned else ():
        if device.type != "cpu":
            torch.accelerator.current_stream(device).synchronize()
    return into


def _laid_out(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, *, pinned: bool
) -> TensorFile:
    """Memory for a copy of the tensors."""
    places = _places(tensors)
    size = max((end for _, end in places.values()), default=0)
    body = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    copies = {
        name: body[begin:end].view(tensors[name].dtype).view(tensors[name].shape)
        for name, (begin, end) in places.items()
    }
    return TensorFile(_header(tensors, places, metadata), body, copies)


def parse(data: bytearray) -> dict[str, Tensor]:
    """The tensors of a file, sharing its memory; nothing in it is trusted.

    Raises:
        DamageError, ValueError, TypeError, KeyError: If it is not as `copy_to_host` lays it out.

    Example:
        >>> file = copy_to_host({"a": torch.ones(2)})
        >>> parse(bytearray(b"".join(file.chunks())))
        {'a': tensor([1., 1.])}
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data) or start % 8:
        raise DamageError(RESTORE, "a header that does not fit its file", ANOTHER_COPY)
    described = json.loads(data[8:start])
    described.pop("__metadata__", None)
    return {name: _tensor(data, start, **entry) for name, entry in described.items()}


def _tensor(
    data: bytearray, start: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> Tensor:
    begin, end = data_offsets
    kind = BY_NAME[dtype]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise DamageError(RESTORE, "offsets that are no whole numbers", ANOTHER_COPY)
    if end - begin != math.prod(shape) * kind.itemsize or begin % kind.itemsize:
        raise DamageError(RESTORE, "offsets that do not fit the shape", ANOTHER_COPY)
    if start + end > len(data):
        raise DamageError(RESTORE, "offsets past the end of the file", ANOTHER_COPY)
    if begin == end:
        return torch.empty(shape, dtype=kind)
    count = (end - begin) // kind.itemsize
    return torch.frombuffer(data, dtype=kind, count=count, offset=start + begin).view(shape)
