"""The peak memory of a step under the decorators that save some, each in a process of its own.

    python benchmarks/memory.py

A residual MLP (8 blocks of 512-2048-512, float32, batch 2048, plain SGD) makes two updates.
On CUDA the peak is the allocator's; on a CPU it is the growth of the process's largest
resident set since a training of a tiny model, which has loaded all code. All variants end with
bitwise equal weights, save those that cut the batch, whose sums are made in another order.
"""

import argparse
import hashlib
import resource
import subprocess
import sys

import loopkit as lk
import torch
from torch import Tensor, nn

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


def peak(device: torch.device) -> int:
    """Bytes at the most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def trained(name: str, width: int, device: torch.device) -> nn.Module:
    """Two updates with one decorator."""
    torch.manual_seed(0)
    model = Blocks(width).to(device)
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.01))
    step = DECORATORS[name](lambda s, x: s.model(x).square().mean())
    batch = torch.randn(4 * width, width, device=device)
    for _ in range(2):
        step(state, batch)
    return model


def measure(name: str) -> None:
    """Print the growth of the peak, less the weights, and a digest of the weights."""
    device = lk.device()
    trained(name, 16, device)
    before = peak(device)
    model = trained(name, 512, device)
    grown = peak(device) - before - sum(p.nbytes for p in model.parameters())
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    print(grown, hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:8])


def main() -> None:
    """Measure each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=DECORATORS, help="measure this one, here")
    if only := parser.parse_args().only:
        measure(only)
        return
    weights = sum(p.nbytes for p in Blocks().parameters()) / 2**20
    print(f"beside the {weights:.0f} MiB of the weights, on {lk.device()}:")
    for name in DECORATORS:
        command = [sys.executable, __file__, "--only", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        grown, digest = done.stdout.split()
        print(f"{name:<32} {int(grown) / 2**20:7.0f} MiB   weights {digest}")


if __name__ == "__main__":
    main()
