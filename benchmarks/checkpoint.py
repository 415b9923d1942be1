"""How long the loop stands still for a save, and what it takes on disk.

    python benchmarks/checkpoint.py [--gigabytes 0.1 1]

For each size a model with AdamW is saved in turns by `torch.save` to a file, by a
`Checkpointer` in the background, by one that waits for the disk (`async_save=False`), and by
`torch.distributed.checkpoint.async_save`; beside them stands the bare copy of the state into
memory that was used before. The rounds alternate, so that whatever else the machine does
falls on all of them; medians are printed with their quartiles. The first save of a
`Checkpointer` also gets its memory from the system, so it is shown by itself.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loopkit as lk
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from report import quartiles, show, table

ROUNDS = 7
HEAD = "| GB | | seconds | quartiles | over torch.save | over the bare copy |"
TEXT = """
# How long the loop stands still for a save

A model of linear layers with AdamW, by size of its tensors. Wall time, medians of seven rounds in
turns. `save, in the background` is the time for which the loop stands still; the bare
copy of the state into memory is what it takes at least.
"""


def make(gigabytes: float) -> lk.TrainState:
    """A state of about this size: weights, and the two moments of AdamW."""
    width, layers = 1024, max(1, round(gigabytes * 1e9 / 3 / 4 / 1024**2))
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return state


def tensors_of(state: lk.TrainState) -> list[Tensor]:
    """All tensors of a state."""
    optimizer = state.optimizer.state_dict()["state"].values()
    return [*state.model.state_dict().values(), *(t for s in optimizer for t in s.values())]


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def row(size: int, name: str, times: list[float], bases: list[float]) -> str:
    """A row: median, quartiles, and the ratios to the bases."""
    low, middle, high = quartiles(times)
    ratios = " | ".join(f"{middle / base:.2f}" for base in bases)
    return f"| {size / 1e9:.2f} | {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {ratios} |"


def measure(gigabytes: float, folder: Path, rounds: int) -> list[str]:
    """One size, as rows of a table."""
    state, plain = make(gigabytes), folder / "plain.pt"
    tensors = tensors_of(state)
    size = sum(tensor.nbytes for tensor in tensors)
    copies = [tensor.clone() for tensor in tensors]
    futures: list[Any] = []
    background = lk.Checkpointer(folder / "background")
    waiting = lk.Checkpointer(folder / "waiting", async_save=False)

    def save(checkpoints: lk.Checkpointer) -> None:
        state.step += 1
        checkpoints.save(state)

    def save_plainly(*, durable: bool) -> None:
        with plain.open("wb") as file:
            torch.save(state.state_dict(), file)
            if durable:
                file.flush()
                os.fsync(file.fileno())

    def save_by_dcp() -> None:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        found = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
        futures.append(dcp.async_save(found, checkpoint_id=folder / "dcp"))

    def copy() -> None:
        for source, target in zip(tensors, copies, strict=True):
            target.copy_(source)

    first = seconds(lambda: save(background))
    background.wait(), save(waiting)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, function in {
            "torch.save": lambda: save_plainly(durable=False),
            "torch.save and fsync": lambda: save_plainly(durable=True),
            "bare copy": copy,
            "save, in the background": lambda: save(background),
            "and until it is on disk": background.wait,
            "save, waiting for the disk": lambda: save(waiting),
            "DCP async_save": save_by_dcp,
            "and until it is written": lambda: futures.pop().result(),
        }.items():
            times.setdefault(name, []).append(seconds(function))
    bases = [statistics.median(times[name]) for name in ("torch.save", "bare copy")]
    rows = [row(size, name, found, bases) for name, found in times.items()]
    path = background.latest.path
    written = sum(file.stat().st_size for file in path.iterdir())
    background.close(), waiting.close()
    return [
        *rows,
        f"| {size / 1e9:.2f} | first save, in the background | {first:.3f} | | | |",
        f"| {size / 1e9:.2f} | bytes on disk / bytes of tensors | {written / size:.4f} | | | |",
    ]


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    args = parser.parse_args()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    rows = []
    for gigabytes in args.gigabytes:
        folder = Path(tempfile.mkdtemp())
        try:
            rows += measure(gigabytes, folder, args.rounds)
        finally:
            shutil.rmtree(folder)
    dist.destroy_process_group()
    show("checkpoint", TEXT, table(HEAD, *rows), write=args.write)


if __name__ == "__main__":
    main()
