"""What a step may cost in Python, counted, not timed: calls and allocations of loopkit itself."""

import gc
import itertools
import sys
import tracemalloc
from pathlib import Path

import loopkit as lk
import pytest
import torch

from problems import classifier, halving, make_batches, make_state

PACKAGE = str(Path(lk.__file__).parent)
FULL = lk.compose(
    lk.with_schedule(lr=halving), lk.with_clip(1.0), lk.with_grad_accum(4), lk.with_amp("bf16")
)
# Python function calls and kept allocations of loopkit for one update. A change that needs more
# says so here: an update of the tiny MLP of benchmarks/overhead.py takes 300 us, a call 0.1 us.
# One of "skip" is for the end of endless skipping.
CALLS = {"plain": 17, "full": 58, "ema": 26, "skip": 46}
BLOCKS = {"plain": 0.5, "full": 0.5, "ema": 0.5, "skip": 0.5}
# Blocks of an update that are held at its last forward, and at the optimizer's step: about 9 and
# 10, full 19 and 16, with a skip 9 and 19; more where the stack happens to need another chunk
HELD = {"plain": (13, 14), "full": (23, 20), "ema": (13, 14), "skip": (13, 23)}
OURS = [tracemalloc.Filter(True, f"{PACKAGE}/*")]
STEPS = {
    "plain": lambda f: f,
    "full": FULL,
    "ema": lk.with_ema(0.99),
    "skip": lk.with_nonfinite("skip"),
}


def updates_of(name, count):
    """A run that is warm, with batches for `count` more updates."""
    state = make_state()
    batches = make_batches(8) * 200
    updates = iter(lk.run(STEPS[name](classifier), state, batches, max_steps=20 + count))
    for _ in itertools.islice(updates, 10):
        pass
    return updates


def calls_in_loopkit(updates, count):
    """Python functions of loopkit that are called during `count` updates."""
    seen = []

    def watch(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.append(frame.f_code.co_qualname)

    sys.setprofile(watch)
    try:
        for _ in itertools.islice(updates, count):
            pass
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("name", STEPS)
def test_python_calls_of_an_update_stay_within_their_budget(name):
    """An update makes no more Python calls in loopkit than were written down."""
    seen = calls_in_loopkit(updates_of(name, 50), 50)
    each = len(seen) / 50
    assert each <= CALLS[name], sorted({c: seen.count(c) / 50 for c in seen}.items())
    assert each > 0.7 * CALLS[name], f"{each} calls: the budget can be lowered"


@pytest.mark.parametrize("name", STEPS)
def test_updates_keep_no_memory(name):
    """Later updates leave no more blocks of memory allocated by loopkit than earlier ones do."""
    updates = updates_of(name, 520)
    for _ in itertools.islice(updates, 20):
        pass
    gc.collect()
    tracemalloc.start()
    try:
        kept = []
        for count in (100, 400):  # Python itself keeps some blocks, about a hundred, to use again
            for _ in itertools.islice(updates, count):
                pass
            gc.collect()
            found = tracemalloc.take_snapshot().filter_traces(OURS)
            kept.append(sum(trace.count for trace in found.statistics("filename")))
    finally:
        tracemalloc.stop()
    assert (kept[1] - kept[0]) / 400 <= BLOCKS[name]


@pytest.mark.parametrize("name", STEPS)
def test_allocations_of_an_update_stay_within_their_budget(name):
    """At its last forward, and at its optimizer's step, an update holds few blocks of loopkit's."""
    held = {"forward": [], "apply": []}

    def count(moment):
        if not tracemalloc.is_tracing():
            return
        found = tracemalloc.take_snapshot().filter_traces(OURS)
        held[moment].append(sum(trace.count for trace in found.statistics("filename")))

    def step(state, batch):
        count("forward")
        return classifier(state, batch)

    state = make_state()
    state.optimizer.register_step_pre_hook(lambda *_: count("apply"))
    updates = iter(lk.run(STEPS[name](step), state, make_batches(8) * 20, max_steps=20))
    for _ in itertools.islice(updates, 10):
        pass
    for _ in range(3):
        gc.collect()
        tracemalloc.start()
        try:
            next(updates)
        finally:
            tracemalloc.stop()
    forward, apply = (max(held[moment]) for moment in ("forward", "apply"))
    assert forward <= HELD[name][0]
    assert apply <= HELD[name][1]
    assert forward + apply > 0.4 * sum(HELD[name]), "the budget can be lowered"


def test_a_step_makes_no_reference_cycles():
    """Nothing of an update waits for the garbage collector, which may so stay switched off."""
    updates = updates_of("full", 50)
    gc.collect()
    gc.disable()
    try:
        for _ in itertools.islice(updates, 20):
            pass
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        ours = [item for item in gc.garbage if type(item).__module__.startswith("loopkit")]
        tensors = [item for item in gc.garbage if isinstance(item, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert (ours, tensors) == ([], [])
