"""The checks of the first hour, in one call, in words."""

import math
import textwrap
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.check import at_least_one
from loopkit.debug.findings import Finding, look, note, ok, wrong
from loopkit.debug.fork import fork, loss_of, on_the_side
from loopkit.debug.samples import check_mixing, classes_of, probe
from loopkit.device import to_device
from loopkit.errors import UsageError
from loopkit.nested import batch_size, leaves_of
from loopkit.state import TrainState
from loopkit.step import Step, name_of_function
from loopkit.types import StepFunction
from loopkit.window import Window

SMALL, LARGE = 1e-6, 0.1  # of an update, as a part of the weights
ENOUGH = 1e-4  # to see a loss fall through the noise of dropout
NAMES = 4


@attrs.frozen
class Report:
    """What the checks found; it prints as text.

    Attributes:
        step: Name of the step function.
        samples: Samples in the batch.
        findings: One for each check.
    """

    step: str
    samples: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no check found a mistake."""
        return not any(finding.level == "WRONG" for finding in self.findings)

    def __getitem__(self, about: str) -> Finding:
        """What was found about one thing, such as `report["gradients"]`."""
        return next(finding for finding in self.findings if finding.about == about)

    def __str__(self) -> str:
        count = {
            level: [f.level for f in self.findings].count(level) for level in ("WRONG", "LOOK")
        }
        counted = f"{count['WRONG']} wrong, {count['LOOK']} to look at"
        lines = [f"{self.step} on a batch of {self.samples} samples: {counted}"]
        for finding in self.findings:
            start = f"  {finding.level:<5}  {finding.about:<15}"
            lines += textwrap.wrap(
                finding.words, 96, initial_indent=start, subsequent_indent=" " * len(start)
            )
        return "\n".join(lines)


@attrs.frozen
class Trial:
    """What updates on one batch gave, on a copy.

    Attributes:
        losses: The loss of each.
        gradients: After the first: for each trainable parameter, its gradient or None.
        ratio: How much the first changed the weights, as a part of them.
        lr: The learning rate of the first.
        applied: Whether the first was applied.
    """

    losses: list[float]
    gradients: dict[str, Tensor | None]
    ratio: float
    lr: float
    applied: bool


def check(
    step: Step | StepFunction,
    state: TrainState,
    batch: Any,
    *,
    classes: int | None = None,
    updates: int = 20,
) -> Report:
    """Run the usual checks of the first hour of a training, and say in words what they found.

    Are the inputs on the device, finite and scaled; is the model in training mode; is the
    first loss near `log(classes)`; does every parameter get a gradient, and is it in the
    optimizer; does the model mix the samples of a batch; is an update neither lost nor
    huge beside the weights; and does the loss fall on one batch. All on a copy: the state and
    the random numbers are left as they were.

    Args:
        step: What trains.
        state: A fresh state.
        batch: One batch, of two samples or more.
        classes: Number of classes; by default found from the model's output and the labels.
        updates: Updates on the batch, to see the loss fall.

    Raises:
        UsageError: If `updates` or `classes` is below 1, the state is none, or a loader is given
            where one batch is asked for.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> def step(state, batch):
        ...     return nn.functional.cross_entropy(state.model(batch[0]), batch[1])
        >>> report = check(step, state, (torch.randn(8, 4), torch.arange(8) % 3))
        >>> report.ok, report["gradients"].level, report["gradients"].words.partition(";")[0]
        (True, 'ok', 'every one of the 2 parameters gets one')

    Source: https://karpathy.github.io/2019/04/25/recipe/
    """
    call = f"lk.debug.check(..., classes={classes!r}, updates={updates!r})"
    at_least_one(call, "updates", updates)
    if classes is not None:
        at_least_one(call, "classes", classes)
    if batch is None or isinstance(batch, Iterator) or hasattr(batch, "batch_sampler"):
        gives = ", which gives batches," if batch is not None else ""
        raise UsageError(
            "lk.debug.check(step, state, batch)",
            f"a {type(batch).__name__}{gives} as the batch",
            "one of them: lk.debug.check(step, state, next(iter(loader)))",
        )
    samples = batch_size(batch)
    with on_the_side(call, state):
        lifted, branch = fork(step, state, training=True)
        moved = to_device(batch, branch.device)
        seen = probe(lifted, branch, moved, samples)
        mixing = check_mixing(seen)
        classes = classes or classes_of(seen, moved)
        del seen
        trial = _try(lifted, branch, moved, updates)
    findings = (
        *_inputs(batch, state.device, samples),
        _modes(state.model),
        _first_loss(trial.losses[0], classes, state.step),
        _gradients(trial.gradients),
        _optimizer(state),
        mixing,
        _update(trial),
        _falls(trial),
    )
    return Report(name_of_function(lifted), samples, findings)


def _try(step: Step, state: TrainState, batch: Any, updates: int) -> Trial:
    trainable = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    before = [p.detach().clone() for p in trainable.values()]
    windowed = step.window(state) is not None

    def update() -> float:
        return loss_of(step(state, Window([batch]) if windowed else batch))

    losses = [update()]
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in trainable.items()}
    change = [p.detach() - old for p, old in zip(trainable.values(), before, strict=True)]
    ratio = _norm(change) / max(_norm(before), 1e-12)
    lr, applied = math.nan if state.lr is None else float(state.lr), bool(state.applied)
    while len(losses) < updates + 1 and math.isfinite(losses[-1]):
        losses.append(update())
    return Trial(losses, gradients, ratio, lr, applied)


def _norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(float(t.float().norm()) for t in tensors))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more


def _inputs(batch: Any, device: torch.device, samples: int) -> list[Finding]:
    tensors = [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]
    if not tensors:
        return [note("inputs", "no tensors in the batch to look at")]
    away = sorted({str(t.device) for t in tensors} - {str(device)})
    placed = ok("device", f"{_tensors(tensors)} on {device}, where the model is")
    if away:
        placed = look(
            "device",
            f"the batch is on {', '.join(away)} and the model on {device}: lk.run moves it,"
            " in a loop by hand lk.to_device(batch, state.device) does",
        )
    return [placed, _values(tensors, samples)]


def _tensors(tensors: list[Tensor]) -> str:
    return f"{len(tensors)} tensor{'s' * (len(tensors) > 1)}"


def _values(tensors: list[Tensor], samples: int) -> Finding:
    floats = [t.float() for t in tensors if t.is_floating_point() and t.numel()]
    if not all(bool(t.isfinite().all()) for t in floats):
        return wrong("inputs", "NaN or infinity in the batch")
    if samples > 1:
        rows = [t for t in tensors if t.ndim and t.shape[0] == samples]
        if same := [t for t in rows if bool((t == t[:1]).all())]:
            what = "inputs" if same[0].is_floating_point() else "labels or tokens"
            return look("inputs", f"all {samples} samples have the same {what}")
    if not floats:
        return ok("inputs", "whole numbers, such as tokens")
    mean, deviation = float(floats[0].mean()), float(floats[0].std(correction=0))
    words = f"mean {mean:.3g}, standard deviation {deviation:.3g}"
    if abs(mean) > 10 or deviation > 30:
        return look("inputs", f"{words}: scale them to about mean 0 and deviation 1")
    return ok("inputs", f"finite, {words}")


def _modes(model: nn.Module) -> Finding:
    if not model.training:
        return wrong("mode", "the model is in eval mode: call model.train() before training")
    frozen = [n for n, m in model.named_modules() if not m.training and not any(m.children())]
    if frozen:
        return look("mode", f"train, but these are in eval mode, frozen: {_listed(frozen)}")
    return ok("mode", "train, in every module")


def _first_loss(loss: float, classes: int | None, step: int) -> Finding:
    about = "first loss"
    if not math.isfinite(loss):
        return wrong(about, f"{loss}: lk.detect_overflow() on the step says where it comes from")
    if classes is None or classes < 2:
        return note(about, f"{loss:.4g}; no labels found to compare it with: pass classes=")
    expected = f"log({classes}) = {math.log(classes):.3f}, that of a guess"
    if step:
        return note(about, f"{loss:.3f} after {step} updates; {expected}")
    if loss > 1.5 * math.log(classes):
        return look(
            about,
            f"{loss:.3f}, far above {expected}: the model starts out sure and wrong; look at the"
            " initial weights of the last layer, and at softmax or log taken twice",
        )
    if loss < 0.5 * math.log(classes):
        return look(
            about, f"{loss:.3f}, far below {expected}: labels among the inputs, or trained?"
        )
    return ok(about, f"{loss:.3f}, near {expected}")


def _gradients(gradients: dict[str, Tensor | None]) -> Finding:
    about, count = "gradients", len(gradients)
    if missing := [name for name, g in gradients.items() if g is None]:
        return wrong(
            about,
            f"none for {len(missing)} of {count} parameters: {_listed(missing)}; they are not"
            " used, or cut off by detach, no_grad or .item(); requires_grad_(False) if meant so",
        )
    norms = {name: float(g.float().norm()) for name, g in gradients.items() if g is not None}
    if bad := [name for name, norm in norms.items() if not math.isfinite(norm)]:
        return wrong(about, f"not finite for {_listed(bad)}: see lk.detect_overflow()")
    if zero := [name for name, norm in norms.items() if norm == 0]:
        return look(
            about,
            f"exactly zero for {len(zero)} of {count} parameters: {_listed(zero)}; dead units, or"
            " multiplied by zeros",
        )
    low, high = min(norms.values()), max(norms.values())
    return ok(
        about, f"every one of the {count} parameters gets one; norms from {low:.3g} to {high:.3g}"
    )


def _optimizer(state: TrainState) -> Finding:
    held = {id(p) for p in state.parameters()}
    named = [*state.model.named_parameters()]
    if left := [name for name, p in named if p.requires_grad and id(p) not in held]:
        return wrong(
            "optimizer",
            f"does not hold {len(left)} trainable parameters: {_listed(left)}; make it after the"
            " model is complete, or requires_grad_(False) if meant so",
        )
    frozen = sum(not p.requires_grad for _, p in named)
    return ok(
        "optimizer", "holds every trainable parameter" + f"; {frozen} are frozen" * (frozen > 0)
    )


def _update(trial: Trial) -> Finding:
    about, words = "learning rate", f"the first update, with lr={trial.lr:.3g}, changes the weights"
    if not trial.applied:
        return wrong(about, "the first update was skipped: gradients that are not finite")
    if not math.isfinite(trial.ratio):
        return wrong(about, f"{words} to what is not finite")
    if trial.ratio == 0:
        return look(about, f"{words} by nothing: a warm-up that starts at 0, or lr = 0?")
    words = f"{words} by {trial.ratio:.2g} of their norm"
    if trial.ratio > LARGE:
        return look(
            about, f"{words}: very large; lk.find_lr(step, state, loader) finds a smaller one"
        )
    if trial.ratio < SMALL:
        return look(
            about, f"{words}: lost in rounding; lk.find_lr(step, state, loader) finds a larger one"
        )
    return ok(about, words)


def _falls(trial: Trial) -> Finding:
    losses, about = trial.losses, "one batch"
    if not math.isfinite(losses[-1]):
        return wrong(
            about, f"the loss is {losses[-1]} after {len(losses) - 1} updates on one batch"
        )
    last = sum(losses[-3:]) / len(losses[-3:])
    words = f"{losses[0]:.4g} to {last:.4g} in {len(losses) - 1} updates on one batch"
    if last >= losses[0] and trial.ratio > ENOUGH:
        return wrong(
            about, f"the loss does not fall: {words}; its sign, the lr, or what is detached"
        )
    if last > 0.99 * losses[0]:
        return look(about, f"the loss hardly falls: {words}; a larger lr, or no warm-up, to see")
    return ok(about, f"the loss falls: {words}")
