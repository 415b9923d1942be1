"""Finding the largest batch that fits in memory."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from loopkit.check import at_least_one
from loopkit.compose import train_step
from loopkit.device import to_device
from loopkit.errors import DataError, UsageError
from loopkit.modes import untouched_rng
from loopkit.nested import batch_size, map_tensors
from loopkit.state import TrainState
from loopkit.step import Step
from loopkit.types import StepFunction
from loopkit.window import Window

# What torch raises beside torch.OutOfMemoryError (which CUDA and XPU raise)
MESSAGES = ("out of memory", "can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, of any device.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError()), is_out_of_memory(RuntimeError("shape"))
        (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error) for m in MESSAGES)


def find_batch_size(
    step: Step | StepFunction,
    state: TrainState,
    make_batch: Callable[[int], Any],
    *,
    start: int = 1,
    most: int = 2**16,
    updates: int = 2,
) -> int:
    """Find the largest batch size whose updates fit in memory: by doubling, then by halving steps.

    It doubles from `start` until an update runs out of memory, then searches between the
    last size that fitted and the first that did not. What is tried is the state itself, for
    a copy would take room, with the optimizer's buffers there, which the second update of a
    size sees. Afterwards it is put back, from host memory, with the random numbers: all that
    stays is that it has been set up for the step, as by a first update.

    Other things may need memory later (longer sequences, evaluation, fragments): keep a tenth
    of it free. A batch size that fits is not one that trains well: it asks for another lr.

    Args:
        step: What trains; with accumulation, a micro-batch is what is tried.
        state: What would be trained.
        make_batch: Makes a batch of n samples, as large as they get:
            `lambda n: next(iter(DataLoader(dataset, n)))`.
        start: The first size.
        most: The largest that is tried.
        updates: Updates with each size.

    Returns:
        The size.

    Raises:
        UsageError: If `start` does not fit, a number is below 1, or there are several ranks.
        DataError: If `make_batch(n)` makes batches of another size, as at the end of a dataset.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> def small_machine(state, x):
        ...     if len(x) > 100:
        ...         raise torch.OutOfMemoryError("out of memory")
        ...     return state.model(x).mean()
        >>> find_batch_size(small_machine, state, lambda n: torch.ones(n, 2)), state.step
        (100, 0)
    """
    call = f"lk.find_batch_size(..., start={start!r}, most={most!r}, updates={updates!r})"
    for name, value in (("start", start), ("most", most), ("updates", updates)):
        at_least_one(call, name, value)
    if start > most:
        raise UsageError(call, f"start = {start} above most = {most}", "start: at most `most`")
    if not callable(make_batch):
        raise UsageError(
            call,
            f"a {type(make_batch).__name__} as make_batch",
            "a function of the size: lambda n: next(iter(DataLoader(dataset, n)))",
        )
    lifted = train_step(step)
    if lifted.set_up(state).ranks.size > 1:
        raise UsageError(
            call,
            f"a state on {state.ranks.size} ranks: all would wait for one that is out of memory",
            "one process with the same model, and the size that is found in all of them",
        )
    trial = Trial(call, lifted, state, make_batch, updates)
    with untouched_rng(state.device), put_back(state):
        return _search(call, trial, start, most)


@attrs.frozen
class Trial:
    """Whether updates with batches of a size fit in memory.

    Attributes:
        call: What the user wrote, for an error.
        step: What trains.
        state: What is trained.
        make_batch: Makes a batch of n samples.
        updates: How many updates.
    """

    call: str
    step: Step
    state: TrainState
    make_batch: Callable[[int], Any]
    updates: int

    def fits(self, size: int) -> bool:
        """Train on batches of this size."""
        ran_out = False
        try:
            for _ in range(self.updates):
                self._update(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True  # free below, when the traceback holds no tensors any more
        _free(self.state, ran_out)
        return not ran_out

    def _update(self, size: int) -> None:
        batch = to_device(self.make_batch(size), self.state.device)
        if (found := batch_size(batch)) != size:
            raise DataError(
                self.call,
                f"a batch of {found} samples from make_batch({size})",
                f"a make_batch(n) that makes n samples, or most={found}",
            )
        windowed = self.step.window(self.state) is not None
        self.step(self.state, Window([batch]) if windowed else batch)


def _search(call: str, trial: Trial, start: int, most: int) -> int:
    """The largest size that fits: doubling to the first that does not, then bisection."""
    if not trial.fits(start):
        raise UsageError(
            call,
            f"no room for {start} sample{'s' * (start > 1)}",
            "a smaller start; with_amp, a smaller model or activation checkpointing",
        )
    fits, fails = start, most + 1
    while fits < most:
        size = min(2 * fits, most) if fails > most else (fits + fails) // 2
        if size == fits:
            break
        fits, fails = (size, fails) if trial.fits(size) else (fits, size)
    return fits


def _free(state: TrainState, ran_out: bool) -> None:
    state.graph, state.window, state.output = None, ((), 0), None
    for parameter in state.model.parameters():
        parameter.grad = None
    if ran_out:
        gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def put_back(state: TrainState) -> Iterator[None]:
    """Train a state in the block; afterwards it is as before, from copies in host memory."""
    names = [field.name for field in attrs.fields(TrainState)]
    fields = {n: getattr(state, n) for n in names if n not in {"model", "optimizer"}}
    gradients = [(p, p.grad) for p in state.model.parameters()]
    before = state.state_dict()
    before |= {part: _on_host(before[part]) for part in ("model", "optimizer")}
    before |= {part: copy.deepcopy(before[part]) for part in ("features", "extras")}
    buffers = {b: _on_host(b) for b in state.model.buffers()}  # those that are not saved, too
    try:
        yield
    finally:
        state.load_state_dict(before)
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for name, value in fields.items():
            setattr(state, name, value)


def _on_host(tree: Any) -> Any:
    return map_tensors(_copied, tree)


def _copied(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf
