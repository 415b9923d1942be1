"""The rows of the goals that need a CUDA device: speed, host waits, memory, the cost of `run`.

    python benchmarks/cuda.py --write                  # all of it, into results/cuda.md
    python benchmarks/cuda.py --write --only gpt2      # a section; the others stay as they were
    python benchmarks/cuda.py --device cpu --tiny      # each line, on sizes that mean nothing

One process trains the hand-written loop and this library in turns, in short rounds; the medians of
the rounds' ratios are shown with their quartiles. A device computes beside the host, so times
are wall times: of rounds that end by waiting for the device, or, for what `run` costs, of the host
alone, which then only gives work to the device.

The hand-written loop is as one tunes it: torch.compile, fused AdamW, gradients set to None,
nothing read from the device. Weights are compared at the end of each section.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import loopkit as lk
import torch
from loopkit.observe.flops import flop_counter
from loopkit.observe.peak import peak_flops
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from memory import tensors_peak
from peers import Block
from report import RESULTS, about, quartiles, show, table

WINDOW = 4
TEXT = """
# On a CUDA device

Goals: tokens/s of GPT-2 at least 1.0 of a hand-tuned loop and 50 % of the device's peak; a tiny
model as one CUDA graph at most 0.2 of the eager loop; no host wait in a step; peak memory at most
1.01. Wall time, medians of pairs of rounds with their quartiles.
"""
Batch = tuple[Tensor, Tensor]


class GPT2(nn.Module):
    """GPT-2's architecture: learned places, norms before each branch, tied embeddings."""

    def __init__(self, vocabulary: int, width: int, heads: int, blocks: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class WithLoss(nn.Module):
    """A model that computes its loss, too, so that both are compiled together."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss."""
        return F.cross_entropy(self.net(inputs).flatten(0, -2), labels.flatten())


def mlp() -> nn.Module:
    """A tiny model, whose step is all overhead."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


@attrs.frozen
class Setting:
    """Where it runs, and how large; `tiny` is for a look at whether it runs at all."""

    device: torch.device
    tiny: bool
    rounds: int
    batch: int

    @property
    def backend(self) -> str:
        """What compiles; inductor takes a minute for each model."""
        return "eager" if self.tiny else "inductor"

    def gpt2(self) -> tuple[nn.Module, list[Batch]]:
        """GPT-2 124M and micro-batches of random tokens."""
        torch.manual_seed(0)
        sizes = (96, 32, 2, 2, 16) if self.tiny else (50304, 768, 12, 12, 1024)
        model = WithLoss(GPT2(*sizes)).to(self.device)
        shape = (2 if self.tiny else self.batch, sizes[-1] + 1)
        tokens = [torch.randint(sizes[0], shape, device=self.device) for _ in range(2 * WINDOW)]
        return model, [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]

    def mlp(self) -> tuple[nn.Module, list[Batch]]:
        """The tiny model and its batches."""
        torch.manual_seed(0)
        model = WithLoss(mlp()).to(self.device)
        inputs = torch.randn(64, 8, 16, device=self.device)
        labels = torch.randint(4, (64, 8), device=self.device)
        return model, [*zip(inputs, labels, strict=True)]

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """What earlier sections have left in memory."""
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def fused(model: nn.Module) -> torch.optim.Optimizer:
    """The fastest AdamW that torch has."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def rate(update: int) -> float:
    """A learning rate that changes at each update."""
    return 1e-4 / (1 + update / 1000)


def step(state: lk.TrainState, batch: Batch) -> Tensor:
    """What a user of this library writes."""
    return state.model(*batch)


def plain_by_hand(model: nn.Module, batches: list[Batch]) -> Iterator[None]:
    """The loop that one writes by hand; an item is an update."""
    optimizer = fused(model)
    for inputs, labels in itertools.cycle(batches):
        optimizer.zero_grad(set_to_none=True)
        loss = model(inputs, labels)
        loss.backward()
        optimizer.step()
        yield


def amp_by_hand(
    model: nn.Module, batches: list[Batch], *, clip: bool = False, schedule: bool = False
) -> Iterator[None]:
    """The same with bf16 autocast and accumulation; and more where asked for."""
    optimizer, kind = fused(model), batches[0][0].device.type
    for update in itertools.count():
        if schedule:
            for group in optimizer.param_groups:
                group["lr"] = rate(update)
        optimizer.zero_grad(set_to_none=True)
        for i in range(WINDOW):
            inputs, labels = batches[(update * WINDOW + i) % len(batches)]
            with torch.autocast(kind, torch.bfloat16):
                loss = model(inputs, labels)
            (loss / WINDOW).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield


def with_loopkit(
    model: nn.Module, batches: list[Batch], *decorators: lk.Decorator
) -> Iterator[Any]:
    """The same training through `run`."""
    state = lk.TrainState(model, fused(model))
    return iter(lk.run(lk.compose(*decorators)(step), state, batches))


AMP = (lk.with_grad_accum(WINDOW), lk.with_amp("bf16"))
TUNED = (lk.with_schedule(lr=rate), lk.with_clip(1.0), *AMP)
WATCHED = (lk.with_ema(0.999), lk.with_nonfinite("skip"), *TUNED)
FP16 = (lk.with_ema(0.999), lk.with_schedule(lr=rate), lk.with_clip(1.0), lk.with_amp("fp16"))


def seconds(setting: Setting, updates: Iterator[Any], count: int, *, waits: bool = True) -> float:
    """Wall time of a number of updates: with the device's work, or of the host alone."""
    setting.wait()
    start = time.perf_counter()
    for _ in itertools.islice(updates, count):
        pass
    if waits:
        setting.wait()
    return time.perf_counter() - start


def pairs(
    setting: Setting, hand: Iterator[Any], ours: Iterator[Any], size: int, *, waits: bool = True
) -> list[tuple[float, float]]:
    """Seconds of an update by hand and by ours, in rounds that alternate."""
    found = []
    for i in range(setting.rounds):
        order = (hand, ours) if i % 2 else (ours, hand)
        times = [seconds(setting, updates, size, waits=waits) / size for updates in order]
        found.append((times[0], times[1]) if i % 2 else (times[1], times[0]))
    return found


def compared(found: list[tuple[float, float]]) -> str:
    """The time by hand, and our ratio with its quartiles, as cells of a row."""
    low, ratio, high = quartiles([ours / hand for hand, ours in found])
    hand_us = 1e6 * statistics.median(hand for hand, _ in found)
    return f"{hand_us:,.0f} | {ratio:.3f} | {low:.3f} to {high:.3f}"


def apart(first: nn.Module, second: nn.Module) -> str:
    """The largest difference of weights over the largest weight."""
    both = zip(first.parameters(), second.parameters(), strict=True)
    return f"{max(float((a - b).abs().max() / a.abs().max()) for a, b in both):.1e}"


# GPT-2


def flops_of_update(setting: Setting) -> float:
    """FLOPs of an update, as torch counts them in one micro-batch, before anything is compiled."""
    model, batches = setting.gpt2()
    with flop_counter() as counter:
        model(*batches[0]).backward()
    return float(counter.get_total_flops() * WINDOW)


def utilisation(setting: Setting, flops: float, update_s: float) -> str:
    """Model FLOPs utilisation, where the device's peak is known."""
    peak = peak_flops(setting.device, None)
    return f"{flops / update_s / peak:.1%}" if peak else "-"


def gpt2(setting: Setting) -> list[str]:
    """Tokens a second, and the share of the device's peak."""
    flops, rows = flops_of_update(setting), []
    for scope in ("model", "step"):
        setting.forget()
        (hand_model, batches), (our_model, _) = setting.gpt2(), setting.gpt2()
        hand_model.compile(backend=setting.backend)
        hand = amp_by_hand(hand_model, batches)
        compiled = lk.with_compile(scope, backend=setting.backend)
        ours = with_loopkit(our_model, batches, compiled, *AMP)
        begun = time.monotonic()
        seconds(setting, ours, 5)
        compiling_s = time.monotonic() - begun
        seconds(setting, hand, 5)
        differ = apart(hand_model, our_model)
        found = pairs(setting, hand, ours, 4)
        hand_s, our_s = (statistics.median(times) for times in zip(*found, strict=True))
        tokens = WINDOW * batches[0][0].numel()
        low, ratio, high = quartiles([h / o for h, o in found])
        rows.append(
            f"| `with_compile({scope!r})` | {tokens / hand_s:,.0f} | {tokens / our_s:,.0f}"
            f" | {ratio:.3f} | {low:.3f} to {high:.3f} | {utilisation(setting, flops, hand_s)}"
            f" | {utilisation(setting, flops, our_s)} | {differ} | {compiling_s:.0f} |"
        )
        print(rows[-1], flush=True)
    said = (
        f"GPT-2 124M: 12 blocks, 12 heads, 768 wide, block 1024, vocabulary 50304; bf16 autocast,"
        f" fused AdamW, {WINDOW} micro-batches of {setting.batch}; {flops / 1e12:.2f} TFLOPs for an"
        " update as torch counts them (attention without regard to the mask). The loop by hand"
        " compiles its model. Apart: after five updates of both."
    )
    head = (
        "| | tokens/s by hand | tokens/s | over by hand (goal >= 1.0) | quartiles"
        " | of the peak by hand | of the peak (goal >= 50 %) | apart | first five updates, s |"
    )
    return [said, "", *table(head, *rows)]


# A tiny model


def tiny(setting: Setting) -> list[str]:
    """The whole step as a CUDA graph."""
    rows = []
    for mode in (None, "reduce-overhead"):
        setting.forget()
        (hand_model, batches), (our_model, _) = setting.mlp(), setting.mlp()
        hand = plain_by_hand(hand_model, batches)
        compiled = lk.with_compile("step", mode=mode, backend=setting.backend)
        ours = with_loopkit(our_model, batches, compiled)
        skips = counters["inductor"]
        skips.pop("cudagraph_skips", None)
        seconds(setting, ours, 12), seconds(setting, hand, 12)
        differ = apart(hand_model, our_model)
        found = pairs(setting, hand, ours, 40)
        rows.append(
            f"| `mode={mode!r}` | {compared(found)}"
            f" | {'<= 0.2' if mode else ''} | {skips.get('cudagraph_skips', 0)} | {differ} |"
        )
        print(rows[-1], flush=True)
    said = (
        'A tiny MLP (16-32-4, batch 8), `with_compile("step")` over the eager loop with fused'
        " AdamW. Apart: after twelve updates of both."
    )
    head = "| | by hand, us | ratio | quartiles | goal | graphs that torch gave up | apart |"
    return [said, "", *table(head, *rows)]


# Host waits


def waits_in(setting: Setting, updates: Iterator[Any], count: int) -> str:
    """How often the host waited for the device in some updates, as torch's debug mode warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in itertools.islice(updates, count):
                pass
        finally:
            if setting.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    where = {f"{w.filename.split('/')[-1]}:{w.lineno}" for w in found}
    counted = setting.device.type == "cuda"
    return f"{len(found)} {', '.join(sorted(where))}" if counted else "not counted"


def waits(setting: Setting) -> list[str]:
    """Host waits in updates, batches that come from the host included."""
    rows, updates = [], 32
    cases = {"plain": (), "full": WATCHED, "fp16": FP16}
    for name, decorators in cases.items():
        setting.forget()
        model, batches = setting.mlp()
        on_host = [tuple(t.cpu() for t in batch) for batch in batches] * 8
        ours = with_loopkit(model, on_host, *decorators)
        seconds(setting, ours, 4)
        rows.append(f"| {name} | {waits_in(setting, ours, updates)} | 0 |")
        print(rows[-1], flush=True)
    said = (
        f"Waits of the host that torch's sync debug mode sees in {updates} updates of `run`, with"
        " batches from the host and fused AdamW. Full: bf16, 4 micro-batches, clip, schedule, EMA,"
        ' `with_nonfinite("skip")`; fp16: with clip, schedule and EMA. A schedule counts applied'
        " updates, so where the device decides whether one is, the next asks for that by a copy"
        " in the background, and waits for the end of the last update; the mode does not see that."
    )
    return [said, "", *table("| | waits | goal |", *rows)]


# Memory


def memory(setting: Setting) -> list[str]:
    """Peak memory of a few updates of GPT-2."""

    def by_hand() -> nn.Module:
        model, batches = setting.gpt2()
        seconds(setting, amp_by_hand(model, batches), 3)
        return model

    def ours() -> nn.Module:
        model, batches = setting.gpt2()
        seconds(setting, with_loopkit(model, batches, *AMP), 3)
        return model

    found: dict[str, float] = {}
    trainings: dict[str, Callable[[], nn.Module]] = {"by hand": by_hand, "`run`": ours}
    for name, training in trainings.items():
        setting.forget()
        found[name] = tensors_peak(training, setting.device) / 2**20
    base = found["by hand"]
    rows = [f"| {name} | {peak:,.1f} | {peak / base:.5f} |" for name, peak in found.items()]
    print("\n".join(rows), flush=True)
    said = "GPT-2 as above, not compiled, three updates: the most that torch's allocator held."
    return [said, "", *table("| | MiB | over by hand (goal <= 1.01) |", *rows)]


# The cost of run


def overhead(setting: Setting) -> list[str]:
    """What `run` adds to the time of the host."""
    rows = []
    cases: dict[str, tuple[Callable[..., Iterator[Any]], Callable[..., Iterator[Any]]]] = {
        "plain": (plain_by_hand, with_loopkit),
        "full": (
            lambda m, b: amp_by_hand(m, b, clip=True, schedule=True),
            lambda m, b: with_loopkit(m, b, *TUNED),
        ),
        "noise": (plain_by_hand, plain_by_hand),
    }
    for name, (hand_made, our_made) in cases.items():
        setting.forget()
        (hand_model, batches), (our_model, _) = setting.mlp(), setting.mlp()
        hand, ours = hand_made(hand_model, batches), our_made(our_model, batches)
        seconds(setting, hand, 20), seconds(setting, ours, 20)
        found = pairs(setting, hand, ours, 20, waits=False)
        differ = apart(hand_model, our_model)
        extra_us = 1e6 * statistics.median(o - h for h, o in found)
        rows.append(f"| {name} | {compared(found)} | {extra_us:+.1f} | {differ} |")
        print(rows[-1], flush=True)
    said = (
        "Time of the host, which gives work to the device and does not wait for it: a tiny MLP on"
        " the device. Full: bf16, 4 micro-batches, clip, schedule. Noise: by hand against itself."
    )
    head = "| | by hand, us | ratio | quartiles | over by hand, us for an update | apart |"
    return [said, "", *table(head, *rows)]


SECTIONS = {"gpt2": gpt2, "tiny": tiny, "waits": waits, "memory": memory, "overhead": overhead}
TITLES = {
    "gpt2": "GPT-2 124M: tokens a second",
    "tiny": "A tiny model as one CUDA graph",
    "waits": "Host waits",
    "memory": "Peak memory",
    "overhead": "What `run` adds",
}


def where(device: torch.device) -> str:
    """The device, and what drives it."""
    if device.type != "cuda":
        return "On the CPU, where these figures mean nothing."
    found = torch.cuda.get_device_properties(device)
    capability = f"{found.major}.{found.minor}"
    return f"{found.name}, capability {capability}, CUDA {torch.version.cuda}; {about()}"


def kept(write: bool) -> dict[str, list[str]]:
    """The sections that were measured before."""
    path = RESULTS / "cuda.json"
    return json.loads(path.read_text()) if write and path.exists() else {}


def main() -> None:
    """Measure the sections, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*SECTIONS], choices=SECTIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16, help="of GPT-2")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    args = parser.parse_args()
    device = lk.device(args.device)
    if args.write and (device.type != "cuda" or args.tiny):
        parser.error("--write is for what was measured on a CUDA device, at full size")
    setting = Setting(device, args.tiny, 2 if args.tiny else args.rounds, args.batch)
    warnings.simplefilter("ignore", DeprecationWarning)
    found = kept(args.write)
    try:
        for name in args.only:
            print(f"# {name}", flush=True)
            lines = SECTIONS[name](setting)
            found[name] = [f"## {TITLES[name]}", "", where(device), "", *lines, ""]
    finally:  # what was measured stays, whatever came next
        lines = [line for key in SECTIONS for line in found.get(key, [])][:-1]
        if args.write:
            (RESULTS / "cuda.json").write_text(json.dumps(found, indent=1) + "\n")
        show("cuda", TEXT, lines, write=args.write)


if __name__ == "__main__":
    main()
