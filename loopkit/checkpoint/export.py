"""Weights by themselves: out to a safetensors file, and in with a report."""

import contextlib
import importlib
import secrets
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor, nn

from loopkit.checked import check_model
from loopkit.checkpoint.commit import write_file
from loopkit.checkpoint.difference import frozen_names, mismatched, shown, without
from loopkit.checkpoint.disk import Disk, is_folder, read_bytes
from loopkit.checkpoint.folder import read_checkpoint
from loopkit.checkpoint.format import Encoder
from loopkit.checkpoint.read import read_model
from loopkit.checkpoint.remote import Place, Remote, place_of
from loopkit.checkpoint.tensors import copy_to_host
from loopkit.errors import CheckpointError, UsageError
from loopkit.ranks import ALONE, together
from loopkit.state import TrainState


@attrs.frozen
class WeightsReport:
    """What `load_weights` found; printing it gives a line for each finding.

    Attributes:
        loaded: Names of the model's tensors that were loaded.
        missing: Names that only the model has: these keep the values they had.
        unexpected: Names that only the file has.
        mismatched: Names whose shapes differ.

    Example:
        >>> print(WeightsReport(("weight",), (), ("bias",), ()))
        1 loaded
        1 unexpected in the file: bias
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        findings = {
            "missing in the file": self.missing,
            "unexpected in the file": self.unexpected,
            "of another shape": self.mismatched,
        }
        lines = [
            f"{len(names)} {what}: {shown([*names])}" for what, names in findings.items() if names
        ]
        return "\n".join([f"{len(self.loaded)} loaded", *lines])


def export(state: TrainState | nn.Module, path: str | Place, *, frozen: bool = True) -> Place:
    """Write the model's weights to a safetensors file: complete, or not at all.

    The keys are those of `model.state_dict()`; weights that are tied are written once, and
    named in the file's metadata. Within `with lk.ema_weights(state)` it writes the averages.
    Of several ranks all have to call it, with the state; the first one puts the weights
    together in its host memory, and writes.

    Args:
        state: A state, or a model.
        path: The file; its folder is made, and a file that is there is replaced. Or an address
            in an object store.
        frozen: Write parameters that do not require gradients, too; False leaves what adapters
            are. `load_weights(model, path, strict=False)` reports those as missing.

    Returns:
        The path.

    Raises:
        UsageError: If the model's state holds what is no tensor, or there is no model.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export(nn.Linear(2, 1), f"{folder}/model.safetensors")
        ...     print(load_weights(nn.Linear(2, 1), path))
        2 loaded
    """
    if not isinstance(state, TrainState | nn.Module):
        raise UsageError(
            f"lk.export(state, {str(path)!r:.80})",
            f"a {type(state).__name__}",
            "a state or a model first, and the path second",
        )
    model = state if isinstance(state, nn.Module) else state.model
    ranks = ALONE if isinstance(state, nn.Module) else state.ranks
    weights = model.state_dict()
    weights = ranks.whole(without(weights, [] if frozen else frozen_names(model, weights)))
    place: Place = together(
        ranks, f"lk.export(state, {str(path)!r})", lambda: _write(weights, path)
    )
    return place


def _write(weights: dict[str, Any], path: str | Place) -> Place:
    path, encoder = place_of(path), Encoder()
    tree = encoder.encode({"model": weights})["model"]
    if others := [n for n, node in tree.items() if not (type(node) is dict and "$tensor" in node)]:
        raise UsageError(
            f"lk.export(state, {str(path)!r})",
            f"a model whose state_dict holds {shown(others)}, no plain tensors",
            "checkpoints.save(state), which holds other things as well",
        )
    names = {name: node["$tensor"][1] for name, node in tree.items()}
    tied = {name: kept for name, kept in names.items() if name != kept}
    contents = copy_to_host(encoder.files.get("model", {}), metadata={"format": "pt", **tied})
    if isinstance(path, Remote):
        path.write(contents.chunks())
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, contents.chunks())
    return path


def _replace(path: Path, chunks: Any) -> None:
    disk, temporary = Disk(), path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        write_file(disk, temporary, chunks)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove_file(temporary)
        raise
    disk.sync_folder(path.parent)


def load_weights(
    model: nn.Module, path: str | Place, *, strict: bool = True, prefix: str = ""
) -> WeightsReport:
    """Load weights into a model from a safetensors file, or from a checkpoint's folder.

    Args:
        model: Its tensors are written over, in place.
        path: What `export` or any other program wrote; or `checkpoints.best.path`. On disk, or
            in an object store.
        strict: Refuse, and change nothing, unless all names and shapes fit. Otherwise load
            what fits, and report the rest.
        prefix: Leave this beginning of the file's names away: `"module."`, `"_orig_mod."`.

    Returns:
        What was loaded, and what not.

    Raises:
        CheckpointError: If the file is none, or does not fit.
        DamageError: If the checkpoint is not intact.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export(nn.Linear(2, 1), f"{folder}/model.safetensors")
        ...     print(load_weights(nn.Linear(2, 1, bias=False), path, strict=False))
        1 loaded
        1 unexpected in the file: bias
    """
    check_model(model, f"lk.load_weights(model, {str(path)!r:.80})")
    weights = {n.removeprefix(prefix): w for n, w in _read_weights(place_of(path)).items()}
    here = model.state_dict()
    report = _compare(here, weights)
    fits = not (report.missing or report.unexpected or report.mismatched)
    if strict and not fits:
        raise CheckpointError(
            f"lk.load_weights(model, {str(path)!r})",
            f"weights that do not fit the model; nothing was loaded\n{report}".replace(
                "\n", "\n    "
            ),
            _remedy(report),
        )
    loaded = {name: weights[name] for name in report.loaded if name in weights}
    model.load_state_dict(_sharded_as(here, loaded), strict=False)
    return report


def _sharded_as(here: Mapping[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """Of the weights what this rank's part of the model takes, where it is in parts."""
    if "torch.distributed.tensor" not in sys.modules:  # slow to import, and then nothing is
        return weights
    from loopkit.parallel.repoint import like

    return {name: like(weight, here[name]) for name, weight in weights.items()}


