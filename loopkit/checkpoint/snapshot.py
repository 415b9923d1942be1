"""What goes into a checkpoint: the state, copied to host memory, and its manifest."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.check import NO_SCORE
from loopkit.checkpoint.difference import (
    classes_of,
    frozen_names,
    parameter_names,
    shown,
    without,
)
from loopkit.checkpoint.format import Encoder
from loopkit.checkpoint.manifest import Manifest
from loopkit.checkpoint.messages import SAVE
from loopkit.checkpoint.read import TREE, TREE_LIMIT, parts_of
from loopkit.checkpoint.tensors import TensorFile, copy_to_host
from loopkit.errors import NonFiniteError, UsageError
from loopkit.state import TrainState

Scores = Mapping[str, Any]


@attrs.frozen(eq=False)
class Snapshot:
    """A state as it was when it was taken; what is done to the state later does not reach it.

    Attributes:
        manifest: What it holds; the sizes of the files come later.
        tree: The state as JSON.
        tensors: Its files of tensors.
    """

    manifest: Manifest
    tree: Any
    tensors: Mapping[str, TensorFile]

    def files(self) -> dict[str, Iterator[memoryview]]:
        """The contents of the files, by name."""
        files = {f"{name}.safetensors": file.chunks() for name, file in self.tensors.items()}
        return {**files, TREE: self._tree()}

    def _tree(self) -> Iterator[memoryview]:
        text = json.dumps(self.tree, allow_nan=False, separators=(",", ":")).encode("ascii")
        if len(text) > TREE_LIMIT:
            raise UsageError(
                SAVE,
                f"{len(text)} bytes of the state that are no tensors",
                f"tensors for what is large: at most {TREE_LIMIT} bytes of other data",
            )
        yield memoryview(text)


def take(
    state: TrainState,
    state_dict: Mapping[str, Any],
    scores: Mapping[str, float],
    buffers: dict[str, Tensor],
    *,
    allow_nonfinite: bool,
    frozen: bool,
) -> Snapshot:
    """Copy a state to host memory.

    Args:
        state: What is saved.
        state_dict: Its `state_dict()`, whole.
        scores: What it is saved with.
        buffers: The memory of the last copy; used again, and kept up to date.
        allow_nonfinite: Take parameters that are not finite, too.
        frozen: Take parameters that do not require gradients, too.

    Raises:
        UsageError: If the state holds what is no plain data.
        NonFiniteError: If a parameter is not finite.
    """
    left_out = [] if frozen else frozen_names(state.model, state_dict["model"])
    state_dict = {**state_dict, "model": without(state_dict["model"], left_out)}
    encoder = Encoder()
    parts = {name: encoder.encode(part, (name,)) for name, part in state_dict.items()}
    tree = {"state": parts, "parameters": parameter_names(state)}
    tree |= {"frozen": left_out} if left_out else {}
    sums = Sums.of(state)
    watch = {} if allow_nonfinite else {"model": sums.add}
    tensors = {
        name: copy_to_host(found, buffers.get(name), seen=watch.get(name))
        for name, found in encoder.files.items()
    }
    sums.check(state, state_dict["model"])
    buffers.clear()
    buffers.update({name: file.body for name, file in tensors.items()})
    return Snapshot(_manifest(state, scores, state_dict), tree, tensors)


def _manifest(
    state: TrainState, scores: Mapping[str, float], state_dict: Mapping[str, Any]
) -> Manifest:
    classes = classes_of(state)
    return Manifest(
        step=state.step,
        epoch=state.epoch,
        samples=state.samples,
        serial=1,
        world_size=len(state_dict["rng"].get("ranks", [None])),
        scores=dict(scores),
        parts={name: classes.get(name, "") for name in parts_of(state_dict)},
        files={},
    )


@attrs.frozen
class Sums:
    """The sums of a model's parameters: finite only if all they add up are.

    Computing them takes a hundredth of the time of `isfinite()`.

    Attributes:
        names: The parameters that can be other than finite.
        found: The sums so far, on the device.
    """

    names: frozenset[str]
    found: list[Tensor] = attrs.field(factory=list)

    @classmethod
    def of(cls, state: TrainState) -> "Sums":
        """Those of no parameter yet."""
        named = state.model.named_parameters(remove_duplicate=False)
        return cls(frozenset(name for name, p in named if p.is_floating_point()))

    def add(self, name: str, weight: Tensor) -> None:
        """Sum one up, if it is a parameter."""
        if name in self.names:
            self.found.append(_sum(weight))

    def check(self, state: TrainState, weights: Mapping[str, Tensor]) -> None:
        """Read them, all at once.

        Raises:
            NonFiniteError: If a parameter is not finite.
        """
        on_device = [total.to(state.device) for total in self.found]
        if not on_device or bool(torch.stack(on_device).isfinite().all()):
            return
        bad = [n for n in weights if n in self.names and not bool(weights[n].isfinite().all())]
        if bad:  # and no sum that overflowed
            raise NonFiniteError(
                SAVE,
                f"parameters that are not finite at step {state.step}: {shown(bad)}",
                "with_nonfinite(...) on the step to find or skip such updates, and the last"
                " checkpoint to go on from; or CheckpointOptions(allow_nonfinite=True)",
            )


def _sum(weight: Tensor) -> Tensor:
    weight = weight.float() if weight.itemsize == 1 else weight  # float8 has no arithmetic
    return weight.detach().sum(dtype=torch.promote_types(weight.dtype, torch.float32)).float()


def checked_scores(scores: Scores, monitor: str | None) -> dict[str, float]:
    """The scores as numbers.

    Raises:
        UsageError: If one is no number, or the monitored one is not there.

    Example:
        >>> checked_scores({"accuracy": torch.tensor(0.5)}, "accuracy")
        {'accuracy': 0.5}
    """
    if not isinstance(scores, Mapping):
        raise UsageError(
            f"checkpoints.save(state, {scores!r:.40})",
            f"a {type(scores).__name__} as the scores",
            f'a name for it: checkpoints.save(state, {{"{monitor or "loss"}": score}})',
        )
    if monitor is not None and monitor not in scores:
        raise UsageError(
            f"checkpoints.save(state, scores) with monitor={monitor!r}",
            f"the scores {[*scores]}",
            "one of those names as the monitor; or no scores, for a checkpoint between evaluations"
            + NO_SCORE,
        )
    return {name: _score(name, score) for name, score in scores.items()}


def _score(name: str, score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            "checkpoints.save(state, scores)",
            f"{name} = {score!r:.60}",
            "numbers or 0-d tensors as scores; anything else as TrainState(..., name=thing)",
        ) from error
