"""The types of the contract, a sentence each."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from loopkit.state import TrainState
from loopkit.window import MicroBatches

Output = Any
"""What a step function returns: a 0-d loss, or a mapping that holds it under "loss"."""

StepFunction = Callable[[TrainState, Any], Output]
"""What users write: state and batch in, loss or mapping out."""

Recompute = Callable[[TrainState], Tensor]
"""Computes the gradients of the update again and returns the loss."""

WindowSize = Callable[[TrainState], int | None]
"""`window`: micro-batches of the next update; None where the step takes bare batches."""

Split = Callable[[TrainState, Any], MicroBatches]
"""`split`: the micro-batches that a batch stands for, and how many."""

GradientsOf = Callable[[TrainState, MicroBatches], None]
"""`gradients`: leave the gradients of the window's mean loss in `.grad`."""

Around = Callable[[TrainState, bool], AbstractContextManager[Any]]
"""`around`: the context of one micro-batch; the flag is true at the window's last."""

Forward = StepFunction
"""`forward`: the step function, or a layer round it."""

Backward = Callable[[TrainState, Tensor], None]
"""`backward`: run the backward pass of a loss."""

Transform = Callable[[TrainState], None]
"""`before`, `unscale`, `transform`, `after`: act on the state in place."""

Verdict = Callable[[TrainState], Tensor | None]
"""`verdict`: a 0-d tensor that is non-zero where the update is to be skipped, or None."""

Apply = Callable[[TrainState, Recompute], bool | Tensor]
"""`apply`: update the parameters; false (bool or 0-d tensor) where it was skipped."""

Update = Callable[[TrainState, MicroBatches], bool | Tensor]
"""`update`: all from gradients to apply; false (bool or 0-d tensor) where it was skipped."""

SetUp = Callable[[TrainState], None]
"""`prepare`, `compile`, `parallelize`: run once on a state before its first update."""

Init = Mapping[str, Callable[[TrainState], Any]]
"""`init`: for each name, what makes the state kept under it."""

Layer = Callable[[Any], Any]
"""Makes a layer from the one below it: an attrs class whose first field is `inner`."""
