"""How the cost of an update grows: with decorators, parameters, nesting of the batch, and loading.

    python benchmarks/curves.py

What an update takes over the hand-written one, in microseconds of CPU time (medians of
paired rounds, one thread) with their quartiles, and a line through the medians; and for loading,
wall time of a loop whose loader and step both wait for 5 ms, in turns and in the background.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import loopkit as lk
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from report import quartiles, show, table

ROUNDS, UPDATES = 120, 20
CURVES = {
    "decorators": [0, 1, 2, 4, 8, 16],
    "parameters": [2, 8, 32, 128],
    "nesting": [0, 1, 2, 4, 8],
}
HEAD = "| | | by hand, us | over it, us | quartiles |"
LOADING = "| | in turns, ms | in the background, ms | step alone, ms | ratio to it | quartiles |"
TEXT = """
# How the cost of an update grows

What an update takes over the hand-written one: with decorators that do nothing, with the number of
parameters (small linear layers, SGD), with the levels of mappings round a batch. CPU time, one
thread; medians of pairs. Goal: linear with a small slope.

Loading: wall time for each batch, of a loader and a step that both wait for 5 ms. Goal: within 5 %
of the longer of the two. The first batch cannot be loaded while a step runs: a loop of n batches
takes (n + 1) / n at best.
"""


@attrs.frozen
class Layer:
    """A layer that does nothing."""

    inner: lk.Transform

    def __call__(self, state: lk.TrainState) -> None:
        """Go on."""
        self.inner(state)


def make(layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network of so many small layers, of two parameters each."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def first_tensor(batch: Any) -> Tensor:
    """The only tensor of a nested batch."""
    while not isinstance(batch, Tensor):
        batch = batch["x"]
    return batch


def by_hand(layers: int, batch: Any) -> Iterator[None]:
    """The loop written by hand."""
    model, optimizer = make(layers)
    while True:
        optimizer.zero_grad()
        F.mse_loss(model(first_tensor(batch)), first_tensor(batch)).backward()
        optimizer.step()
        yield


def with_loopkit(layers: int, batch: Any, decorators: int) -> Iterator[Any]:
    """The same through `run`."""

    def step(state: lk.TrainState, batch: Any) -> Tensor:
        return F.mse_loss(state.model(first_tensor(batch)), first_tensor(batch))

    composed = lk.compose(*[lk.wrap(transform=Layer)] * decorators)(step)
    return iter(lk.run(composed, lk.TrainState(*make(layers)), [batch] * 1000))


def cpu_us(updates: Iterator[Any]) -> float:
    """CPU time of an update."""
    start = time.process_time()
    for _ in itertools.islice(updates, UPDATES):
        pass
    return (time.process_time() - start) / UPDATES * 1e6


def pairs_us(layers: int = 2, depth: int = 0, decorators: int = 0) -> list[tuple[float, float]]:
    """What an update takes by hand, and with loopkit."""
    batch: Any = torch.randn(8, 8)
    for _ in range(depth):
        batch = {"x": batch}
    pair = by_hand(layers, batch), with_loopkit(layers, batch, decorators)
    found = []
    for i in range(ROUNDS + 1):
        order = pair if i % 2 else pair[::-1]
        times = tuple(cpu_us(updates) for updates in order)
        found.append(times if i % 2 else times[::-1])
    return found[1:]


def curve(name: str, values: list[int], cost: Callable[[int], list[Any]]) -> list[str]:
    """The rows of one curve."""
    rows, medians = [], []
    for value in values:
        pairs = cost(value)
        low, extra, high = quartiles([ours - hand for hand, ours in pairs])
        base = statistics.median(hand for hand, _ in pairs)
        rows.append(f"| {name} | {value} | {base:.0f} | {extra:+.1f} | {low:+.1f} to {high:+.1f} |")
        medians.append(extra)
    slope, start = statistics.linear_regression(values, medians)
    return [*rows, f"| | line | | {start:+.1f} {slope:+.2f} n | |"]


def wall_ms(data: Any, count: int, step_s: float) -> float:
    """Wall time of one turn of a loop."""
    start = time.monotonic()
    for _ in data:
        time.sleep(step_s)
    return (time.monotonic() - start) / count * 1e3


def load(wait_s: float, count: int) -> Iterator[int]:
    """A loader that waits."""
    for i in range(count):
        time.sleep(wait_s)
        yield i


def loading(count: int, wait_s: float = 0.005) -> str:
    """What loading in the background saves, as a row: medians of loops in turns."""
    rounds = [
        (
            wall_ms(load(wait_s, count), count, wait_s),
            wall_ms(lk.background(load(wait_s, count)), count, wait_s),
            wall_ms(range(count), count, wait_s),
        )
        for _ in range(9)
    ]
    in_turns, behind, alone = map(statistics.median, zip(*rounds, strict=True))
    low, ratio, high = quartiles([b / a for _, b, a in rounds])
    return (
        f"| {count} batches | {in_turns:.2f} | {behind:.2f} | {alone:.2f} | {ratio:.3f}"
        f" | {low:.3f} to {high:.3f} |"
    )


def main() -> None:
    """Show all curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    costs = {
        "decorators": lambda n: pairs_us(decorators=n),
        "parameters": lambda n: pairs_us(layers=n // 2),
        "nesting": lambda n: pairs_us(depth=n),
    }
    rows = [row for name, cost in costs.items() for row in curve(name, CURVES[name], cost)]
    loops = table(LOADING, *(loading(count) for count in (40, 200)))
    show("curves", TEXT, [*table(HEAD, *rows), "", *loops], write=args.write)


if __name__ == "__main__":
    main()
