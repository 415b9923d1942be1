"""Composable training steps for PyTorch: keep your own loop.

Write a step function, compose features onto it, and drive it from plain Python:
`for state in run(step, state, loader): ...`. Read `state` and `step` first.
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from loguru import logger

from loopkit.averages import ema_weights
from loopkit.background import Background, background
from loopkit.collect import collect
from loopkit.compose import Decorator, compose, eval_step, explain, own, train_step, wrap
from loopkit.data.order import Uneven
from loopkit.data.samples import seeded
from loopkit.data.shard import sharded
from loopkit.decorators.accumulate import with_grad_accum
from loopkit.decorators.activations import with_activation_checkpointing, with_activation_offload
from loopkit.decorators.amp import with_amp
from loopkit.decorators.anomaly import with_anomaly_detection
from loopkit.decorators.clip import with_clip, with_clip_value
from loopkit.decorators.closure import with_closure
from loopkit.decorators.ema import with_ema
from loopkit.decorators.freeze import with_freeze
from loopkit.decorators.in_backward import with_optimizer_in_backward
from loopkit.decorators.microbatch import with_microbatch
from loopkit.decorators.noise import with_grad_noise, with_neftune
from loopkit.decorators.nonfinite import with_nonfinite
from loopkit.decorators.precision import with_precision
from loopkit.decorators.sam import with_sam
from loopkit.decorators.schedule import with_schedule
from loopkit.decorators.swa import update_bn, with_swa
from loopkit.device import device, prefetch, to_device
from loopkit.errors import (
    CheckpointError,
    CheckpointWarning,
    CompositionError,
    DamageError,
    DataError,
    LogWarning,
    LoopkitError,
    MissingExtraError,
    NonFiniteError,
    OutputError,
    Preempted,
    RankError,
    StorageError,
    UsageError,
)
from loopkit.evaluate import evaluate
from loopkit.every import Moment, every
from loopkit.modes import inference
from loopkit.observe.progress import bar, progress
from loopkit.predict import predict
from loopkit.ranks import Ranks
from loopkit.run import Run, run
from loopkit.seed import seed_everything
from loopkit.state import TrainState
from loopkit.step import Step
from loopkit.stop import EarlyStopping
from loopkit.types import (
    Apply,
    Around,
    Backward,
    Forward,
    GradientsOf,
    Recompute,
    Split,
    StepFunction,
    Transform,
    Update,
    Verdict,
    WindowSize,
)
from loopkit.updates import adaptor
from loopkit.window import KeepMicroBatches, MicroBatches, Window, windows

if TYPE_CHECKING:
    from loopkit.checkpoint.best import load_best
    from loopkit.checkpoint.checkpointer import Checkpointer
    from loopkit.checkpoint.export import WeightsReport, export, load_weights
    from loopkit.checkpoint.folder import Checkpoint
    from loopkit.checkpoint.options import CheckpointOptions
    from loopkit.checkpoint.preemption import preemptible
    from loopkit.checkpoint.restore import Restored
    from loopkit.data.collate import pad_collate
    from loopkit.data.lengths import group_by_length
    from loopkit.debug.memory import find_batch_size
    from loopkit.debug.overflow import detect_overflow
    from loopkit.debug.rates import LrCurve, find_lr
    from loopkit.debug.rehearse import Rehearsal, fast_dev_run, overfit, sanity_check
    from loopkit.decorators.compile import with_compile
    from loopkit.graphs import CompileWarning
    from loopkit.observe.console import Console
    from loopkit.observe.files import CSV, JSONL
    from loopkit.observe.log import Log
    from loopkit.observe.monitor import device_stats, learning_rates
    from loopkit.observe.plot import plot
    from loopkit.observe.profile import profile
    from loopkit.observe.record import Record
    from loopkit.observe.sink import Sink
    from loopkit.observe.summary import summary
    from loopkit.observe.throughput import throughput
    from loopkit.observe.timing import Timing
    from loopkit.observe.trackers import MLflow, TensorBoard, WandB
    from loopkit.optim.combined import CombinedOptimizer
    from loopkit.optim.configure import configure_optimizer
    from loopkit.optim.create import create_optimizer
    from loopkit.optim.groups import param_groups
    from loopkit.optim.phases import (
        constant,
        cosine,
        cosine_with_restarts,
        inverse_sqrt,
        linear,
        polynomial,
        warmup,
        wsd,
    )
    from loopkit.optim.plot import plot_schedule
    from loopkit.parallel.ddp import DDP
    from loopkit.parallel.decisions import agree, reduce
    from loopkit.parallel.decorator import distributed
    from loopkit.parallel.fsdp import FSDP
    from loopkit.parallel.launch import launch
    from loopkit.parallel.tensor_parallel import TensorParallel

__version__ = "0.1.0"

logger.disable("loopkit")

# What is imported when it is first asked for: half of the package, which many a script never uses.
_LATER = {
    "loopkit.decorators.compile": ("with_compile",),
    "loopkit.graphs": ("CompileWarning",),
    "loopkit.checkpoint.checkpointer": ("Checkpointer",),
    "loopkit.checkpoint.best": ("load_best",),
    "loopkit.checkpoint.export": ("WeightsReport", "export", "load_weights"),
    "loopkit.checkpoint.folder": ("Checkpoint",),
    "loopkit.checkpoint.options": ("CheckpointOptions",),
    "loopkit.checkpoint.preemption": ("preemptible",),
    "loopkit.checkpoint.restore": ("Restored",),
    "loopkit.observe.console": ("Console",),
    "loopkit.observe.files": ("CSV", "JSONL"),
    "loopkit.observe.log": ("Log",),
    "loopkit.observe.monitor": ("device_stats", "learning_rates"),
    "loopkit.observe.plot": ("plot",),
    "loopkit.observe.profile": ("profile",),
    "loopkit.observe.record": ("Record",),
    "loopkit.observe.sink": ("Sink",),
    "loopkit.observe.summary": ("summary",),
    "loopkit.observe.throughput": ("throughput",),
    "loopkit.observe.timing": ("Timing",),
    "loopkit.observe.trackers": ("MLflow", "TensorBoard", "WandB"),
    "loopkit.debug.memory": ("find_batch_size",),
    "loopkit.debug.overflow": ("detect_overflow",),
    "loopkit.debug.rates": ("LrCurve", "find_lr"),
    "loopkit.debug.rehearse": ("Rehearsal", "fast_dev_run", "overfit", "sanity_check"),
    "loopkit.data.collate": ("pad_collate",),
    "loopkit.data.lengths": ("group_by_length",),
    "loopkit.optim.combined": ("CombinedOptimizer",),
    "loopkit.optim.configure": ("configure_optimizer",),
    "loopkit.optim.create": ("create_optimizer",),
    "loopkit.optim.groups": ("param_groups",),
    "loopkit.optim.phases": (
        "constant",
        "cosine",
        "cosine_with_restarts",
        "inverse_sqrt",
        "linear",
        "polynomial",
        "warmup",
        "wsd",
    ),
    "loopkit.optim.plot": ("plot_schedule",),
    "loopkit.parallel.ddp": ("DDP",),
    "loopkit.parallel.decisions": ("agree", "reduce"),
    "loopkit.parallel.decorator": ("distributed",),
    "loopkit.parallel.fsdp": ("FSDP",),
    "loopkit.parallel.launch": ("launch",),
    "loopkit.parallel.tensor_parallel": ("TensorParallel",),
}


def __getattr__(name: str) -> Any:
    if name == "debug":
        return importlib.import_module("loopkit.debug")
    for module, names in _LATER.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    close = [] if name.startswith("_") else difflib.get_close_matches(name, __all__, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    message = f"module 'loopkit' has no attribute {name!r}{meant}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "CSV",
    "DDP",
    "FSDP",
    "JSONL",
    "Apply",
    "Around",
    "Background",
    "Backward",
    "Checkpoint",
    "CheckpointError",
    "CheckpointOptions",
    "CheckpointWarning",
    "Checkpointer",
    "CombinedOptimizer",
    "CompileWarning",
    "CompositionError",
    "Console",
    "DamageError",
    "DataError",
    "Decorator",
    "EarlyStopping",
    "Forward",
    "GradientsOf",
    "KeepMicroBatches",
    "Log",
    "LogWarning",
    "LoopkitError",
    "LrCurve",
    "MLflow",
    "MicroBatches",
    "MissingExtraError",
    "Moment",
    "NonFiniteError",
    "OutputError",
    "Preempted",
    "RankError",
    "Ranks",
    "Recompute",
    "Record",
    "Rehearsal",
    "Restored",
    "Run",
    "Sink",
    "Split",
    "Step",
    "StepFunction",
    "StorageError",
    "TensorBoard",
    "TensorParallel",
    "Timing",
    "TrainState",
    "Transform",
    "Uneven",
    "Update",
    "UsageError",
    "Verdict",
    "WandB",
    "WeightsReport",
    "Window",
    "WindowSize",
    "adaptor",
    "agree",
    "background",
    "bar",
    "collect",
    "compose",
    "configure_optimizer",
    "constant",
    "cosine",
    "cosine_with_restarts",
    "create_optimizer",
    "detect_overflow",
    "device",
    "device_stats",
    "distributed",
    "ema_weights",
    "eval_step",
    "evaluate",
    "every",
    "explain",
    "export",
    "fast_dev_run",
    "find_batch_size",
    "find_lr",
    "group_by_length",
    "inference",
    "inverse_sqrt",
    "launch",
    "learning_rates",
    "linear",
    "load_best",
    "load_weights",
    "overfit",
    "own",
    "pad_collate",
    "param_groups",
    "plot",
    "plot_schedule",
    "polynomial",
    "predict",
    "preemptible",
    "prefetch",
    "profile",
    "progress",
    "reduce",
    "run",
    "sanity_check",
    "seed_everything",
    "seeded",
    "sharded",
    "summary",
    "throughput",
    "to_device",
    "train_step",
    "update_bn",
    "warmup",
    "windows",
    "with_activation_checkpointing",
    "with_activation_offload",
    "with_amp",
    "with_anomaly_detection",
    "with_clip",
    "with_clip_value",
    "with_closure",
    "with_compile",
    "with_ema",
    "with_freeze",
    "with_grad_accum",
    "with_grad_noise",
    "with_microbatch",
    "with_neftune",
    "with_nonfinite",
    "with_optimizer_in_backward",
    "with_precision",
    "with_sam",
    "with_schedule",
    "with_swa",
    "wrap",
    "wsd",
]
