"""What `distributed` may cost on ranks, counted: Python calls, collectives, and frames."""

import inspect
import itertools
from pathlib import Path

import loopkit as lk
import pytest
import torch
from test_parity import classifier, fresh, token_classifier
from torch.utils._python_dispatch import TorchDispatchMode

from pool import POOL
from problems import make_batches
from test_budgets import calls_in_loopkit

PACKAGE = Path(lk.__file__).parent
STRATEGIES = ["ddp", "fsdp", "zero1"]
# Python calls of loopkit for an update on a rank, of one micro-batch and of four
CALLS = {"ddp": (25, 63), "fsdp": (27, 77), "zero1": (34, 72)}
STEPS = {
    "plain": (classifier, ()),
    "weights": (token_classifier, ()),
    "skip": (classifier, (lambda: lk.with_nonfinite("skip"),)),
}
# What an update asks of the other ranks beside the gradients
ASKED = {"plain": 0, "weights": 2, "skip": 1}


def stepped(strategy, window, case="plain"):
    """A state that is warm, and an iterator that makes one update after another."""
    function, decorators = STEPS[case]
    layers = [make() for make in decorators] + [lk.with_grad_accum(window)] * (window > 1)
    step, state = lk.compose(*layers, lk.distributed(strategy))(function), fresh()
    batches = itertools.cycle(make_batches(4, dtype=torch.float64))
    updates = (
        step(state, lk.Window([*itertools.islice(batches, window)]) if window > 1 else batch)
        for batch in batches
    )
    for _ in itertools.islice(updates, 5):
        pass
    return updates


def called(strategy, window):
    return calls_in_loopkit(stepped(strategy, window), 20)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_python_calls_of_an_update_on_ranks_stay_within_their_budget(strategy, window):
    """An update of several ranks makes no more Python calls in loopkit than were written down."""
    budget = CALLS[strategy][window > 1]
    for seen in POOL.run(2, called, strategy, window):
        each = len(seen) / 20
        assert each <= budget, sorted({c: seen.count(c) / 20 for c in seen}.items())
        assert each > 0.9 * budget, f"{each} calls: the budget can be lowered"


class Collectives(TorchDispatchMode):
    """What the process groups are asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def asked(strategy, case, window):
    updates = stepped(strategy, window, case)
    with Collectives() as collectives:
        next(updates)
    return collectives.names


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_update_asks_the_other_ranks_for_no_more_than_it_needs(strategy, window):
    """A small sum for weights, a vote where something may be skipped, and else nothing.

    Of nothing to learn from, which weights can say, a step skips its update.
    """
    plain = POOL.run(2, asked, strategy, "plain", window)
    assert plain[0]
    for case, more in ASKED.items():
        for names, without in zip(POOL.run(2, asked, strategy, case, window), plain, strict=True):
            assert len(names) == len(without) + more, (names, without)


def frames(strategy, window):
    """Those of loopkit between a loop and the step function, for each micro-batch."""
    depths = []

    def function(state, batch):
        between = itertools.takewhile(lambda f: f.function != "loop", inspect.stack()[1:])
        depths.append(
            [f.frame.f_code.co_qualname for f in between if PACKAGE in Path(f.filename).parents]
        )
        return classifier(state, batch)

    def loop():
        layers = [lk.with_amp("bf16"), lk.with_clip(1.0), lk.with_ema(0.9)]
        layers += [lk.with_grad_accum(window)] * (window > 1)
        step, state = lk.compose(*layers, lk.distributed(strategy))(function), fresh()
        for _ in lk.run(step, state, make_batches(8, dtype=torch.float64), max_epochs=1):
            pass

    loop()
    assert len(depths) == 8 // (1 if not torch.distributed.is_initialized() else 2)
    return max(depths, key=len)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frames_between_the_loop_and_the_step_function(strategy, window):
    """Six with `distributed` on one process; on ranks what has to see the forward begin and end."""
    most = {"fsdp": 7}.get(strategy, 8)
    alone = frames(strategy, window)
    assert len(alone) <= 6, alone
    for found in POOL.run(2, frames, strategy, window):
        assert len(found) <= most, found
