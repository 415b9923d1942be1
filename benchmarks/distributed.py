"""What `distributed()` costs over hand-written DDP and FSDP2 loops.

Run it by `python benchmarks/distributed.py`.

Two processes on gloo train the same model by hand and with loopkit, in turns, so that both see the
same machine; what counts is the median of the ratios of neighbours, in CPU time of rank 0. It also
counts the bytes that an update sends, with and without accumulation, and the peak of host memory.
"""

import argparse
import contextlib
import resource
import statistics
import time

import loopkit as lk
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

WIDTH, DEPTH, BATCH, UPDATES = 256, 4, 32, 20


def make(strategy: str) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """The model, what is called for its forward, and the optimizer."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH))
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, 10))
    called = model
    if strategy == "ddp":
        called = DistributedDataParallel(model)
    elif strategy == "fsdp":
        for block in blocks:
            fully_shard(block)
        called = fully_shard(model)
    return model, called, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random inputs and labels."""
    return [(torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,))) for _ in range(count)]


def by_hand(strategy: str, accumulate: int):  # noqa: ANN201
    """A function that trains a plain loop on some batches."""
    model, called, optimizer = make(strategy)

    def unsynced(last: bool):  # noqa: ANN202
        if last or accumulate == 1:
            return contextlib.nullcontext()
        return called.no_sync() if strategy == "ddp" else without_sync(model)

    def train(data) -> None:  # noqa: ANN001
        for i, (inputs, labels) in enumerate(data, 1):
            last = i % accumulate == 0
            with unsynced(last):
                loss = cross_entropy(called(inputs), labels)
                (loss / accumulate if accumulate > 1 else loss).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()

    return train


@contextlib.contextmanager
def without_sync(model):  # noqa: ANN001, ANN201
    """As torch's FSDP2 is told not to communicate."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def by_loopkit(strategy: str, accumulate: int):  # noqa: ANN201
    """The same with loopkit."""
    model, _, optimizer = make("none")
    options = lk.FSDP(blocks=(nn.Sequential,)) if strategy == "fsdp" else strategy
    decorators = [lk.distributed(options)] + [lk.with_grad_accum(accumulate)] * (accumulate > 1)

    @lk.compose(*decorators)
    def step(state, batch):  # noqa: ANN001, ANN202
        inputs, labels = batch
        return cross_entropy(state.model(inputs), labels)

    state = lk.TrainState(model, optimizer)
    step.set_up(state)

    def train(data) -> None:  # noqa: ANN001
        for window in lk.windows(data, accumulate) if accumulate > 1 else data:
            step(state, window)

    return train


def sent(train, data) -> int:  # noqa: ANN001
    """Bytes that this rank gives to collectives in one training, as torch's profiler has them."""
    with torch.profiler.profile(record_shapes=True) as profile:
        train(data)
    sizes = {"float": 4, "c10::BFloat16": 2, "double": 8}
    total = 0
    for event in profile.events():
        if event.name.startswith("gloo:"):
            for shape in event.input_shapes[:1]:
                count = 1
                for size in shape:
                    count *= size
                total += count * sizes["float"]
    return total


def measure(strategy: str, accumulate: int, rounds: int) -> dict[str, float]:
    """On each rank: ratios of CPU time, and the rest."""
    lk.agree(False) if dist.is_initialized() else dist.init_process_group("gloo")
    torch.set_num_threads(1)
    data = batches(UPDATES * accumulate)
    plain, ours = by_hand(strategy, accumulate), by_loopkit(strategy, accumulate)
    for train in (plain, ours):
        train(data)
    ratios, seconds = [], []
    for i in range(rounds):
        times = {}
        for name, train in [("hand", plain), ("ours", ours)][:: 1 if i % 2 else -1]:
            dist.barrier()
            begun = time.process_time()
            train(data)
            times[name] = time.process_time() - begun
        ratios.append(times["ours"] / times["hand"])
        seconds.append(times["hand"] / UPDATES)
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": statistics.median(ratios), "low": low, "high": high,
        "us": 1e6 * statistics.median(seconds),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes_hand": sent(plain, data) / UPDATES, "bytes_ours": sent(ours, data) / UPDATES,
    }  # fmt: skip


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    print(f"{'':14} {'CPU, ours / hand':>24} {'update':>10} {'bytes an update':>22} {'peak':>8}")
    for strategy in ("ddp", "fsdp"):
        for accumulate in (1, 4):
            found = lk.launch(measure, 2, strategy, accumulate, rounds)[0]
            print(
                f"{strategy} x{accumulate:<10} {found['ratio']:.3f} ({found['low']:.3f} to"
                f" {found['high']:.3f}) {found['us']:8.0f}us {found['bytes_hand']:>10.0f} hand"
                f" {found['bytes_ours']:>10.0f} ours {found['peak_mb']:6.0f}MB"
            )


if __name__ == "__main__":
    main()
