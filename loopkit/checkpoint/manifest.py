"""The manifest: what a checkpoint holds, with the size and checksum of each of its files."""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable
from typing import Any

import attrs
from attrs.validators import and_, deep_mapping, ge, instance_of, matches_re, not_, optional

from loopkit.checkpoint.messages import ANOTHER_COPY, RESTORE
from loopkit.errors import CheckpointError, DamageError

MANIFEST = "manifest.json"
FORMAT = "loopkit checkpoint"
VERSION = 2  # 1 where no tensor lies in parts, which an older loopkit reads
LIMIT = 1 << 24  # bytes
PIECES = re.compile(r"part-\d{5,}\.safetensors")  # what a rank wrote of tensors in parts
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,115}\.(safetensors|json)")


_whole: Any = and_(instance_of(int), not_(instance_of(bool)), ge(0))


@attrs.frozen
class File:
    """Size and checksums of a file.

    Example:
        >>> File.of([memoryview(b"abc")])
        File(size=3, crc32='352441c2', sha256=None)
    """

    size: int = attrs.field(validator=_whole)
    crc32: str = attrs.field(validator=matches_re(r"[0-9a-f]{8}"))
    sha256: str | None = attrs.field(default=None, validator=optional(matches_re(r"[0-9a-f]{64}")))

    @classmethod
    def of(cls, chunks: Iterable[memoryview], *, sha256: bool = False) -> "File":
        """Those of what is in these bytes, one after the other."""
        size = crc32 = 0
        strong = hashlib.sha256() if sha256 else None
        for chunk in chunks:
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
            if strong is not None:
                strong.update(chunk)
        return cls(size, f"{crc32:08x}", None if strong is None else strong.hexdigest())


@attrs.frozen
class Manifest:
    """What is in a checkpoint.

    Attributes:
        step: Updates so far.
        epoch: Epochs finished.
        samples: Samples taken so far.
        serial: How manyth save of its folder this is; the order of checkpoints.
        world_size: Number of processes that wrote it.
        scores: Of the evaluation it was saved with.
        parts: Name and class of each part of the state.
        files: Name, size and checksums of each file.
    """

    step: int = attrs.field(validator=_whole)
    epoch: int = attrs.field(validator=_whole)
    samples: int = attrs.field(validator=_whole)
    serial: int = attrs.field(validator=[_whole, ge(1)])
    world_size: int = attrs.field(validator=[_whole, ge(1)])
    scores: dict[str, float] = attrs.field(
        validator=deep_mapping(instance_of(str), instance_of(float), instance_of(dict))
    )
    parts: dict[str, str] = attrs.field(
        validator=deep_mapping(instance_of(str), instance_of(str), instance_of(dict))
    )
    files: dict[str, File] = attrs.field(
        validator=deep_mapping(matches_re(FILE_NAME), instance_of(File), instance_of(dict))
    )

    def to_bytes(self) -> bytes:
        """The manifest as JSON, with its own checksum.

        Example:
            >>> manifest = Manifest(1, 0, 8, 1, 1, {"loss": 0.5}, {"model": "Linear"}, {})
            >>> Manifest.from_bytes(manifest.to_bytes()) == manifest
            True
        """
        body = attrs.asdict(self)
        # JSON has no number for these; and floats as text keep their last bit everywhere
        body["scores"] = {name: repr(score) for name, score in self.scores.items()}
        version = VERSION if any(map(PIECES.fullmatch, self.files)) else 1
        return _signed({"format": FORMAT, "version": version, **body})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read it, trusting nothing in it.

        Raises:
            DamageError: If a byte of it is not as it was written.
            CheckpointError: If a later version of loopkit wrote it.
        """
        try:
            body = _checked(data)
            if body["version"] > VERSION:
                raise CheckpointError(
                    RESTORE,
                    f"version {body['version']!r:.20} of the format; this loopkit reads {VERSION}",
                    "pip install --upgrade torch-loopkit",
                )
            body = {key: body[key] for key in body if key not in {"format", "version"}}
            body["scores"] = {name: float(text) for name, text in body["scores"].items()}
            body["files"] = {name: File(**entry) for name, entry in body["files"].items()}
            return cls(**body)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamageError(
                RESTORE, f"{MANIFEST} damaged ({type(error).__name__}: {error})"[:200], ANOTHER_COPY
            ) from error


def _signed(body: dict[str, Any]) -> bytes:
    crc32 = f"{zlib.crc32(_dump(body)):08x}"
    return _dump({**body, "crc32": crc32})


def _dump(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode("ascii")


def _checked(data: bytes) -> dict[str, Any]:
    """The body, if writing it again gives the very same bytes."""
    body: dict[str, Any] = json.loads(data)
    body.pop("crc32")
    if _signed(body) != data or body["format"] != FORMAT:
        raise DamageError(RESTORE, f"{MANIFEST} damaged (crc32)", ANOTHER_COPY)
    return body
