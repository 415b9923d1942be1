"""The same training in loopkit and in its peers: what each adds to the hand-written loop.

    python benchmarks/peers.py                       # all; table and figure in benchmarks/results
    python benchmarks/peers.py --only loopkit Ignite --tasks mlp --add

Each peer trains in processes of its own, on batches that one iterable gives it. Between rounds of
its updates that iterable runs as many updates of the loop written by hand, so that both
meet the same load, and what is compared is pairs of CPU times (one thread). Both end
in bitwise equal weights, which is checked. Every peer runs as quietly as it can: no
logger, no progress bar, no checkpoints; what it has no setting for (gradient clipping in Ignite,
say) is written into its step as its manual shows. Single times mean nothing on a shared
machine; the load is in the table.

Rounds last about 15 ms and there are hundreds: the same kernels on the same data take up to a third
longer for milliseconds at a time (no page fault, no switch of context is seen at it; a convolution
and a GPT suffer most), so long rounds spread widely, and a median of many short ones
does not. Two processes differ by more than that median's error, so each peer has several, in
turns with the others, and the table shows how far apart their medians are.
"""

import argparse
import contextlib
import importlib
import inspect
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from report import RESULTS, about

WINDOW = 4
ROUNDS = {"mlp": (80, 40), "conv": (100, 8), "gpt": (80, 4)}  # rounds, micro-batches in each
PROCESSES = 3
Batch = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.mix, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to what came before."""
        n, t, c = x.shape
        q, k, v = self.mix(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, t, c))


class Block(nn.Module):
    """Attention and a feed-forward network, each with its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width, heads)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Two residual branches."""
        x = x + self.attention(self.norms[0](x))
        return x + self.feed(self.norms[1](x))


class GPT(nn.Module):
    """A small language model."""

    def __init__(self, vocabulary: int = 64, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(32, width))
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(blocks)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, classes second."""
        return self.head(self.blocks(self.tokens(tokens) + self.places)).transpose(1, 2)


def mlp() -> tuple[nn.Module, list[Batch]]:
    """A tiny MLP on random numbers."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return model, [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(64)]


def conv() -> tuple[nn.Module, list[Batch]]:
    """A small convolutional network on real handwritten digits."""
    from sklearn.datasets import load_digits

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    return model, [*zip(images.split(32)[:-1], labels.split(32)[:-1], strict=True)]


def gpt() -> tuple[nn.Module, list[Batch]]:
    """A GPT of two blocks on random tokens."""
    tokens = [torch.randint(64, (4, 33)) for _ in range(32)]
    return GPT(), [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


TASKS = {"mlp": mlp, "conv": conv, "gpt": gpt}


def make(task: str) -> tuple[nn.Module, torch.optim.Optimizer, list[Batch]]:
    """The same model, optimizer and data each time."""
    torch.manual_seed(0)
    model, batches = TASKS[task]()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), batches


def shrink(update: int) -> float:
    """What the learning rate is multiplied with."""
    return 1 / (1 + update / 1000)


def by_hand(model: nn.Module, optimizer: Any, data: Any, full: bool) -> Iterator[None]:
    """The loop that one writes by hand; yields after each micro-batch."""
    if not full:
        for inputs, labels in data:
            optimizer.zero_grad()
            loss = loss_of(model, inputs, labels)
            loss.backward()
            optimizer.step()
            yield
        return
    scheduler = LambdaLR(optimizer, shrink)
    for i, (inputs, labels) in enumerate(data, 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, inputs, labels)
        (loss / WINDOW).backward()
        if i % WINDOW == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        yield


FRAMES: list[str] = []


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The user's own lines; once, it notes which library files are above it on the stack."""
    if not FRAMES:
        FRAMES.extend(frame.filename for frame in inspect.stack(0)[1:])
    return F.cross_entropy(model(inputs), labels)


