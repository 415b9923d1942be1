"""For tests: the loop written by hand as an oracle, exact comparison, and checks of decorators."""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.compose import Decorator, compose
from loopkit.decorators.accumulate import with_grad_accum
from loopkit.decorators.amp import DTYPES, with_amp
from loopkit.decorators.clip import with_clip
from loopkit.decorators.ema import with_ema
from loopkit.decorators.schedule import with_schedule
from loopkit.run import run
from loopkit.state import TrainState
from loopkit.types import StepFunction


@attrs.define
class ByHand:
    """What the loop written by hand found, beside the weights and the optimizer.

    Attributes:
        losses: One for each update, the weighted mean over its window.
        applied: For each update, whether it was made.
        averages: The averaged weights by name, where asked for.
        scaler: The loss scaler of fp16.
    """

    losses: list[float] = attrs.field(factory=list)
    applied: list[bool] = attrs.field(factory=list)
    averages: dict[str, Tensor] = attrs.field(factory=dict)
    scaler: torch.amp.GradScaler | None = None


def train_by_hand(  # noqa: PLR0912, PLR0913
    function: StepFunction,
    state: TrainState,
    batches: Iterable[Any],
    *,
    accumulate: int = 1,
    amp: str | None = None,
    init_scale: float = 2.0**16,
    clip: float | None = None,
    clip_value: float | None = None,
    lr: Callable[[int], float] | None = None,
    ema: float | None = None,
    skip_nonfinite: bool = False,
) -> ByHand:
    """Train as one writes it by hand in plain PyTorch: the oracle for what decorators do.

    It is long and flat on purpose: it can be checked against the PyTorch manual line by
    line, and uses nothing of loopkit but the state that the function is given.

    Args:
        function: The step function, returning a loss or a mapping with "loss" and "weight".
        state: Its model and optimizer are trained; its clock stays.
        batches: The batches of one epoch; the last window may be short.
        accumulate: Micro-batches for each update.
        amp: "bf16" or "fp16".
        init_scale: First loss scale, for fp16.
        clip: Largest norm of the gradients.
        clip_value: Largest element of the gradients.
        lr: Learning rate as a function of the applied updates so far.
        ema: Decay of the averaged weights.
        skip_nonfinite: Skip updates with a loss or gradient that is not finite.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> found = train_by_hand(lambda s, x: s.model(x).mean(), state, [torch.ones(1, 2)] * 3)
        >>> len(found.losses), found.applied
        (3, [True, True, True])
    """
    model, optimizer = state.model, state.optimizer
    assert optimizer is not None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device.type
    found = ByHand(scaler=torch.amp.GradScaler(device, init_scale) if amp == "fp16" else None)
    if ema is not None:
        found.averages = {name: p.detach().clone() for name, p in model.named_parameters()}

    batches = iter(batches)
    while window := list(itertools.islice(batches, accumulate)):
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr(sum(found.applied))

        optimizer.zero_grad()
        losses: list[Tensor] = []
        weights: list[float] = []
        for batch in window:
            with torch.autocast(device, DTYPES[amp]) if amp else nullcontext():
                output = function(state, batch)
            if not isinstance(output, Mapping):
                losses.append(output.detach())
                share = output / len(window) if len(window) > 1 else output
            else:
                losses.append(output["loss"].detach())
                weights.append(output.get("weight", 1.0))
                share = output["loss"] * weights[-1] if len(window) > 1 else output["loss"]
            (found.scaler.scale(share) if found.scaler else share).backward()

        if found.scaler is not None:
            found.scaler.unscale_(optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if weights and len(window) > 1:
            for gradient in gradients:
                gradient.div_(sum(weights))
        shares = torch.tensor(weights or [1.0] * len(window), dtype=losses[0].dtype)
        loss = (torch.stack(losses) * shares).sum() / shares.sum()
        found.losses.append(loss.item())

        finite = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        if clip_value is not None:
            nn.utils.clip_grad_value_(parameters, clip_value)

        found.applied.append(finite or not (found.scaler or skip_nonfinite))
        if found.applied[-1]:
            optimizer.step()
            with torch.no_grad():
                for name, parameter in model.named_parameters() if ema is not None else ():
                    found.averages[name].lerp_(parameter, 1 - (ema or 0))
        if found.scaler is not None:
            found.scaler.update()
    return found


def assert_bitwise_equal(ours: Any, theirs: Any, where: str = "value") -> None:
    """Raise unless two nested values are equal bit for bit, NaNs and signs of zero included.

    Args:
        ours: Tensors, numbers, text, and mappings and sequences of those.
        theirs: The same.
        where: What the value is called in the message.

    Raises:
        AssertionError: Saying where they differ first, and by how much.

    Example:
        >>> assert_bitwise_equal({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])})
        Traceback (most recent call last):
        AssertionError: value['a'] differs in 1 of 1 elements, by at most 0.0
    """
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        _assert_equal_tensors(ours, theirs, where)
    elif isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if ours.keys() != theirs.keys():
            _fail(f"{where} has the keys {sorted(map(str, ours))}, not {sorted(map(str, theirs))}")
        for key in ours:
            assert_bitwise_equal(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            _fail(f"{where} has {len(ours)} items, not {len(theirs)}")
        for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_bitwise_equal(our, their, f"{where}[{i}]")
    elif ours != theirs and not (ours != ours and theirs != theirs):  # noqa: PLR0124
        _fail(f"{where} is {ours!r}, not {theirs!r}")


def _assert_equal_tensors(ours: Tensor, theirs: Tensor, where: str) -> None:
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        _fail(f"{where} is {ours.dtype}{[*ours.shape]}, not {theirs.dtype}{[*theirs.shape]}")
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    bits = [t.contiguous().reshape(-1, 1).view(torch.uint8) for t in (ours, theirs)]
    differs = (bits[0] != bits[1]).any(dim=1)
    if differs.any():
        most = (ours.double() - theirs.double()).abs().max().item()
        _fail(f"{where} differs in {differs.sum()} of {ours.numel()} elements, by at most {most}")


def _fail(message: str) -> None:
    raise AssertionError(message)


@attrs.frozen
class Problem:
    """A small training problem for checks.

    Attributes:
        make_state: Makes the same fresh state each time.
        function: The step function.
        batches: What it is trained on.
    """

    make_state: Callable[[], TrainState]
    function: StepFunction
    batches: list[Any]


def _make_state() -> TrainState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 2))
    return TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))


