"""Tensors in parts: which rank writes which part, and reading those that a rank needs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.checkpoint.disk import read_checked
from loopkit.checkpoint.folder import Checkpoint
from loopkit.checkpoint.format import identity
from loopkit.checkpoint.manifest import PIECES, File
from loopkit.checkpoint.messages import ANOTHER_COPY, RESTORE
from loopkit.checkpoint.tensors import parse
from loopkit.errors import DamageError
from loopkit.parts import Part, Scattered
from loopkit.ranks import Ranks

Held = tuple[str, tuple[int, ...], tuple[int, ...], int]
"""What a rank has of a tensor: the name it is stored under, start and sizes, and its bytes."""


def name_of(rank: int) -> str:
    """What the file is called, less its ending, into which a rank writes its parts."""
    return f"part-{rank:05d}"


def _file(rank: int) -> str:
    return f"{name_of(rank)}.safetensors"


@attrs.frozen
class Plan:
    """Which rank writes which parts.

    Attributes:
        index: For each tensor its pieces: the rank whose file holds it, its name there, where
            it begins in the whole, and its sizes.
        mine: What this rank writes.
    """

    index: dict[str, list[list[Any]]]
    mine: dict[str, Tensor]


def plan(ranks: Ranks, parts: Mapping[str, Part]) -> Plan:
    """Share out the writing: what several ranks hold, the least laden of them writes.

    All ranks have to call it; what travels is names and numbers.
    """
    stored: dict[Any, str] = {}  # tied weights are written once
    here = {n: p for n, p in parts.items() if p.tensor.numel() and not p.tensor.is_meta}
    names = {name: stored.setdefault(identity(p.tensor), name) for name, p in here.items()}
    held: dict[str, Held] = {
        name: (names[name], part.start, (*part.tensor.shape,), part.tensor.nbytes)
        for name, part in here.items()
    }
    everyone = ranks.everyone(held)
    writers = _writers(everyone)
    index: dict[str, list[list[Any]]] = {}
    for name in dict.fromkeys(name for held in everyone for name in held):
        found = {h[name][1]: h[name] for h in reversed(everyone) if name in h}
        index[name] = [
            [writers[kept, start], kept, [*start], [*sizes]]
            for start, (kept, _, sizes, _) in sorted(found.items())
        ]
    mine = {
        name: part.tensor
        for name, part in here.items()
        if names[name] == name and writers[name, part.start] == ranks.number
    }
    return Plan(index, mine)


def _writers(everyone: Sequence[Mapping[str, Held]]) -> dict[tuple[str, tuple[int, ...]], int]:
    holders: dict[tuple[str, tuple[int, ...]], tuple[int, set[int]]] = {}
    for rank, held in enumerate(everyone):
        for kept, start, _, size in held.values():
            holders.setdefault((kept, start), (size, set()))[1].add(rank)
    load, writers = [0] * len(everyone), {}
    for key, (size, ranks) in sorted(holders.items(), key=lambda item: (-item[1][0], item[0])):
        writers[key] = min(ranks, key=lambda rank: (load[rank], rank))
        load[writers[key]] += size
    return writers


@attrs.frozen
class Pieces:
    """The tensors of a checkpoint that lie in parts.

    Attributes:
        scattered: The tensors by name.
        index: As of `Plan`.
    """

    scattered: dict[str, Scattered] = attrs.field(factory=dict)
    index: dict[str, list[list[Any]]] = attrs.field(factory=dict)

    def check(self, files: Mapping[str, File]) -> None:
        """Check, before memory is taken for them, that the tensors are all there, and no more.

        Raises:
            DamageError, ValueError, TypeError, KeyError: If they do not.
        """
        found = {_file(rank) for pieces in self.index.values() for rank, *_ in pieces}
        if found != {name for name in files if PIECES.fullmatch(name)}:
            raise DamageError(RESTORE, "other files of parts than the index says", ANOTHER_COPY)
        if self.index.keys() - self.scattered.keys():
            raise DamageError(RESTORE, "parts that nothing refers to", ANOTHER_COPY)
        for name, whole in self.scattered.items():
            pieces = self.index.get(name, [])
            numbers = [n for _, _, start, sizes in pieces for n in (*start, *sizes)]
            if not all(type(n) is int and n >= 0 for n in (*whole.shape, *numbers)):
                raise DamageError(RESTORE, f"the parts of {name!r:.60}", ANOTHER_COPY)
            if len({rank for rank, *_ in pieces}) < len(pieces):  # and so they are not too many
                raise DamageError(RESTORE, f"{name!r:.60} twice in one file", ANOTHER_COPY)
            available = sum(files[_file(rank)].size for rank, *_ in pieces)
            if not _cover(whole, pieces) or whole.shape.numel() * whole.dtype.itemsize > available:
                raise DamageError(RESTORE, f"{name!r:.60} without all its parts", ANOTHER_COPY)

    def fill(self, checkpoint: Checkpoint, rank: int = 0, size: int = 1) -> None:
        """Read what is wanted; of the files that this rank needs nothing of, every `size`-th.

        So each file is read and checked by a rank at least, one at a time.

        Raises:
            DamageError: If one is missing, or not as it was written.
        """
        files = checkpoint.manifest.files
        for number, (name, held) in enumerate(sorted(self._by_file().items())):
            needed = any(p.common(w) for s, _, p in held for w in s.wanted)
            if needed or number % size == rank:
                tensors = parse(read_checked(checkpoint.path / name, files[name]))
                _check_contents(name, tensors, held)
                for scattered, kept, part in held:
                    for wanted in scattered.wanted:
                        attrs.evolve(part, tensor=tensors[kept]).copy_to(wanted)

    def _by_file(self) -> dict[str, list[tuple[Scattered, str, Part]]]:
        """What each file holds: the tensor, the name of the piece, and which part of it that is."""
        files: dict[str, list[tuple[Scattered, str, Part]]] = {}
        for name, pieces in self.index.items():
            whole = self.scattered[name]
            for rank, kept, start, sizes in pieces:
                empty = torch.empty(sizes, dtype=whole.dtype, device="meta")
                part = Part(whole.shape, tuple(start), empty)
                files.setdefault(_file(rank), []).append((whole, kept, part))
        return files


def _cover(whole: Scattered, pieces: Sequence[Sequence[Any]]) -> bool:
    empty = [torch.empty(sizes, device="meta") for _, _, _, sizes in pieces]
    parts = [Part(whole.shape, (*p[2],), e) for p, e in zip(pieces, empty, strict=True)]
    inside = all(len(p.start) == len(p.tensor.shape) == len(whole.shape) for p in parts) and all(
        end <= most for p in parts for end, most in zip(p.ends, whole.shape, strict=True)
    )
    apart = not any(a.common(b) for i, a in enumerate(parts) for b in parts[:i])
    return inside and apart and sum(p.tensor.numel() for p in parts) == math.prod(whole.shape)


def _check_contents(
    name: str, tensors: Mapping[str, Tensor], held: Sequence[tuple[Scattered, str, Part]]
) -> None:
    expected = {kept: (part.tensor.shape, part.tensor.dtype) for _, kept, part in held}
    if {kept: (tensor.shape, tensor.dtype) for kept, tensor in tensors.items()} != expected:
        raise DamageError(RESTORE, f"{name} damaged (other tensors than the index)", ANOTHER_COPY)
