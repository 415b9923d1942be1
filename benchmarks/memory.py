"""The peak memory of a training by hand, with `run`, and with the decorators that save some.

    python benchmarks/memory.py

A residual MLP (8 blocks of 512-2048-512, float32, batch 1024, plain SGD) makes three updates, in
a process of its own. On CUDA the peak is the allocator's; on a CPU it is that of
the tensors that torch's allocator hands out, as its profiler reports them, and
beside it the growth of the process's largest resident set since a training of a tiny model, which
has loaded all code: that holds what the C library's allocator keeps as well. All variants
end with bitwise equal weights, save those that cut the batch, whose sums are made in another order.
"""

import argparse
import hashlib
import itertools
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

import loopkit as lk
import torch
from torch import Tensor, nn

from report import show, table

UPDATES = 3
HEAD = "| | tensors, MiB | over by hand | growth of the process, MiB | over by hand | weights |"
TEXT = """
# Peak memory

A residual MLP of 64 MiB of float32 weights, batch 1024, plain SGD: the most beside the weights,
over three updates. Goal: at most 1.01 of the hand-written loop. "Tensors" is the peak of what
torch's allocator has handed out and not got back; the process's growth holds
what the C library keeps as well. Equal digests are bitwise equal weights.
"""
HAND = "by hand"
DECORATORS = {
    "plain": lk.wrap(name="plain"),
    "with_optimizer_in_backward()": lk.with_optimizer_in_backward(),
    "with_activation_checkpointing()": lk.with_activation_checkpointing(),
    "  save='matmuls'": lk.with_activation_checkpointing(save="matmuls"),
    "  and in backward": lk.compose(
        lk.with_activation_checkpointing(), lk.with_optimizer_in_backward()
    ),
    "with_microbatch(256)": lk.with_microbatch(256),
    "with_activation_offload()": lk.with_activation_offload(),
}


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        return x + self.fall(nn.functional.gelu(self.rise(x)))


class Blocks(nn.Module):
    """Eight of them."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        for block in self.blocks:
            x = block(x)
        return x


def by_hand(model: nn.Module, batches: Iterator[Tensor]) -> None:
    """The loop that one writes by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in batches:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()


def decorated(model: nn.Module, batches: Iterator[Tensor], name: str) -> None:
    """The same with a decorator, through `run`."""
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.01))
    step = DECORATORS[name](lambda s, x: s.model(x).square().mean())
    lk.run(step, state, batches, max_epochs=1).finish()


def trained(name: str, width: int, device: torch.device) -> nn.Module:
    """A training; its batches come from a generator, one by one."""
    torch.manual_seed(0)
    model = Blocks(width).to(device)
    batches = (torch.randn(2 * width, width, device=device) for _ in range(UPDATES))
    if name == HAND:
        by_hand(model, batches)
    else:
        decorated(model, batches, name)
    return model


def process_peak() -> int:
    """Bytes of the process's largest resident set."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tensors_peak(training: Callable[[], nn.Module], device: torch.device) -> int:
    """Bytes of tensors at the most, during a training."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        training()
        return torch.cuda.max_memory_allocated(device)
    with torch.profiler.profile(profile_memory=True) as found:
        training()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    ordered = sorted(events, key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in ordered))


def measure(name: str) -> None:
    """Print both peaks, less the weights, and a digest of the weights."""
    device = lk.device()
    trained(name, 16, device)
    before = process_peak()
    model = trained(name, 512, device)
    size = sum(p.nbytes for p in model.parameters())
    grown = process_peak() - before - size
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:8]
    del model, weights
    print(tensors_peak(lambda: trained(name, 512, device), device) - size, grown, digest)


def main() -> None:
    """Measure each in processes of its own, and show a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[HAND, *DECORATORS], help="measure this one, here")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    args = parser.parse_args()
    if args.only:
        measure(args.only)
        return
    rows, base = [], None
    for name in [HAND, *DECORATORS]:
        command = [sys.executable, __file__, "--only", name]
        done = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            for _ in range(args.processes)
        ]
        digest = done[0][-1]
        found = [statistics.median(int(d[i]) for d in done) / 2**20 for i in (0, 1)]
        base = base or found
        rows.append(
            f"| {name} | {found[0]:.1f} | {found[0] / base[0]:.3f} | {found[1]:.0f}"
            f" | {found[1] / base[1]:.3f} | {digest} |"
        )
    show("memory", TEXT, table(HEAD, *rows), write=args.write)


if __name__ == "__main__":
    main()