def _function(state: TrainState, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(state.model(inputs), labels)


def small_problem() -> Problem:
    """A tiny classifier with dropout, and seven batches.

    Example:
        >>> len(small_problem().batches)
        7
    """
    torch.manual_seed(1)
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(7)]
    return Problem(_make_state, _function, batches)


def _halving(update: int) -> float:
    return 0.01 * 0.9**update


def check_decorator(decorator: Decorator, problem: Problem | None = None) -> None:
    """Check that a decorator keeps the laws that the built-in ones keep.

    It prints, compares and pickles; a call is one update; it gives bitwise the same
    weights wherever it stands among with_amp, with_grad_accum, with_clip, with_ema and
    with_schedule, without switching one of them off; and training that is saved and resumed
    equals training that was not interrupted.

    Args:
        decorator: What `wrap`, `own` or `compose` made.
        problem: What to train on; by default `small_problem()`.

    Raises:
        AssertionError: Saying which law does not hold.

    Example:
        >>> check_decorator(with_clip(0.1))
    """
    problem = problem or small_problem()
    _check_value(decorator, problem)
    _check_orders(decorator, problem)
    _check_resume(decorator, problem)


def _check_value(decorator: Decorator, problem: Problem) -> None:
    step = decorator(problem.function)
    if step != decorator(problem.function):
        _fail(f"{decorator} on the same function twice gives unequal steps: layers should be"
              " frozen attrs classes, with settings through functools.partial")  # fmt: skip
    if not all(feature.name in str(step) for feature in decorator.features):
        _fail(f"{decorator} is not shown by print(step)")
    try:
        again = pickle.loads(pickle.dumps(decorator))  # noqa: S301
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        _fail(f"{decorator} does not pickle ({error}): layers should be classes of a module")
    if again != decorator:
        _fail(f"{decorator} is not equal to its pickled copy")


def _check_orders(decorator: Decorator, problem: Problem) -> None:
    others = [other for other in _companions() if not _clash(decorator, other)]
    first = None
    # What changes gradients runs in the order it was written, so clipping stays outermost.
    for place in range(len(others) + 1):
        stack = compose(with_clip(1.0), *others[:place], decorator, *others[place:])
        state = problem.make_state()
        torch.manual_seed(2)
        for before, _ in enumerate(
            run(stack(problem.function), state, problem.batches, max_epochs=1)
        ):
            if state.step != before + 1:
                _fail(f"{decorator}: a call counted {state.step - before} updates, not one")
        if state.grad_norm is None:
            _fail(f"{decorator} keeps with_clip from running: a layer must call its inner one once")
        first = first or (stack, state)
        where = f"the state after {stack}, against {first[0]}:"
        assert_bitwise_equal(state.state_dict(), first[1].state_dict(), where)


def _companions() -> list[Decorator]:
    return [with_grad_accum(2), with_amp("bf16"), with_ema(0.9), with_schedule(lr=_halving)]


def _clash(one: Decorator, other: Decorator) -> bool:
    claims = [
        {*f.owns, *f.init, *f.claims} for decorator in (one, other) for f in decorator.features
    ]
    return any(a & b for a, b in itertools.combinations(claims, 2))


def _check_resume(decorator: Decorator, problem: Problem) -> None:
    state = problem.make_state()
    step = decorator(problem.function)
    torch.manual_seed(3)
    for _ in run(step, state, problem.batches, max_epochs=1):
        pass
    branch, saved, rng = (
        problem.make_state(),
        copy.deepcopy(state.state_dict()),
        torch.get_rng_state(),
    )
    for _ in run(step, state, problem.batches, max_epochs=2):
        pass
    branch.load_state_dict(saved)
    torch.set_rng_state(rng)
    for _ in run(step, branch, problem.batches, max_epochs=2):
        pass
    where = f"the state after training with {decorator} resumed, against uninterrupted:"
    assert_bitwise_equal(branch.state_dict(), state.state_dict(), where)