class Interleaved:
    """An iterable of batches that times its consumer, and between rounds the loop by hand."""

    def __init__(self, task: str, full: bool, rounds: int, size: int) -> None:
        self.rounds, self.size, self.pairs = rounds, size, []
        self.model, optimizer, self.batches = make(task)
        self.hand = by_hand(self.model, optimizer, self._cycle(), full)

    def __len__(self) -> int:
        return (self.rounds + 1) * self.size

    def _cycle(self) -> Iterator[Batch]:
        for i in range(len(self)):
            yield self.batches[i % len(self.batches)]

    def _by_hand(self) -> float:
        start = time.process_time()
        with torch.enable_grad():
            for _ in range(self.size):
                next(self.hand)
        return time.process_time() - start

    def finish(self) -> None:
        """Let the loop by hand catch up: not every peer asks for a batch after the last."""
        for _ in self.hand:
            pass

    def __iter__(self) -> Iterator[Batch]:
        batches = self._cycle()
        for round_ in range(self.rounds + 1):
            first = round_ % 2
            hand = self._by_hand() if first else 0.0
            start = time.process_time()
            for _ in range(self.size):
                yield next(batches)
            spent = time.process_time() - start
            hand = hand if first else self._by_hand()
            if round_:  # the first round warms up
                self.pairs.append((hand, spent))


# The peers: each trains model with optimizer on the data, to its end.


def hand(model: nn.Module, optimizer: Any, data: Interleaved, full: bool) -> None:
    """The loop by hand against itself: the noise of the method."""
    for _ in by_hand(model, optimizer, data, full):
        pass


def loopkit(model: nn.Module, optimizer: Any, data: Interleaved, full: bool) -> None:
    """This library."""
    import loopkit as lk

    def step(state: lk.TrainState, batch: Batch) -> Tensor:
        return loss_of(state.model, *batch)

    if full:
        step = lk.compose(
            lk.with_schedule(lr=lambda n: 1e-3 * shrink(n)),
            lk.with_clip(1.0),
            lk.with_grad_accum(WINDOW),
            lk.with_amp("bf16"),
        )(step)
    for _ in lk.run(step, lk.TrainState(model, optimizer), data, max_epochs=1):
        pass


def lightning(
    model: nn.Module, optimizer: Any, data: Interleaved, full: bool, **settings: Any
) -> None:
    """Lightning's Trainer, with everything off that can be."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Batch, index: int) -> Tensor:  # noqa: ARG002
            return loss_of(self.net, *batch)

        def configure_optimizers(self) -> Any:
            if not full:
                return optimizer
            schedule = {"scheduler": LambdaLR(optimizer, shrink), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    if full:
        settings |= {"precision": "bf16-mixed", "accumulate_grad_batches": WINDOW}
        settings |= {"gradient_clip_val": 1.0}
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    if not settings.get("barebones"):
        settings |= dict.fromkeys(off, False)
    L.Trainer(max_epochs=1, accelerator="cpu", devices=1, **settings).fit(Module(), data)


def lightning_barebones(model: nn.Module, optimizer: Any, data: Interleaved, full: bool) -> None:
    """Lightning's Trainer(barebones=True), made for measuring."""
    lightning(model, optimizer, data, full, barebones=True)


def fabric(model: nn.Module, optimizer: Any, data: Interleaved, full: bool) -> None:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    precision = "bf16-mixed" if full else "32-true"
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    scheduler = LambdaLR(optimizer, shrink) if full else None
    wrapped, optimizer = fabric.setup(model, optimizer)
    for i, batch in enumerate(data, 1):
        last = not full or i % WINDOW == 0
        with fabric.no_backward_sync(wrapped, enabled=not last) if full else no_context():
            loss = loss_of(wrapped, *batch)
            fabric.backward(loss / WINDOW if full else loss)
        if last:
            if scheduler is not None:
                fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()


