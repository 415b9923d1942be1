"""What `with_compile("step")` makes of a step, over the hand-written eager loop with fused AdamW.

    python benchmarks/compile.py

Rounds of both run in turns in one process, in CPU time, one thread; the medians of
the rounds' ratios are printed with their quartiles, and how far the weights are apart after
as many updates of each: the largest difference over the largest weight. Compiling
comes before, and its time is printed.
"""

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Iterator

import loopkit as lk
import torch
from torch import Tensor, nn

from peers import TASKS, WINDOW, Batch, by_hand, loss_of, shrink
from report import quartiles, show, table

SIZES = {"mlp": 40, "conv": 12, "gpt": 8}
GOALS = {("mlp", False): "<= 0.3", ("gpt", False): "<= 0.8"}
HEAD = "| | | eager by hand, us | ratio | quartiles | goal | apart after 12 | compiling, s |"
TEXT = """
# A compiled step over the hand-written eager loop with fused AdamW

`with_compile("step")`; CPU time, one thread, medians of pairs. "Apart" is the largest difference
of weights over the largest weight, after twelve updates of both.
"""


def make(task: str) -> tuple[nn.Module, torch.optim.Optimizer, list[Batch]]:
    """The same model, optimizer and data each time."""
    torch.manual_seed(0)
    model, batches = TASKS[task]()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), batches


def step(state: lk.TrainState, batch: Batch) -> Tensor:
    """What a user writes."""
    return loss_of(state.model, *batch)


FULL = lk.compose(
    lk.with_schedule(lr=lambda n: 1e-3 * shrink(n)),
    lk.with_clip(1.0),
    lk.with_grad_accum(WINDOW),
    lk.with_amp("bf16"),
)


def hand(task: str, full: bool) -> tuple[nn.Module, Iterator[None]]:
    """The eager loop; an item is an update."""
    model, optimizer, batches = make(task)
    micro = by_hand(model, optimizer, itertools.cycle(batches), full)
    return model, itertools.islice(micro, WINDOW - 1, None, WINDOW) if full else micro


def compiled(task: str, full: bool) -> tuple[nn.Module, Iterator[None]]:
    """The compiled step through `run`."""
    model, optimizer, batches = make(task)
    made = lk.compose(*([FULL] if full else []), lk.with_compile("step"))(step)
    return model, iter(lk.run(made, lk.TrainState(model, optimizer), batches[: len(batches)]))


def cpu_seconds(updates: Iterator[None], count: int) -> float:
    """CPU time of a number of updates."""
    start = time.process_time()
    for _ in itertools.islice(updates, count):
        pass
    return time.process_time() - start


def compare(task: str, full: bool, rounds: int) -> str:
    """The ratio with its spread, as a row of a table."""
    (hand_model, eager), (our_model, ours) = hand(task, full), compiled(task, full)
    begun, size = time.monotonic(), max(2, SIZES[task] // (WINDOW if full else 1))
    cpu_seconds(ours, 12)
    warm_s = time.monotonic() - begun
    cpu_seconds(eager, 12)
    pairs = list(zip(hand_model.parameters(), our_model.parameters(), strict=True))
    apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    times = []
    for i in range(rounds):
        order = (eager, ours) if i % 2 else (ours, eager)
        found = [cpu_seconds(updates, size) for updates in order]
        times.append(found if i % 2 else found[::-1])
    base = statistics.median(b for b, _ in times) / size * 1e6
    low, ratio, high = quartiles([our / hand for hand, our in times])
    goal = GOALS.get((task, full), "")
    return (
        f"| {task} | {'full' if full else 'plain'} | {base:,.0f} | {ratio:.3f}"
        f" | {low:.3f} to {high:.3f} | {goal} | {apart:.1e} | {warm_s:.0f} |"
    )


def main() -> None:
    """Compare plain and full on each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    parser.add_argument("--tasks", nargs="*", default=["mlp", "gpt"], choices=TASKS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)
    rows = []
    for task in args.tasks:
        for full in (False, True):
            rows.append(compare(task, full, args.rounds))
            print(rows[-1], flush=True)
    show("compile", TEXT, table(HEAD, *rows), write=args.write)


if __name__ == "__main__":
    main()
