"""Finding a batch size: the largest that fits, whatever the limit, and the state put back."""

import copy
import subprocess
import sys

import loopkit as lk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopkit.debug.memory import is_out_of_memory
from loopkit.testing import assert_bitwise_equal

from problems import classifier, make_batches, make_state


def batch_of(n):
    return make_batches(1, size=n)[0]


def machine(room, tried=None, error=torch.OutOfMemoryError):
    """A step on a machine with room for so many samples."""

    def step(state, batch):
        if tried is not None:
            tried.append(len(batch[1]))
        if len(batch[1]) > room:
            message = "CUDA out of memory. Tried to allocate 2.00 GiB"
            raise error(message)
        return classifier(state, batch)

    return step


@settings(deadline=None, max_examples=12)
@given(room=st.integers(1, 600), start=st.integers(1, 40), most=st.integers(1, 500))
def test_it_is_the_largest_that_fits(room, start, most):
    """For any room, start and limit; where not even the start fits it is an error."""
    state, tried = make_state(), []
    if start > min(room, most):
        with pytest.raises(lk.UsageError):
            lk.find_batch_size(machine(room), state, batch_of, start=start, most=most, updates=1)
        return
    step = machine(room, tried)
    found = lk.find_batch_size(step, state, batch_of, start=start, most=most, updates=1)
    assert found == min(room, most)
    assert len(tried) <= 2 + 2 * max(room, 2).bit_length()
    assert max(tried) <= most


def test_it_doubles_and_then_bisects():
    """Sizes are tried in the order of the search, each with two updates, until one runs out."""
    tried = []
    assert lk.find_batch_size(machine(11, tried), make_state(), batch_of, start=2) == 11
    assert tried == [2, 2, 4, 4, 8, 8, 16, 12, 10, 10, 11, 11]


def test_memory_that_runs_out_in_the_second_update_counts():
    """The optimizer's buffers are there from the second update on."""

    def step(state, batch):
        if state.optimizer.state and len(batch[1]) > 6:
            raise torch.OutOfMemoryError("out of memory")
        return classifier(state, batch)

    assert lk.find_batch_size(step, make_state(), batch_of) == 6


@pytest.mark.parametrize(
    "step", [machine(20), lk.with_ema(0.9)(machine(20)), lk.with_grad_accum(4)(machine(20))]
)
def test_a_state_that_was_trained_is_put_back(step):
    """Weights, optimizer, buffers, averages, clock, gradients and random numbers are as before."""
    state = make_state("conv")
    state.extras["seen"] = torch.zeros(2)
    state.model.register_buffer("unsaved", torch.zeros(1), persistent=False)
    for _ in lk.run(step, state, make_batches(4), max_epochs=1):
        state.model.unsaved += 1
    unsaved = state.model.unsaved.clone()
    loss, before = state.loss.clone(), copy.deepcopy(state.state_dict())
    gradients = [p.grad.clone() for p in state.model.parameters()]
    assert lk.find_batch_size(step, state, batch_of, start=2) == 20  # of 1 BatchNorm has no mean
    assert_bitwise_equal(state.state_dict(), before, "the state after the search")
    assert_bitwise_equal([p.grad for p in state.model.parameters()], gradients, "the gradients")
    assert state.model.unsaved == unsaved
    assert torch.equal(state.loss, loss)


def test_the_state_is_put_back_after_an_error_too():
    """Another error than memory is raised as it is, and the state is as before."""
    state = make_state()
    before = copy.deepcopy(state.state_dict())

    def step(state, batch):
        if len(batch[1]) > 3:
            raise RuntimeError("shapes do not match")
        return classifier(state, batch)

    with pytest.raises(RuntimeError, match="shapes do not match"):
        lk.find_batch_size(step, state, batch_of)
    assert_bitwise_equal(state.state_dict(), before, "the state after the error")


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_known(error, answer):
    """What each device says when its memory has run out, and nothing else."""
    assert is_out_of_memory(error) is answer


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_it_finds_where_real_memory_ends():
    """With a limit on the process's memory, the size it finds trains, and one above does not."""
    code = """
import resource
import loopkit as lk, torch

torch.set_num_threads(1)
model = torch.nn.Linear(1, 1)
state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))

def step(state, batch):
    return (state.model(batch) + torch.ones(len(batch), 500_000)).mean()

def fits(n):
    try:
        return bool(step(state, torch.ones(n, 1)).isfinite())
    except RuntimeError:
        return False

step(state, torch.ones(1, 1)).backward()
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + 250_000_000
resource.setrlimit(resource.RLIMIT_AS, (room, room))
found = lk.find_batch_size(step, state, lambda n: torch.ones(n, 1))
print(found, fits(found // 2), fits(4 * found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    found, half, above = done.stdout.split()
    assert 4 < int(found) < 130  # a sample takes 2 to 8 MB of the 250
    assert (half, above) == ("True", "False")


U, D = lk.UsageError, lk.DataError
WRONG = {
    "no room": (lambda s: lk.find_batch_size(machine(0), s, batch_of), U, "no room for 1 sample", "smaller"),
    "no start": (lambda s: lk.find_batch_size(classifier, s, batch_of, start=0), U, "start = 0", "1 or more"),
    "no updates": (lambda s: lk.find_batch_size(classifier, s, batch_of, updates=0), U, "updates = 0", "1 or more"),
    "a start above the limit": (
        lambda s: lk.find_batch_size(classifier, s, batch_of, start=9, most=8), U, "above most", "at most",
    ),
    "batches of another size": (
        lambda s: lk.find_batch_size(classifier, s, lambda n: batch_of(min(n, 5))), D, "5 samples", "most=5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(case):
    """Sizes that cannot be right, and a start that does not fit, say what to write."""
    wrong, kind, found, remedy = WRONG[case]
    with pytest.raises(kind) as caught:
        wrong(make_state())
    assert found in caught.value.found
    assert remedy in caught.value.instead