def _compare(here: Mapping[str, Any], weights: Mapping[str, Any]) -> WeightsReport:
    wrong = mismatched(here, weights)
    loaded = [name for name in here if name in weights and name not in wrong]
    tied = {_place(here[name]) for name in loaded}
    loaded += [n for n in here if n not in weights and _place(here[n]) in tied]
    missing = [name for name in here if name not in loaded and name not in wrong]
    unexpected = [name for name in weights if name not in here]
    return WeightsReport(tuple(loaded), tuple(missing), tuple(unexpected), tuple(wrong))


def _place(tensor: Any) -> Any:
    """What two names of one tensor have in common."""
    if isinstance(tensor, Tensor) and tensor.numel():
        return tensor.data_ptr(), tensor.shape, tensor.stride()
    return object()


def _remedy(report: WeightsReport) -> str:
    for name in report.unexpected:
        for missing in report.missing:
            if name.endswith(missing) and name != missing:
                return f"lk.load_weights(model, path, prefix={name.removesuffix(missing)!r})"
    return "the model that the weights are of; or strict=False, to load what fits"


def _read_weights(path: Place) -> dict[str, Any]:
    if is_folder(path) or (isinstance(path, Path) and path.is_dir()):
        return read_model(read_checkpoint(path))
    if isinstance(path, Remote):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "weights.safetensors")
            local.write_bytes(read_bytes(path))
            return _read_weights(local)
    library: Any = importlib.import_module("safetensors")  # slow to import with its torch part
    try:
        with library.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tied = {k: v for k, v in (file.metadata() or {}).items() if v in weights}
    except library.SafetensorError as error:
        raise CheckpointError(
            f"lk.load_weights(model, {str(path)!r})",
            f"no safetensors file ({error})",
            "for a file of torch.save: torch.load(path, weights_only=True) in a program of your"
            " own, and model.load_state_dict",
        ) from error
    return {**{name: weights[kept] for name, kept in tied.items()}, **weights}
