"""What a step costs over the hand-written loop: paired rounds in one process, in CPU time.

    python benchmarks/overhead.py

Two trainings of a tiny MLP (16-32-4, batch 8, default AdamW, one thread) run in turns, in
rounds short enough that whatever else the machine does falls on both. The medians of the
rounds' ratios are printed with their spread; single times mean nothing on a shared machine.
Both trainings end in bitwise equal weights, which is checked.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import loopkit as lk
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from report import quartiles, show, table

ROUNDS, UPDATES, WINDOW = 240, 25, 4
GOALS = {"plain": ("<= 1.02", "<= 8"), "full": ("<= 1.03", "<= 15")}
HEAD = (
    "| | by hand, us | ratio | quartiles | goal | over by hand: us for an update"
    " | for a micro-batch | goal | weights equal |"
)
TEXT = """
# What `run` adds to the hand-written loop: a tiny MLP

An update of `full` is four micro-batches under bf16 autocast, clipped, with a schedule. `noise` is
the plain loop by hand against itself. CPU time, one thread; medians of pairs of rounds.
"""
Batches = list[tuple[Tensor, Tensor]]


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same model and optimizer each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def rate(update: int) -> float:
    """A learning rate that changes at each update."""
    return 1e-3 / (1 + update / 1000)


def plain_by_hand(batches: Batches) -> tuple[nn.Module, Iterator[None]]:
    """The loop that one writes by hand."""
    model, optimizer = make()

    def loop() -> Iterator[None]:
        for inputs, labels in itertools.cycle(batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            yield

    return model, loop()


def full_by_hand(batches: Batches) -> tuple[nn.Module, Iterator[None]]:
    """The same with bf16 autocast, accumulation, clipping and a schedule."""
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: rate(n) / 1e-3)

    def loop() -> Iterator[None]:
        optimizer.zero_grad()
        for i, (inputs, labels) in enumerate(itertools.cycle(batches), 1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(inputs), labels)
            (loss / WINDOW).backward()
            if i % WINDOW == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                yield

    return model, loop()


def step_function(state: lk.TrainState, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What a user writes."""
    inputs, labels = batch
    return F.cross_entropy(state.model(inputs), labels)


FULL = lk.compose(
    lk.with_schedule(lr=rate), lk.with_clip(1.0), lk.with_grad_accum(WINDOW), lk.with_amp("bf16")
)


def with_loopkit(batches: Batches, *decorators: lk.Decorator) -> tuple[nn.Module, Iterator[None]]:
    """The same training through `run`."""
    model, optimizer = make()
    step = lk.compose(*decorators)(step_function)
    updates = lk.run(step, lk.TrainState(model, optimizer), batches)
    return model, iter(updates)


def cpu_seconds(updates: Iterator[None], count: int) -> float:
    """CPU time of a number of updates."""
    start = time.process_time()
    for _ in itertools.islice(updates, count):
        pass
    return time.process_time() - start


def compare(name: str, by_hand: Callable, ours: Callable, rounds: int, updates: int) -> str:
    """The ratio of the two with its spread, as a row of a table."""
    hand_model, hand = by_hand()
    our_model, our = ours()
    cpu_seconds(hand, 50), cpu_seconds(our, 50)
    pairs = []
    for i in range(rounds):
        first, second = (hand, our) if i % 2 else (our, hand)
        times = cpu_seconds(first, updates), cpu_seconds(second, updates)
        pairs.append(times if i % 2 else times[::-1])
    equal = all(map(torch.equal, hand_model.parameters(), our_model.parameters()))
    low, ratio, high = quartiles([o / h for h, o in pairs])
    base = statistics.median(h for h, _ in pairs) / updates * 1e6
    extra = statistics.median(o - h for h, o in pairs) / updates * 1e6
    size = WINDOW if name == "full" else 1
    goal_ratio, goal_us = GOALS.get(name, ("", ""))
    return (
        f"| {name} | {base:,.0f} | {ratio:.4f} | {low:.4f} to {high:.4f} | {goal_ratio}"
        f" | {extra:+.1f} | {extra / size:+.1f} | {goal_us} | {'yes' if equal else 'no'} |"
    )


def main() -> None:
    """Compare plain and full."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    batches = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(64)]
    pairs = {
        "plain": (lambda: plain_by_hand(batches), lambda: with_loopkit(batches)),
        "full": (lambda: full_by_hand(batches), lambda: with_loopkit(batches, FULL)),
        "noise": (lambda: plain_by_hand(batches), lambda: plain_by_hand(batches)),
    }
    rows = [compare(name, *pair, args.rounds, args.updates) for name, pair in pairs.items()]
    show("overhead", TEXT, table(HEAD, *rows), write=args.write)


if __name__ == "__main__":
    main()
