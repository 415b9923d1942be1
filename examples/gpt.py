"""A small GPT learns to write Python functions from the standard library's own.

    python examples/gpt.py
    torchrun --nproc-per-node=2 examples/gpt.py --strategy fsdp

It reads the short functions of the library, 3,400 of them, character by character. They are
of many lengths, so each micro-batch says how many characters its loss is a mean over.
Stop it, run it again, and it goes on where it was; when it is through, it only writes.

500 updates, about three minutes of processor time: 1.36 nats per character on functions that it
never saw, where a table of all pairs of characters has 2.39. What it writes is rarely Python
yet (2 of 20 can be parsed), but has its shape: names, bodies, brackets, what returns.
"""

import argparse
import ast
import contextlib
import sysconfig
import textwrap
import time
import warnings
from pathlib import Path

import loopkit as lk
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

LONGEST, WIDTH, HEADS, LAYERS = 256, 128, 4, 4
BATCH_SIZE, PEAK_LR, SAVE_EVERY, WRITTEN = 6, 4e-3, 100, 20
END, NOTHING = 0, -1  # the character before and after a function; what pads its targets


def functions():
    """The functions, as numbers, each once; in an order of their own, the same for everyone."""
    found = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        with warnings.catch_warnings(action="ignore"):  # of the library's own escapes
            nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
        for node in nodes:
            code = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).strip()
            if len(code) < LONGEST and code.isascii():
                found[code] = torch.tensor([END, *map(ord, code), END])
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [[*found.values()][i] for i in order]


def collate(functions):
    """Inputs and targets (n, longest of these): at each place the character that comes next."""
    inputs = pad_sequence([f[:-1] for f in functions], batch_first=True)
    targets = [f[1:] for f in functions]
    return inputs, pad_sequence(targets, batch_first=True, padding_value=NOTHING)


class Block(nn.Module):
    """Attention to what came before, then a small network for each place."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out, wide = nn.Linear(WIDTH, WIDTH, bias=False), 4 * WIDTH
        hidden = nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, WIDTH)
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
    logits = state.model(inputs).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=NOTHING)
    return {"loss": loss, "weight": (targets != NOTHING).sum()}


@torch.no_grad()
def write(model, dice, temperature=0.6):
    """A function of the model's own; all ranks throw the same dice, as all hold a part of it."""
    ids = [END]
    while len(ids) <= LONGEST and (len(ids) == 1 or ids[-1] != END):
        logits = model(torch.tensor([ids], device=lk.device()))[0, -1]
        chances = (logits / temperature).softmax(-1).cpu()
        ids.append(torch.multinomial(chances, 1, generator=dice).item())
    return "".join(map(chr, ids)).strip("\0")


def is_python(code):
    """Whether it is at least grammatical."""
    with contextlib.suppress(SyntaxError):
        return bool(ast.parse(code).body)
    return False


def main(argv=None):
    """Train, or go on training; then say what was learned, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--strategy", default="ddp", help="under torchrun: ddp, fsdp, zero1, ...")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpt"), help="of checkpoints")
    args = parser.parse_args(argv)
    generator = lk.seed_everything(0)
    texts = functions()
    test, train = texts[:300], texts[300:]
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, collate_fn=collate, generator=generator)

    model = GPT().to(lk.device("auto"))
    if args.compile:
        model.compile(dynamic=True)
    state = lk.TrainState(model, lk.configure_optimizer(model, "muon", PEAK_LR, weight_decay=0.1))
    schedule = lk.warmup(0.05, peak=PEAK_LR) >> lk.cosine(floor=PEAK_LR / 20)
    features = lk.with_schedule(lr=schedule.over(args.updates)), lk.distributed(args.strategy)
    step = lk.compose(*features)(train_step)

    with lk.Checkpointer(args.folder, every=SAVE_EVERY) as checkpoints:
        if checkpoints.restore(state):
            print(f"going on from update {state.step}")
        characters, began = 0, time.perf_counter()
        updates = lk.run(step, state, loader, max_steps=args.updates)
        for state in lk.progress(checkpoints.wrap(updates)):
            characters += state.outcome.total_weight()
        speed = int(characters) / (time.perf_counter() - began)

    with lk.ema_weights(state):
        scores = lk.evaluate(step, state, DataLoader(test, 50, collate_fn=collate))
        dice = torch.Generator().manual_seed(state.step)
        written = [write(model, dice) for _ in range(WRITTEN)]
    if state.ranks.is_first:
        grammatical = sum(map(is_python, written))
        print(*written[:5], sep="\n\n")
        print(f"\n{grammatical} of {len(written)} are Python; {speed:,.0f} characters/s a process")
        print(f"test loss {scores['loss']:.3f} nats per character")
    return scores["loss"]


if __name__ == "__main__":
    main()
