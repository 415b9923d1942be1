"""A small GPT learns to write Python functions from the standard library's own.

    python examples/gpt.py
    torchrun --nproc-per-node=2 examples/gpt.py --strategy fsdp

It reads the short functions of the library, 3,300 of them, character by character. They are
of many lengths, so each micro-batch says how many characters its loss is a mean over.
Stop it, run it again, and it goes on where it was; when it is through, it only writes.

500 updates, about three minutes of processor time: 1.34 nats per character on functions that it
never saw, where a table of all pairs of characters has 2.41.
"""

import argparse
import re
import sysconfig
import textwrap
from pathlib import Path

import loopkit as lk
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

LONGEST, WIDTH, HEADS, LAYERS = 256, 128, 4, 4
UPDATES, BATCH_SIZE, PEAK_LR, SAVE_EVERY = 500, 6, 4e-3, 100
END, PADDING = 0, -100  # before and after a function; targets that cross_entropy leaves out
FUNCTION = re.compile(r"^( *)def .*\n(?:\1[ )].*\n|\n)+", re.MULTILINE)


def functions():
    """Of each function its characters, as numbers, and at each place the one that comes next."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = (f[0] for file in files for f in FUNCTION.finditer(file.read_text("utf-8")))
    texts = sorted({textwrap.dedent(code).strip() for code in found if code.isascii()})
    rows = [torch.tensor([END, *map(ord, text), END]) for text in texts if len(text) < LONGEST]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [(rows[i][:-1], rows[i][1:]) for i in order]


class Block(nn.Module):
    """Attention to what came before, then a small network for each place."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        hidden = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.RMSNorm(WIDTH), *hidden)

    def forward(self, x):
        """The same shape: (n, length, WIDTH)."""
        qkv = self.qkv(self.norm(x)).unflatten(2, (3 * HEADS, -1)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(*qkv.chunk(3, 1), is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    """How likely each character comes next."""

    def __init__(self):
        super().__init__()
        self.characters, self.places = nn.Embedding(128, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 128, bias=False)
        for table in (self.characters, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids):
        """Logits (n, length, 128)."""
        places = self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(self.characters(ids) + places)))


@lk.with_ema(0.98)
@lk.with_clip(1.0)
@lk.with_grad_accum(2)
def train_step(state, batch):
    """The mean over the characters there are, and how many they are."""
    inputs, targets = batch
    loss = F.cross_entropy(state.model(inputs).flatten(0, 1), targets.flatten())
    return {"loss": loss, "weight": (targets != PADDING).sum()}


@torch.no_grad()
def write(model, dice, temperature=0.6):
    """A function of the model's own; all ranks throw the same dice, as all hold a part of it."""
    ids = [END]
    while len(ids) <= LONGEST and (len(ids) == 1 or ids[-1] != END):
        logits = model(torch.tensor([ids], device=lk.device()))[0, -1]
        chances = (logits / temperature).softmax(-1).cpu()
        ids.append(torch.multinomial(chances, 1, generator=dice).item())
    return "".join(map(chr, ids)).strip("\0")


def main(strategy="ddp", backend=None, folder="runs/gpt"):
    """Train, or go on training; then say what was learned, and write."""
    lk.seed_everything(0)
    texts, pad = functions(), lk.pad_collate({1: PADDING})
    loader = DataLoader(texts[300:], BATCH_SIZE, shuffle=True, collate_fn=pad)
    schedule = lk.warmup(0.05, peak=PEAK_LR) >> lk.cosine(floor=PEAK_LR / 20)
    features = [lk.with_schedule(lr=schedule.over(UPDATES)), lk.distributed(strategy)]
    if backend:
        features.append(lk.with_compile(backend=backend, dynamic=True))
    step = lk.compose(*features)(train_step)

    model = GPT().to(lk.device("auto"))
    state = lk.TrainState(model, lk.configure_optimizer(model, "muon", PEAK_LR, weight_decay=0.1))
    with lk.Checkpointer(folder, every=SAVE_EVERY) as checkpoints:
        checkpoints.restore(state)
        updates = lk.throughput(lk.run(step, state, loader, max_steps=UPDATES))
        lk.progress(checkpoints.wrap(updates)).finish()

    with lk.ema_weights(state):
        scores = lk.evaluate(step, state, DataLoader(texts[:300], 50, collate_fn=pad))
        dice = torch.Generator().manual_seed(0)
        written = [write(model, dice) for _ in range(5)]
    if state.ranks.is_first:
        print(*written, f"{updates.tokens_per_s:,.0f} characters/s a process", sep="\n\n")
        print(f"test loss {scores['loss']:.3f} nats per character")
    return scores["loss"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--strategy", default="ddp", help="under torchrun: ddp, fsdp, zero1, ...")
    parser.add_argument("--backend", help="to compile with: inductor, which needs a C++ compiler")
    main(**vars(parser.parse_args()))
