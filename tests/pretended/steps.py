"""Steps on fake tensors of a pretended CUDA device, and where they would have waited for it.

    python steps.py library.so

Torch's FakeTensorMode computes shapes, dtypes and devices alone, and refuses to mix devices as real
kernels do. What would make the host wait raises: reading a number of the device, and
copies between the two that do not say `non_blocking`. One line of JSON for each case.
"""

import ctypes
import json
import os
import sys
import traceback

assert ctypes.CDLL(sys.argv[1]).enable() == 1  # before torch asks for a device the first time

import loopkit as lk
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# What torch's Python asks of CUDA beside what the library answers
torch.cuda.is_available = lambda: True
torch.cuda.is_bf16_supported = lambda *arguments: True
torch.cuda.get_rng_state = lambda *arguments: torch.zeros(16, dtype=torch.uint8)
torch.cuda.set_rng_state = lambda *arguments: None
torch.cuda.device = lambda *arguments: torch.device("cuda:0")

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}


class WaitError(Exception):
    """The host would wait for the device."""


class NoWaits(TorchDispatchMode):
    """Raises where the host would wait; what has arrived on the host is read as 1."""

    forbids = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS and args[0].is_cpu:
            return 1
        if func is aten._pin_memory.default:  # which the mode has no answer to
            return args[0].clone()
        if self.forbids:
            self.check(func, args, kwargs)
        return func(*args, **kwargs)

    def check(self, func, args, kwargs):
        if func in READS:
            raise WaitError(f"{func} of a tensor on {args[0].device}")
        target = source = None
        if func is aten._to_copy.default:
            source, target = args[0].device, kwargs.get("device") or args[0].device
        elif func is aten.copy_.default:
            source, target = args[1].device, args[0].device
        moves = source is not None and torch.device(target).type != source.type
        if moves and not (kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:])):
            raise WaitError(f"{func} from {source} to {target}")


def classifier(state, batch):
    return F.cross_entropy(state.model(batch[0]), batch[1])


def counting(state, batch):
    """With a weight that is on the device."""
    loss = F.cross_entropy(state.model(batch[0]), batch[1], ignore_index=-100)
    return {"loss": loss, "weight": (batch[1] != -100).sum(), "twice": 2 * loss}


def numbering(state, batch):
    """With numbers of the host."""
    return {"loss": classifier(state, batch), "weight": 5, "n": 3}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def falling(update):
    return 0.1 / (1 + update)


SKIP, EMA, CLIP = lk.with_nonfinite("skip"), lk.with_ema(0.9), lk.with_clip(1.0)
SCHEDULE, BF16, FP16 = lk.with_schedule(lr=falling), lk.with_amp("bf16"), lk.with_amp("fp16")
TWO = lk.with_grad_accum(2)
# decorators, step function, optimizer
CASES = {
    "plain": ([], classifier, adamw),
    "plain, fused": ([], classifier, fused),
    "bf16": ([BF16], classifier, adamw),
    "clip": ([CLIP], classifier, adamw),
    "clip value": ([lk.with_clip_value(1.0)], classifier, adamw),
    "accumulation": ([TWO], classifier, adamw),
    "accumulation, weights of the device": ([TWO], counting, adamw),
    "accumulation, weights of the host": ([TWO], numbering, adamw),
    "accumulation, skip, weights of the host": ([TWO, SKIP], numbering, fused),
    "averages": ([EMA, lk.with_swa(1)], classifier, adamw),
    "schedule": ([SCHEDULE], classifier, adamw),
    "skip": ([SKIP], classifier, fused),
    "skip and schedule": ([SCHEDULE, SKIP], classifier, fused),
    "fp16": ([FP16], classifier, fused),
    "fp16, averages, accumulation": ([FP16, EMA, TWO], counting, fused),
    "full": ([EMA, SCHEDULE, CLIP, TWO, BF16, SKIP], counting, fused),
    "sam": ([lk.with_sam()], classifier, adamw),
    "micro-batches": ([lk.with_microbatch(2)], classifier, adamw),
    "micro-batches that fit": ([lk.with_microbatch("auto")], classifier, adamw),
    "checkpointing": ([lk.with_activation_checkpointing(nn.Linear)], classifier, adamw),
    "in backward": ([lk.with_optimizer_in_backward()], classifier, adamw),
    "freeze": ([lk.with_freeze("0")], classifier, adamw),
}
ON_HOST = {"plain", "full", "fp16"}  # with batches from there


