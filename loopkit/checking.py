"""Checking that a decorator keeps the laws that the built-in ones keep."""

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.compose import Decorator, compose, wrap
from loopkit.decorators.accumulate import with_grad_accum
from loopkit.decorators.amp import with_amp
from loopkit.decorators.clip import with_clip
from loopkit.decorators.ema import with_ema
from loopkit.decorators.schedule import with_schedule
from loopkit.errors import UsageError
from loopkit.exact import assert_bitwise_equal, fail
from loopkit.run import run
from loopkit.state import TrainState
from loopkit.types import StepFunction


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

    It prints, compares and pickles; its layers call what they wrap once (`gradients` may
    be computed again); a call is one update, and not all are skipped; it gives bitwise the
    same weights wherever it stands among with_amp, with_grad_accum, with_ema and
    with_schedule, inside of with_clip; and training that is saved and resumed equals
    training that was not interrupted.

    Args:
        decorator: What `wrap`, `own` or `compose` made.
        problem: What to train on; by default `small_problem()`.

    Raises:
        AssertionError: Saying which law does not hold.

    Example:
        >>> check_decorator(with_clip(0.1))
    """
    problem = problem or small_problem()
    if not isinstance(decorator, Decorator):
        raise UsageError(
            "check_decorator(...)",
            f"a {type(decorator).__name__}",
            "what lk.wrap, lk.own or lk.compose made, not a layer or a step",
        )
    _check_value(decorator, problem)
    _check_calls(decorator, problem)
    _check_orders(decorator, problem)
    _check_resume(decorator, problem)


def _check_value(decorator: Decorator, problem: Problem) -> None:
    step = decorator(problem.function)
    if step != decorator(problem.function):
        fail(f"{decorator} on the same function twice gives unequal steps: layers should be"
              " frozen attrs classes, with settings through functools.partial")  # fmt: skip
    if not all(feature.name in str(step) for feature in decorator.features):
        fail(f"{decorator} is not shown by print(step)")
    try:
        again = pickle.loads(pickle.dumps(decorator))  # noqa: S301
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        fail(f"{decorator} does not pickle ({error}): layers should be classes of a module")
    if again != decorator:
        fail(f"{decorator} is not equal to its pickled copy")


def _check_orders(decorator: Decorator, problem: Problem) -> None:
    others = [other for other in _companions() if not _clash(decorator, other)]
    first = None
    # What changes gradients runs in the order it was written, so clipping stays outermost.
    for place in range(len(others) + 1):
        stack = compose(with_clip(0.1), *others[:place], decorator, *others[place:])
        state = problem.make_state()
        torch.manual_seed(2)
        for before, _ in enumerate(
            run(stack(problem.function), state, problem.batches, max_epochs=1)
        ):
            if state.step != before + 1:
                fail(f"{decorator}: a call counted {state.step - before} updates, not one")
        if state.grad_norm is None:
            fail(f"{decorator} keeps with_clip from running: a layer must call its inner one once")
        first = first or (stack, state)
        where = f"the state after {stack}, against {first[0]}:"
        assert_bitwise_equal(state.state_dict(), first[1].state_dict(), where)


@attrs.frozen
class CountCalls:
    """A layer that counts, in the state's extras, how often it was called."""

    inner: Callable[..., Any]
    place: str

    def __call__(self, state: TrainState, *arguments: Any) -> Any:
        """Count, then go on."""
        state.extras[self.place] = state.extras.get(self.place, 0) + 1
        return self.inner(state, *arguments)


def _counter(place: str) -> Decorator:
    layers: dict[str, Any] = {place: functools.partial(CountCalls, place=place)}
    return wrap(**layers)


def _check_calls(decorator: Decorator, problem: Problem) -> None:
    places = {place for feature in decorator.features for place in feature.wraps} - {"gradients"}
    counters = [_counter(place) for place in sorted(places)]
    counts = []
    for stack in ([*counters], [*counters, decorator]):
        state = problem.make_state()
        torch.manual_seed(2)
        updates = run(compose(*stack)(problem.function), state, problem.batches, max_epochs=1)
        applied = [bool(state.applied) for state in updates]
        counts.append({place: state.extras.get(place, 0) / len(applied) for place in places})
        if not any(applied):
            fail(f"{decorator} skips every update of the problem, so that nothing can be checked")
    if any("split" in feature.owns for feature in decorator.features):
        return
    for place, wanted in counts[0].items():
        if counts[1][place] != wanted:
            fail(
                f"{decorator} calls what it wraps at {place!r} {counts[1][place]:g} times in an"
                f" update, not {wanted:g}: a layer must call its inner one once"
            )


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
