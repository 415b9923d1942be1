"""The training state: the one thing that a step changes."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR

from loopkit.checked import as_vote, check_optimizer, check_parts, check_trained
from loopkit.errors import CompositionError
from loopkit.outcome import Outcome
from loopkit.plain import restore, saveable, saved
from loopkit.position import Position
from loopkit.ranks import ALONE, Ranks
from loopkit.restored import OfRanks
from loopkit.rng import rng_state
from loopkit.skips import Skips
from loopkit.window import Ahead, MicroBatches

SKIP, RAISE = 1.0, 2.0  # votes, of which the largest counts
CLOCK = ("step", "epoch", "batch", "samples", "epoch_end")


@attrs.define(init=False, eq=False, repr=False)
class TrainState:
    """The model, the optimizer, the clock and what the last update found.

    A step takes a state and returns the same object. The model and the optimizer
    stay yours: `state.model is model`, and its `state_dict` keys are plain.

    Args:
        model: The module to train.
        optimizer: Over the model's parameters, or some of them. May be left out
            where the state is only evaluated.
        **extras: Things of your own that travel with the state, in `state.extras`.
            What has `state_dict`, or is plain data (numbers, text, tensors, arrays, and
            containers of those), is part of a checkpoint.

    Attributes:
        step: Updates so far, one for each call of a step, skipped ones included.
        epoch: Epochs finished so far; at the last update of an epoch still its number.
        batch: Batches (micro-batches too) that `run` has taken in this epoch.
        samples: Samples taken so far, by this rank.
        taken: Batches that `run` took for the last update; 0 before the first one.
        epoch_batches: Batches of an epoch of the run, where that is known.
        epoch_end: True at the last update of an epoch.
        lr: Learning rate of the last update, of the first param group.
        applied: False where the last update was skipped; a bool, or a 0-d bool
            tensor where the optimizer decided it on the device (reading it waits).
        output: The mapping that the step function returned last, or None.
        grad_norm: Norm of the gradients before clipping, where something measured it.
        outcome: Losses and weights of the micro-batches of the last update.
        features: What the step's decorators keep, by name.
        window: The micro-batches of the last update, and how many they are.
        ranks: The processes that train it together; see `distributed`.
        votes: Inside an update: 0-d tensors, 1 to skip it, 2 to raise; see `skip_if`.
        verdict: Inside an update: the largest vote, or None where nobody voted.

    Raises:
        UsageError: If the model is no module, or wrapped for several ranks (DDP), or the
            optimizer holds none of its parameters.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> state
        TrainState(Linear, SGD, step=0, epoch=0)
    """

    model: nn.Module
    optimizer: Optimizer | None
    extras: dict[str, Any]
    step: int = 0
    epoch: int = 0
    batch: int = 0
    samples: int = 0
    taken: int = 0
    epoch_batches: int | None = None
    epoch_end: bool = False
    applied: bool | Tensor = True
    output: Mapping[str, Any] | None = None
    grad_norm: Tensor | None = None
    lr: float | Tensor | None = None
    outcome: Outcome = attrs.field(factory=Outcome)
    window: MicroBatches = ((), 0)
    votes: list[Tensor] = attrs.field(factory=list)
    verdict: Tensor | None = None
    features: dict[str, Any] = attrs.field(factory=dict)
    ranks: Ranks = ALONE
    # Bookkeeping of steps and runs
    pending: dict[str, Any] = attrs.field(factory=dict)  # restored before its feature was set up
    set_up: list[object] = attrs.field(factory=list)  # features whose set-up was run on this state
    attached: dict[int, object] = attrs.field(factory=dict)  # steps that were checked against it
    skips: Skips = attrs.field(factory=Skips)  # in a row
    unproven: bool = True  # no backward pass of a new step has been seen to reach a parameter
    graph: object = None  # the last loss: while it lives, autograd keeps its nodes for parameters
    restored: OfRanks | None = None  # by the last load_state_dict, until training goes on
    data: object = None  # what `batch` is a position in; None after a restore: whatever comes next
    checkpoints: Any = None  # the Checkpointer that saved or restored it last
    preemption: Any = None  # what may ask the run to stop; polled between updates, and in evaluate
    position: Position = attrs.field(factory=Position)  # how that was opened
    ahead: Ahead | None = None  # where that is an iterator: with the batch that was read ahead
    _metrics: dict[str, Tensor] | None = None
    _own: dict[str, Tensor] | None = None  # the model's own weights, while others are swapped in

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None, **extras: Any) -> None:
        check_trained(model)
        if optimizer is not None:
            check_optimizer(model, optimizer)
        self.__attrs_init__(model, optimizer, extras)

    def __repr__(self) -> str:
        optimizer = "no optimizer" if self.optimizer is None else type(self.optimizer).__name__
        return (
            f"TrainState({type(self.model).__name__}, {optimizer},"
            f" step={self.step}, epoch={self.epoch})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainState":
        return self.snapshot()

    # What the last update found

    @property
    def loss(self) -> Tensor:
        """Loss of the last update: 0-d, detached, weighted mean over its micro-batches."""
        return self.outcome.mean()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors of the last update: `loss`, `grad_norm`, `lr`, and the step function's own.

        Those are the numbers and 0-d tensors of its mapping, as means over a window; a vector is
        none, and stays in `state.output`. They stay on the device: `float(state.metrics["loss"])`
        is your choice to wait.
        """
        if self._metrics is None:
            self._metrics = self.outcome.means()
            if self.grad_norm is not None:
                self._metrics["grad_norm"] = self.grad_norm
            if self.lr is not None:
                self._metrics["lr"] = torch.as_tensor(self.lr).clone()
        return self._metrics

    # What layers of a step use

    @property
    def device(self) -> torch.device:
        """Where the model computes: where its first parameter is, or is taken to from the host."""
        if (elsewhere := self.ranks.device) is not None:
            return elsewhere
        for group in () if self.optimizer is None else self.optimizer.param_groups:
            for parameter in group["params"]:  # a look-up; model.parameters() walks modules
                return parameter.device  # type: ignore[no-any-return]
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        groups = () if self.optimizer is None else self.optimizer.param_groups
        return [p for group in groups for p in group["params"]]

    def parameters_with_grad(self) -> list[nn.Parameter]:
        """Those of the optimizer's parameters that have a gradient now."""
        return [p for p in self.parameters() if p.grad is not None]

    def gradients(self) -> list[Tensor]:
        """The gradients that the optimizer's parameters have now."""
        return [p.grad for p in self.parameters() if p.grad is not None]

    def kept(self, name: str) -> Any:
        """What a feature keeps under `name`, or what was restored for it; None if neither."""
        return self.features.get(name, self.pending.get(name))

    def skip_if(self, vote: Tensor | bool) -> None:
        """Vote to skip this update; one vote is enough, and all ranks follow it.

        Args:
            vote: True, or a 0-d tensor that is non-zero, to skip. A tensor is not read here,
                so voting never waits for the device. On several ranks every rank votes at
                each update, with a tensor.
        """
        self.votes.append(as_vote(vote, self.ranks) * SKIP)

    def raise_if(self, vote: Tensor | bool) -> None:
        """Vote to raise an error in place of this update; it outweighs votes to skip.

        Args:
            vote: As for `skip_if`. What raises is the feature that owns the error.
        """
        self.votes.append(as_vote(vote, self.ranks) * RAISE)

    def begin_update(self, length: int | None) -> Outcome:
        """Forget the last update, its gradients and votes; start a window of `length`."""
        if self._own is not None:
            raise CompositionError(
                "a step inside `with lk.ema_weights(state)`",
                "other weights in the model's place, which an update would be lost on",
                "the step after the with block",
            )
        for group in self.optimizer.param_groups:  # type: ignore[union-attr]
            for parameter in group["params"]:
                parameter.grad = None
        self.outcome = Outcome(length=length)
        self.restored = None  # this goes on from there
        self.output = self.grad_norm = self.verdict = self._metrics = None
        self.votes = []
        return self.outcome

    @contextmanager
    def swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other weights in the model's place; its own come back at the end.

        Meanwhile `state_dict` still gives the model's own weights, so that a
        checkpoint never holds the others in their place.

        Args:
            weights: By name of parameter or buffer; what is not named stays.
        """
        if self._own is not None:
            raise CompositionError(
                "state.swapped(weights)",
                "weights that are swapped in already",
                "one swap at a time",
            )
        mine = {name: t for name, t in _named_tensors(self.model) if name in weights}
        with torch.no_grad():
            self._own = {name: parameter.detach().clone() for name, parameter in mine.items()}
            try:
                for name, parameter in mine.items():
                    parameter.copy_(weights[name])
                yield
            finally:
                for name, parameter in mine.items():
                    parameter.copy_(self._own[name])
                self._own = None

    # Saving and branching

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on: all that changes, random numbers included.

        Parts: `model`, `optimizer`, `clock`, `features`, `extras` and `rng`, the states of the
        generators of Python, NumPy, torch, and the state's device.
        """
        model = self.model.state_dict()
        return {
            "model": {**model, **{k: v for k, v in self._own_weights() if k in model}},
            "optimizer": saved(self.optimizer) if self.optimizer is not None else None,
            "clock": {name: getattr(self, name) for name in CLOCK},
            "features": self.pending | {k: saved(v) for k, v in self.features.items()},
            "extras": saveable(self.extras),
            "data": self.position.now(self.data),
            "rng": rng_state(self.device) | self.position.random(),
        }

    def _own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that others are swapped in for, under each name: tied ones have several."""
        if self._own is not None:
            first = {id(p): name for name, p in _named_tensors(self.model)}
            for name, parameter in _named_tensors(self.model, once=False):
                if first[id(parameter)] in self._own:
                    yield name, self._own[first[id(parameter)]]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; what is given is copied, never kept.

        Features that no step has set up yet wait for the first step that has them.

        Raises:
            UsageError: If a part is missing or not known.
            CompositionError: Within `with lk.ema_weights(state)`.
        """
        parts = {"model", "optimizer", "clock", "features", "extras", "data", "rng"}
        if self._own is not None:
            raise CompositionError(
                "state.load_state_dict(...) inside `with lk.ema_weights(state)`",
                "other weights in the model's place, and its own to come back at the end",
                "load_state_dict after the with block",
            )
        check_parts(state_dict, parts, self.features)
        state_dict = self.ranks.fitted(self, state_dict)
        self.model.load_state_dict(state_dict["model"])
        if self.optimizer is not None and state_dict["optimizer"] is not None:
            # Optimizer.load_state_dict keeps some of the tensors it is given (`step` of Adam)
            self.optimizer.load_state_dict(copy.deepcopy(state_dict["optimizer"]))
        for name in CLOCK:
            setattr(self, name, state_dict["clock"][name])
        self.data = None
        waiting = dict(state_dict["features"])
        restore(self.features, {k: waiting.pop(k) for k in [*waiting] if k in self.features})
        self.pending = copy.deepcopy(waiting)
        restore(self.extras, state_dict["extras"])
        self.restored = OfRanks.of(state_dict)
        self.restored.take(self)

    def snapshot(self) -> "TrainState":
        """An independent copy to branch from: training one leaves the other as it is.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> branch = state.snapshot()
            >>> branch.model is model, torch.equal(branch.model.weight, model.weight)
            (False, True)
        """
        if self.ranks.shards_tensors:
            raise CompositionError(
                "state.snapshot() of a state that is spread over ranks",
                "parameters of which each rank holds a part; torch does not copy such modules",
                "checkpoints.save(state), and restore into a state made anew",
            )
        memo: dict[int, Any] = {}
        branch = copy.copy(self)
        branch.window, branch.output, branch.graph = ((), 0), None, None
        branch.attached, branch.votes, branch.skips = {}, [], Skips()
        branch.ranks = ALONE  # what spreads it holds this model: the branch is spread anew
        branch.set_up = [f for f in self.set_up if "parallelize" not in getattr(f, "owns", ())]
        for name in ("model", "optimizer", "features", "extras", "outcome", "pending"):
            setattr(branch, name, copy.deepcopy(getattr(self, name), memo))
        if branch.optimizer is not None and "step" in vars(self.optimizer):
            # By a wrapper of `step` on the instance a torch scheduler knows that it was called
            # (torch.optim.lr_scheduler, patch_track_step_called). The copy needs one of its
            # own, or its schedulers warn; any new one puts it there, and this changes no value.
            vars(branch.optimizer).pop("step", None)
            ConstantLR(branch.optimizer, factor=1.0)
        return branch


def _named_tensors(model: nn.Module, once: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=once)
    yield from model.named_buffers(remove_duplicate=once)
