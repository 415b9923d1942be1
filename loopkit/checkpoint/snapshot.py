"""What goes into a checkpoint: the state, copied to host memory, and its manifest."""

import json
from collections.abc import Callable, Iterator, Mapping
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
from loopkit.checkpoint.pieces import name_of, plan
from loopkit.checkpoint.read import TREE, TREE_LIMIT, parts_of
from loopkit.checkpoint.tensors import TensorFile, copy_to_host
from loopkit.errors import NonFiniteError, UsageError
from loopkit.ranks import Ranks, everywhere
from loopkit.state import TrainState

Scores = Mapping[str, Any]
SPREAD = ("model", "optimizer", "features")  # what may be in parts


@attrs.frozen(eq=False)
class Snapshot:
    """A state as it was when it was taken; what is done to the state later does not reach it.

    Attributes:
        step: Updates so far.
        manifest: What it holds; the sizes of the files come later. None where another rank
            writes it, and the tree.
        tree: The state as JSON.
        tensors: Its files of tensors.
        parameters: Those tensors that have to be finite, by name.
    """

    step: int
    manifest: Manifest | None
    tree: Any
    tensors: Mapping[str, TensorFile]
    parameters: Mapping[str, Tensor]

    def check(self) -> None:
        """Look at the parameters, in a hundredth of the time of `isfinite()`: at their sums.

        Raises:
            NonFiniteError: If one is not finite.
        """
        sums = [_sum(copy) for copy in self.parameters.values()]
        if not sums or bool(torch.stack(sums).isfinite().all()):
            return
        bad = [n for n, copy in self.parameters.items() if not bool(copy.isfinite().all())]
        if bad:  # and no sum that overflowed
            raise NonFiniteError(
                SAVE,
                f"parameters that are not finite at step {self.step}: {shown(bad)}",
                "with_nonfinite(...) on the step to find or skip such updates, and the last"
                " checkpoint to go on from; or CheckpointOptions(allow_nonfinite=True)",
            )

    def files(self) -> dict[str, Iterator[memoryview]]:
        """The contents of the files, by name."""
        files = {f"{name}.safetensors": file.chunks() for name, file in self.tensors.items()}
        return files if self.manifest is None else {**files, TREE: self._tree()}

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
    last: dict[str, TensorFile],
    *,
    allow_nonfinite: bool,
    frozen: bool,
) -> Snapshot | None:
    """Copy a state to host memory: all of it on the first rank, parts of it on the others.

    Of several ranks all have to call it, and it fails on all or on none.

    Args:
        state: What is saved.
        state_dict: Its `state_dict()`, with a `Part` for what is spread over ranks.
        scores: What it is saved with.
        last: The files of the copy before, whose memory is used again; kept up to date.
        allow_nonfinite: Take parameters that are not finite, too.
        frozen: Take parameters that do not require gradients, too.

    Returns:
        What this rank writes; None if that is nothing.

    Raises:
        UsageError: If the state holds what is no plain data.
    """
    ranks, encoder = state.ranks, Encoder()
    left_out = [] if frozen else frozen_names(state.model, state_dict["model"])
    state_dict = {**state_dict, "model": without(state_dict["model"], left_out)}
    tree = _everywhere(ranks, lambda: _tree(state, state_dict, encoder))
    files = encoder.files if ranks.is_first else {}
    if ranks.spread:
        found = plan(ranks, encoder.parts)
        tree |= {"pieces": found.index}
        files |= {name_of(ranks.number): found.mine} if found.mine else {}
    tree |= {"frozen": left_out} if left_out else {}
    tensors = _everywhere(ranks, lambda: _copied(files, last))
    finite = {} if allow_nonfinite else _parameters(state, tensors)
    if ranks.is_first:
        manifest = _manifest(state, scores, state_dict)
        return Snapshot(state.step, manifest, tree, tensors, finite)
    return Snapshot(state.step, None, None, tensors, finite) if tensors else None


def _tree(state: TrainState, state_dict: Mapping[str, Any], encoder: Encoder) -> dict[str, Any]:
    """The state as JSON; on other ranks than the first only what may lie in parts is looked at."""
    looked_at = SPREAD if not state.ranks.is_first else state_dict.keys()
    if not (state.ranks.is_first or state.ranks.spread):
        return {}
    parts = {name: encoder.encode(state_dict[name], (name,)) for name in looked_at}
    return {"state": parts, "parameters": parameter_names(state)}


def _everywhere(ranks: Ranks, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    done: dict[str, Any] = everywhere(ranks.everyone, SAVE, action)
    return done


def _copied(
    files: Mapping[str, Mapping[str, Tensor]], last: dict[str, TensorFile]
) -> dict[str, TensorFile]:
    copies = {name: copy_to_host(found, last.get(name)) for name, found in files.items()}
    last.clear()
    last.update(copies)
    return copies


def _parameters(state: TrainState, files: Mapping[str, TensorFile]) -> dict[str, Tensor]:
    """The copies of the parameters that can be other than finite."""
    named = state.model.named_parameters(remove_duplicate=False)
    names = {name for name, p in named if p.is_floating_point()}
    whole = files["model"].tensors if "model" in files else {}
    parts = files[own].tensors if (own := name_of(state.ranks.number)) in files else {}
    found = {**whole, **{n.removeprefix("model/"): t for n, t in parts.items()}}
    return {name: found[name] for name in found.keys() & names}


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


def _sum(weight: Tensor) -> Tensor:
    weight = weight.float() if weight.itemsize == 1 else weight  # float8 has no arithmetic
    return weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32)).float()


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