def make_state(optimizer, device="cuda"):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
    return lk.TrainState(model, optimizer(model.parameters()))


def batches(device, count=16):
    return [
        (torch.randn(5, 4, device=device), torch.zeros(5, dtype=torch.long, device=device))
        for _ in range(count)
    ]


def train(decorators, function, optimizer, device):
    """The updates of two epochs, of which only the first few may wait."""
    state = make_state(optimizer)
    step = lk.compose(*decorators)(function)
    with NoWaits() as mode:
        for state in lk.run(step, state, batches(device), max_epochs=2):
            mode.forbids = state.step >= 2
            found = {name: str(value.device) for name, value in state.metrics.items()}
        mode.forbids = False
    assert state.step in {16, 32}, state.step
    return {"loss": found["loss"], "applied": str(getattr(state.applied, "device", "cpu"))}


def restored():
    """Averages that were saved, read into a state that had not begun to average."""
    state = make_state(adamw)
    step = lk.with_swa(2)(classifier)
    (batch,) = batches("cuda", 1)
    state = step(state, batch)
    saved = {name: p.detach().to("cpu") for name, p in state.model.named_parameters()}
    state.features["swa"].load_state_dict(saved)
    state.features["swa.updates"].updates = 2
    state = step(state, batch)
    return {"averages": sorted({str(w.device) for w in state.features["swa"].weights.values()})}


def offloaded():
    """A state whose parameters FSDP keeps on the host, of a device that computes."""
    import torch.distributed as dist
    from loopkit.parallel.fsdp import FSDP
    from loopkit.parallel.repoint import like
    from loopkit.parts import Scattered
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    torch.cuda.is_initialized = lambda: True
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    state, strategy = make_state(adamw), FSDP(cpu_offload=True)
    kinds = [strategy._computes_on(torch.device(kind)) for kind in ("cpu", "cuda")]
    with unset_fake_temporarily():  # for the mesh, whose own tensors are real
        mesh = strategy._mesh(kinds[0])
    with NoWaits():
        state.ranks = strategy.shard(state, mesh)
    weight = state.parameters()[0]
    whole, zeros = Scattered(torch.Size(weight.shape), weight.dtype), torch.zeros(8, 4)
    with unset_fake_temporarily():
        restored, taken = like(whole, weight), like(zeros, weight)
    memory = whole.wanted[0].tensor.untyped_storage()._cdata
    return {
        "kinds": kinds,
        "computes": str(state.device),
        "parameters": str(weight.device),
        "restored": str(restored.device),
        "filled": memory == restored.to_local().untyped_storage()._cdata,
        "taken": str(taken.device),
    }


def said(name, function, *arguments):
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = function(*arguments)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{f.name}:{f.lineno}" for f in frames if f"{os.sep}loopkit{os.sep}" in f.filename]
        found = {"error": f"{type(error).__name__}: {error} ({', '.join(ours[-3:])})"}
        if os.environ.get("SHOW"):
            traceback.print_exc()
    print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    only = sys.argv[2:]
    for name, case in CASES.items():
        if not only or name in only:
            said(name, train, *case, "cuda")
    for name in sorted(ON_HOST):
        if not only or f"{name}, from the host" in only:
            said(f"{name}, from the host", train, *CASES[name], "cpu")
    for function in (restored, offloaded):
        if not only or function.__name__ in only:
            said(function.__name__, function)
