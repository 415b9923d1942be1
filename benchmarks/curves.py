"""How the cost of an update grows: with decorators, parameters, nesting of the batch, and loading.

    python benchmarks/curves.py

Prints what an update takes over the hand-written one, in microseconds of CPU time (medians of
paired rounds, one thread); and for loading, wall time of a loop whose loader and step both wait
for 5 ms, in turns and in the background.
"""

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

ROUNDS, UPDATES = 15, 30


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


def extra_us(layers: int = 2, depth: int = 0, decorators: int = 0) -> float:
    """What an update takes over the hand-written one."""
    batch: Any = torch.randn(8, 8)
    for _ in range(depth):
        batch = {"x": batch}
    pair = by_hand(layers, batch), with_loopkit(layers, batch, decorators)
    found = []
    for i in range(ROUNDS + 1):
        order = pair if i % 2 else pair[::-1]
        times = [cpu_us(updates) for updates in order]
        found.append((times[1] - times[0]) * (1 if i % 2 else -1))
    return statistics.median(found[1:])


def curve(name: str, values: list[int], cost: Callable[[int], float]) -> None:
    """Print one curve."""
    print(f"{name:<12}" + "".join(f"{v:>5}: {cost(v):+6.1f} us" for v in values))


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


def loading(wait_s: float = 0.005, count: int = 40) -> None:
    """Print what loading in the background saves: medians of loops in turns."""
    rounds = [
        (
            wall_ms(load(wait_s, count), count, wait_s),
            wall_ms(lk.background(load(wait_s, count)), count, wait_s),
            wall_ms(range(count), count, wait_s),
        )
        for _ in range(9)
    ]
    in_turns, behind, alone = map(statistics.median, zip(*rounds, strict=True))
    ratio = statistics.median(b / a for _, b, a in rounds)
    print(
        f"loading 5 ms, step 5 ms: {in_turns:.2f} ms in turns, {behind:.2f} ms in the background;"
        f" the longer of the two alone {alone:.2f} ms; ratio to that {ratio:.3f}"
    )


def main() -> None:
    """Print all curves."""
    torch.set_num_threads(1)
    curve("decorators", [0, 1, 2, 4, 8, 16], lambda n: extra_us(decorators=n))
    curve("parameters", [2, 8, 32, 128], lambda n: extra_us(layers=n // 2))
    curve("nesting", [0, 1, 2, 4, 8], lambda n: extra_us(depth=n))
    loading()


if __name__ == "__main__":
    main()
