"""What `distributed()` costs over hand-written DDP and FSDP2 loops.

Run it by `python benchmarks/distributed.py`.

Two processes on gloo train the same model by hand and with loopkit, in turns, so that both see the
same machine; what counts is the median of the ratios of neighbours, in CPU time of rank 0's main
thread: gloo's own threads take what the other rank makes them wait for, and what they send is
counted by itself, in bytes for an update. It also shows the peak of host memory.
"""

import argparse
import contextlib
import itertools
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

from report import quartiles, show, table

WIDTH, DEPTH, BATCH, UPDATES = 256, 4, 32, 20
ROUND, ROUNDS = 4, {"ddp": 400, "fsdp": 200}  # updates in a round, rounds for one micro-batch
HEAD = "| | by hand, us | ratio | quartiles | bytes sent by hand | by ours | peak of a rank, MiB |"
TEXT = """
# What `distributed()` costs over hand-written loops

Two processes on gloo, four blocks of 256 and a head, batch 32 on each, fused AdamW, over plain
DistributedDataParallel and plain `fully_shard` loops. CPU time of rank 0's main thread, medians of
pairs; bytes that a rank gives to collectives for an update, as torch's profiler counts them.
"""


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
    data = batches(ROUND * accumulate)
    for i in range(rounds):
        times = {}
        for name, train in [("hand", plain), ("ours", ours)][:: 1 if i % 2 else -1]:
            dist.barrier()
            begun = time.thread_time()
            train(data)
            times[name] = time.thread_time() - begun
        ratios.append(times["ours"] / times["hand"])
        seconds.append(times["hand"] / ROUND)
    low, ratio, high = quartiles(ratios)
    data = batches(UPDATES * accumulate)
    return {
        "ratio": ratio, "low": low, "high": high,
        "us": 1e6 * statistics.median(seconds),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes_hand": sent(plain, data) / UPDATES, "bytes_ours": sent(ours, data) / UPDATES,
    }  # fmt: skip


def main() -> None:
    """Show a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=0, help="default: as many as in ROUNDS")
    parser.add_argument("--strategies", nargs="*", default=["ddp", "fsdp"])
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    args = parser.parse_args()
    rows = []
    for strategy, accumulate in itertools.product(args.strategies, (1, 4)):
        rounds = args.rounds or ROUNDS[strategy]
        found = lk.launch(measure, 2, strategy, accumulate, rounds // accumulate)[0]
        rows.append(
            f"| {strategy}, {accumulate} micro-batches | {found['us']:,.0f} | {found['ratio']:.3f}"
            f" | {found['low']:.3f} to {found['high']:.3f} | {found['bytes_hand']:,.0f}"
            f" | {found['bytes_ours']:,.0f} | {found['peak_mb']:.0f} |"
        )
        print(rows[-1], flush=True)
    show("distributed", TEXT, table(HEAD, *rows), write=args.write)


if __name__ == "__main__":
    main()