def accelerate(model: nn.Module, optimizer: Any, data: Interleaved, full: bool) -> None:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if full else "no",
        gradient_accumulation_steps=WINDOW if full else 1,
    )
    scheduler = LambdaLR(optimizer, shrink if full else lambda _: 1.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for batch in data:
        with accelerator.accumulate(model):
            loss = loss_of(model, *batch)
            accelerator.backward(loss)
            if full and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if full:
                scheduler.step()
            optimizer.zero_grad()


def transformers(model: nn.Module, optimizer: Any, data: Interleaved, full: bool) -> None:
    """Hugging Face Trainer."""
    from transformers import Trainer, TrainingArguments

    class Mine(Trainer):
        def get_train_dataloader(self) -> Any:
            return Named(data)

        def compute_loss(self, model: nn.Module, inputs: Any, **_: Any) -> Tensor:
            return loss_of(model, inputs["x"], inputs["labels"])

    steps = len(data) // (WINDOW if full else 1)
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=steps,
        gradient_accumulation_steps=WINDOW if full else 1,
        bf16=full,
        max_grad_norm=1.0 if full else 0.0,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    scheduler = LambdaLR(optimizer, shrink if full else lambda _: 1.0)
    trainer = Mine(model, arguments, train_dataset=[0], optimizers=(optimizer, scheduler))
    trainer.train()


class Named:
    """Batches by name, as the Hugging Face Trainer wants them."""

    def __init__(self, data: Interleaved) -> None:
        self.data, self.dataset, self.batch_size, self.sampler = data, [0], 8, None

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for inputs, labels in self.data:
            yield {"x": inputs, "labels": labels}


def ignite(model: nn.Module, optimizer: Any, data: Interleaved, full: bool) -> None:
    """PyTorch Ignite."""
    from ignite.engine import Engine

    scheduler = LambdaLR(optimizer, shrink)

    def plain(engine: Engine, batch: Batch) -> Tensor:  # noqa: ARG001
        optimizer.zero_grad()
        loss = loss_of(model, *batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def accumulated(engine: Engine, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, *batch)
        (loss / WINDOW).backward()
        if engine.state.iteration % WINDOW == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return loss.detach()

    model.train()
    Engine(accumulated if full else plain).run(data, max_epochs=1)


def torchtnt(model: nn.Module, optimizer: Any, data: Interleaved, full: bool) -> None:
    """TorchTNT's AutoUnit."""
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.train import train

    class Unit(AutoUnit):
        def compute_loss(self, state: Any, data: Batch) -> Any:  # noqa: ARG002
            return loss_of(self.module, *data), None

        def configure_optimizers_and_lr_scheduler(self, module: nn.Module) -> Any:  # noqa: ARG002
            return optimizer, LambdaLR(optimizer, shrink) if full else None

    settings = (
        {"precision": "bf16", "gradient_accumulation_steps": WINDOW, "clip_grad_norm": 1.0}
        if full
        else {}
    )
    unit = Unit(module=model, device=torch.device("cpu"), step_lr_interval="step", **settings)
    train(unit, data, max_epochs=1)


def skorch(model: nn.Module, optimizer: Any, data: Interleaved, full: bool) -> None:
    """Skorch's NeuralNet."""
    from skorch import NeuralNet

    scheduler, count = LambdaLR(optimizer, shrink), [0]

    class Net(NeuralNet):
        def initialize_module(self) -> Any:
            self.module_ = model
            return self

        def initialize_optimizer(self, *_: Any, **__: Any) -> Any:
            self.optimizer_ = optimizer
            return self

        def get_iterator(self, *_: Any, **__: Any) -> Any:
            return data

        def train_step_single(self, batch: Batch, **_: Any) -> Any:
            self._set_training(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=full):
                loss = loss_of(self.module_, *batch)
            (loss / WINDOW if full else loss).backward()
            return {"loss": loss, "y_pred": None}

        def train_step(self, batch: Batch, **parameters: Any) -> Any:
            if not full:
                return super().train_step(batch, **parameters)
            count[0] += 1
            found = self.train_step_single(batch, **parameters)
            if count[0] % WINDOW == 0:
                nn.utils.clip_grad_norm_(self.module_.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            return found

    net = Net(type(model), nn.CrossEntropyLoss, train_split=None, max_epochs=1, verbose=0)
    net.set_params(callbacks="disable")
    net.fit(data.batches[0][0], data.batches[0][1])


no_context = contextlib.nullcontext
PEERS: dict[str, tuple[str, Callable[..., None]]] = {
    "by hand": ("torch", hand),
    "loopkit": ("loopkit", loopkit),
    "Ignite": ("ignite", ignite),
    "Fabric": ("lightning", fabric),
    "skorch": ("skorch", skorch),
    "Accelerate": ("accelerate", accelerate),
    "TorchTNT": ("torchtnt", torchtnt),
    "Lightning": ("lightning", lightning),
    "Lightning barebones": ("lightning", lightning_barebones),
    "HF Trainer": ("transformers", transformers),
}


def one(peer: str, task: str, mode: str, scale: float) -> dict[str, Any]:
    """Train in one peer and measure it; in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    package, train = PEERS[peer]
    started = time.process_time()
    importlib.import_module(package)
    imported = time.process_time() - started
    rounds, size = ROUNDS[task]
    data = Interleaved(task, mode == "full", max(4, int(rounds * scale)), size)
    model, optimizer, _ = make(task)
    with contextlib.redirect_stdout(sys.stderr):
        train(model, optimizer, data, mode == "full")
    data.finish()
    above = [name for name in FRAMES if f"{os.sep}{package}{os.sep}" in name]
    equal = all(map(torch.equal, data.model.parameters(), model.parameters()))
    return {
        "pairs": [[round(1e6 * hand), round(1e6 * theirs)] for hand, theirs in data.pairs],
        "equal": equal,
        "frames": 0 if package == "torch" else len(above),
        "import_s": imported if package != "torch" else 0.0,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load": os.getloadavg()[0],
    }


def rows_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the results: for each peer, task and mode all processes together.

    What was summed up before, and has no pairs, counts where no process has any.
    """
    cells = {
        (peer, task, mode): [f for f in found if cell_of(f) == (peer, task, mode)]
        for task, mode, peer in itertools.product(TASKS, MODES, PEERS)
    }
    rows = []
    for cell, processes in cells.items():
        measured = [process for process in processes if "pairs" in process]
        rows += [summed_up(*cell, measured)] if measured else processes[:1]
    return rows


def cell_of(found: dict[str, Any]) -> tuple[str, str, str]:
    """What one process has measured."""
    return found["peer"], found["task"], found["mode"]


def summed_up(peer: str, task: str, mode: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the results: the pairs of all processes together."""
    size = ROUNDS[task][1]
    updates = size / (WINDOW if mode == "full" else 1)
    pairs = [pair for one_process in found for pair in one_process["pairs"]]
    low, ratio, high = statistics.quantiles((p / h for h, p in pairs), n=4)
    medians = [statistics.median(p / h for h, p in f["pairs"]) for f in found]
    extra_us = statistics.median(p - h for h, p in pairs)
    return {
        "peer": peer,
        "task": task,
        "mode": mode,
        "ratio": ratio,
        "low": low,
        "high": high,
        "medians": sorted(medians),
        "hand_us": statistics.median(h for h, _ in pairs) / updates,
        "extra_us": extra_us / updates,
        "extra_us_micro": extra_us / size,
        "equal": all(f["equal"] for f in found),
        "frames": found[0]["frames"],
        "import_s": statistics.median(f["import_s"] for f in found),
        "peak_mib": statistics.median(f["peak_mib"] for f in found),
        "load": max(f["load"] for f in found),
    }


def measured(peer: str, task: str, mode: str, scale: float) -> dict[str, Any] | None:
    """What `one` finds, in a process of its own; None where the peer is not there or fails."""
    line = [sys.executable, __file__, "--one", peer, task, mode, "--scale", str(scale)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{peer} {task} {mode}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


PACKAGES = (
    "pytorch-ignite", "lightning", "skorch", "accelerate", "torchtnt", "transformers",
)  # fmt: skip
MADE = (
    "Made by `python benchmarks/peers.py`, which says how. CPU time, one thread; ratios are medians"
    " of pairs, with their quartiles, and the medians of the processes of one peer. An update of"
    " `full` is four micro-batches."
)
HEAD = (
    "| | over by hand | quartiles | processes | us for each update | us for each micro-batch"
    " | weights bitwise equal |"
)
ONCE = (
    "Import is CPU time after `import torch`; peak memory is that of the whole process (mlp,"
    " plain), the hand-written twin included; frames are the library's own between the loop and"
    " the user's loss."
)


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "# What each library adds to the hand-written loop",
        "",
        about(*PACKAGES),
        "",
        MADE,
        "",
    ]
    for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in rows):
        some = [row for row in rows if (row["task"], row["mode"]) == (task, mode)]
        base = statistics.median(row["hand_us"] for row in some)
        lines += [
            f"## {task}, {mode} (by hand {base:,.0f} us an update)",
            "",
            HEAD,
            "|---|---|---|---|---|---|---|",
            *(
                f"| {r['peer']} | {r['ratio']:.3f} | {r['low']:.3f} to {r['high']:.3f}"
                f" | {r['medians'][0]:.3f} to {r['medians'][-1]:.3f}"
                f" | {r['extra_us']:+.1f} | {r['extra_us_micro']:+.1f}"
                f" | {'yes' if r['equal'] else 'no'} |"
                for r in sorted(some, key=lambda r: r["ratio"])
            ),
            "",
        ]
    return "\n".join([*lines, *_once(rows), ""])


def _once(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Import, memory, stack",
        "",
        ONCE,
        "",
        "| | import, s | peak memory, MiB | library frames above the step | load of the machine |",
        "|---|---|---|---|---|",
    ]
    first = {row["peer"]: row for row in reversed(rows)}
    return lines + [
        f"| {peer} | {row['import_s']:.2f} | {row['peak_mib']:.0f} | {row['frames']}"
        f" | {row['load']:.1f} |"
        for peer, row in ((p, first[p]) for p in PEERS if p in first)
    ]


TITLES = {"mlp": "tiny MLP", "conv": "small conv net", "gpt": "small GPT"}
MODES = {"plain": "plain", "full": "bf16, 4 micro-batches, clip, schedule"}
COLOURS = {"loopkit": "#d1495b", "by hand": "#d8dee9"}


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """What each adds to the hand-written loop, in per cent, with quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    there = {(r["task"], r["mode"]) for r in rows}
    panels = [(t, m) for t in TASKS for m in MODES if (t, m) in there]
    shape = ((len(panels) + 1) // 2, 2)
    drawn, axes = plt.subplots(*shape, figsize=(11, 3.4 * shape[0]), squeeze=False)
    for axis, (task, mode) in zip(axes.flat, panels, strict=False):
        some = [r for r in rows if (r["task"], r["mode"]) == (task, mode)]
        _draw(axis, sorted(some, key=lambda r: -r["ratio"]))
        axis.set_title(f"{TITLES[task]}, {MODES[mode]}", fontsize=10, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel(
            "CPU time over the hand-written loop, %, and for a micro-batch; lines: quartiles",
            fontsize=8,
        )
    drawn.tight_layout()
    drawn.savefig(path, dpi=130)


def _draw(axis: Any, some: list[dict[str, Any]]) -> None:
    per_cent = {key: [100 * (r[key] - 1) for r in some] for key in ("low", "ratio", "high")}
    spread = [
        [middle - low for low, middle in zip(per_cent["low"], per_cent["ratio"], strict=True)],
        [high - middle for high, middle in zip(per_cent["high"], per_cent["ratio"], strict=True)],
    ]
    axis.barh(
        [r["peer"] for r in some],
        per_cent["ratio"],
        xerr=spread,
        color=[COLOURS.get(r["peer"], "#8d99ae") for r in some],
        error_kw={"elinewidth": 0.8, "ecolor": "#4c566a"},
    )
    widest = max(*per_cent["high"], 5)
    for i, r in enumerate(some):
        text = f"{per_cent['ratio'][i]:+.1f} % ({r['extra_us_micro']:+.0f} us)"
        axis.text(max(per_cent["high"][i], 0) + widest / 60, i, text, va="center", fontsize=8)
    axis.set_ylim(-0.6, max(len(some), 6) - 0.4)
    axis.set_xlim(min(*per_cent["low"], 0), widest * 1.5)
    axis.axvline(0, color="#2e3440", linewidth=0.8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Measure all, or what was asked for, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("PEER", "TASK", "MODE"))
    parser.add_argument("--only", nargs="*", default=[*PEERS], choices=PEERS)
    parser.add_argument("--tasks", nargs="*", default=[*TASKS], choices=TASKS)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--add", action="store_true", help="processes to those there are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one, args.scale)))
        return
    args.out.mkdir(exist_ok=True)
    kept = args.out / "peers.json"
    found = json.loads(kept.read_text()) if args.add and kept.exists() else []
    for _, task, mode, peer in itertools.product(
        range(args.processes), args.tasks, MODES, args.only
    ):
        if not (process := measured(peer, task, mode, args.scale)):
            continue
        found.append({"peer": peer, "task": task, "mode": mode, **process})
        lines = ",\n".join(map(json.dumps, found))
        kept.write_text(f"[\n{lines}\n]\n")  # at once: a run takes long
        (row,) = rows_of([f for f in found if cell_of(f) == (peer, task, mode)])
        shown = f"{row['ratio']:.3f} {row['extra_us_micro']:+9.1f} us"
        print(f"{peer:<20} {task:<5} {mode:<6} {shown}  equal: {row['equal']}", flush=True)
    rows = rows_of(found)
    (args.out / "peers.md").write_text(table(rows))
    figure(rows, args.out / "peers.png")


if __name__ == "__main__":
    main()
