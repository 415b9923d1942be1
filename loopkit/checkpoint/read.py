"""Reading a checkpoint: every byte checked before anything is made of it."""

import json
from collections.abc import Mapping
from typing import Any

import attrs

from loopkit.checkpoint.disk import read_checked
from loopkit.checkpoint.folder import Checkpoint
from loopkit.checkpoint.format import Decoder
from loopkit.checkpoint.manifest import PIECES
from loopkit.checkpoint.messages import ANOTHER_COPY, RESTORE
from loopkit.checkpoint.pieces import Pieces
from loopkit.checkpoint.tensors import parse
from loopkit.errors import DamageError
from loopkit.parts import Scattered, map_scattered

TREE = "tree.json"
TREE_LIMIT = 1 << 28  # bytes: what is large belongs into tensors


@attrs.frozen
class Loaded:
    """What a checkpoint holds, in host memory.

    Attributes:
        state: As `TrainState.state_dict` gave it.
        parameters: The optimizer's parameters by name, for each of its groups.
        frozen: The model's parameters that were left out, as they did not require gradients.
        pieces: What of the state is `Scattered`, and not read yet.
    """

    state: dict[str, Any]
    parameters: list[list[str]]
    frozen: list[str] = attrs.field(factory=list)
    pieces: Pieces = attrs.field(factory=Pieces)


MALFORMED = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    RecursionError,
    OverflowError,
)


def read(checkpoint: Checkpoint) -> Loaded:
    """Read a checkpoint but for what lies in parts; no code of it is executed.

    Raises:
        DamageError: If a file is missing or not as it was written, or does not fit the others.
    """
    files = checkpoint.manifest.files
    if TREE not in files or files[TREE].size > TREE_LIMIT:
        raise DamageError(RESTORE, f"no {TREE} of up to {TREE_LIMIT} bytes", ANOTHER_COPY)
    whole = [name for name in files if not PIECES.fullmatch(name)]
    data = {name: read_checked(checkpoint.path / name, files[name]) for name in whole}
    try:
        return _decoded(data, checkpoint)
    except DamageError:
        raise
    except MALFORMED as error:
        raise DamageError(
            RESTORE, f"{TREE} damaged ({type(error).__name__}: {error})"[:200], ANOTHER_COPY
        ) from error


def read_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """The weights of a checkpoint, whole.

    Raises:
        DamageError: As `read`.
    """
    loaded = read(checkpoint)
    weights: dict[str, Any] = map_scattered(Scattered.want_whole, loaded.state["model"])
    loaded.pieces.fill(checkpoint)
    return weights


def _decoded(data: dict[str, bytearray], checkpoint: Checkpoint) -> Loaded:
    tree = json.loads(data.pop(TREE))
    tensors = {name.removesuffix(".safetensors"): parse(data[name]) for name in data}
    decoder = Decoder(tensors)
    index = tree.pop("pieces", {})
    loaded = Loaded(**decoder.decode(tree), pieces=Pieces(decoder.scattered, index))
    _check_types(loaded)
    loaded.pieces.check(checkpoint.manifest.files)
    unread = {(f, n) for f, found in tensors.items() for n in found} - decoder.used
    if unread:
        raise DamageError(
            RESTORE, f"tensors that nothing refers to: {sorted(unread)[:3]}", ANOTHER_COPY
        )
    if missing := checkpoint.manifest.parts.keys() ^ parts_of(loaded.state).keys():
        raise DamageError(
            RESTORE, f"other parts than the manifest: {sorted(missing)}", ANOTHER_COPY
        )
    if loaded.state["clock"]["step"] != checkpoint.step:
        raise DamageError(RESTORE, f"a state of another step than {checkpoint.step}", ANOTHER_COPY)
    return loaded


def _check_types(loaded: Loaded) -> None:
    dicts = [loaded.state[name] for name in ("model", "clock", "features", "extras", "data", "rng")]
    dicts += [loaded.state["optimizer"]] if loaded.state["optimizer"] is not None else []
    groups = (loaded.state["optimizer"] or {}).get("param_groups", [])
    if not all(isinstance(part, dict) for part in [*dicts, *groups]) or not all(
        isinstance(names, list) for names in [loaded.parameters, *loaded.parameters, loaded.frozen]
    ):
        raise DamageError(RESTORE, f"{TREE} damaged (no state)", ANOTHER_COPY)


def parts_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a state dict, each feature and extra one by itself.

    Example:
        >>> parts_of({"model": 1, "features": {"ema": 2}, "extras": {}})
        {'model': 1, 'features.ema': 2}
    """
    parts = {}
    for name, part in state.items():
        if name in {"features", "extras"}:
            parts.update({f"{name}.{key}": value for key, value in part.items()})
        else:
            parts[name] = part
    return parts
