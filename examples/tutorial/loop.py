"""The training loop from scratch: warmup and cosine, accumulation, clipping, mixed precision.

One update, in the order in which its parts have to run:

    1. set the learning rate of this update
    2. for each of k micro-batches: forward, loss / k, backward   (gradients add up)
    3. take the loss scale out of the gradients                    (fp16 only)
    4. clip their global norm
    5. let the optimizer change the weights

The order matters. Clipping before 3 would clip by a norm that is 65536 times too large;
clipping inside 2 would clip noise, one micro-batch at a time.
"""

import dataclasses
import math

import torch
from adamw import AdamW

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about a training but the model and the data."""

    total_updates: int
    warmup_updates: int = 0
    peak_lr: float = 1e-3
    floor_lr: float = 0.0
    micro_batches: int = 1  # in one update
    max_norm: float = 1.0
    weight_decay: float = 1e-2
    precision: str | None = None  # None: that of the weights; or "bf16", "fp16"


def learning_rate(update, recipe):
    """The learning rate of an update, the first of which is update 0.

    At first the averages of Adam rest on few gradients and the weights are far from
    anything sensible, so the steps are kept short:

        lr = peak * n / warmup                                       for n < warmup

    At the end noise is what keeps the loss up, and short steps average it out. Half a
    cosine goes from one to the other and spends most of its time near both:

        lr = floor + (peak - floor) * (1 + cos(pi * p)) / 2          p from 0 to 1
    """
    if update < recipe.warmup_updates:
        return recipe.peak_lr * update / recipe.warmup_updates
    decaying = recipe.total_updates - recipe.warmup_updates
    progress = (update - recipe.warmup_updates) / decaying
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return recipe.floor_lr + (recipe.peak_lr - recipe.floor_lr) * cosine


def clip(parameters, max_norm):
    """Scale the gradients down to a global norm of at most `max_norm`; return the norm.

        norm = sqrt(sum of g^2 over every element of every gradient)
        g ← g * min(1, max_norm / norm)

    One scale for all of them keeps the direction: a rare huge gradient becomes a short
    step the same way, not a step another way.
    """
    gradients = [w.grad for w in parameters if w.grad is not None]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    for g in gradients:
        g.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


class LossScaler:
    """Keeps small gradients above the smallest number that fp16 can hold.

    Below 6e-8 an fp16 number is zero, and many gradients are. So the loss is multiplied
    by a large s before backward, hence all gradients are (the chain rule is linear), and
    they are divided by s in fp32 afterwards. s should be as large as it can be without
    overflow; we find out by trying. Where a gradient is inf or nan the update is skipped
    and s halved; after 2000 updates without, s is doubled.
    """

    def __init__(self, scale=2.0**16, *, patience=2000):
        self.scale, self.patience, self.good_updates = scale, patience, 0

    def unscale(self, parameters):
        """Divide the gradients by the scale; say whether all are finite."""
        gradients = [w.grad for w in parameters if w.grad is not None]
        for g in gradients:
            g.div_(self.scale)
        return all(bool(torch.isfinite(g).all()) for g in gradients)

    def adapt(self, finite):
        """Halve the scale after an overflow, double it after a long time without."""
        self.good_updates = self.good_updates + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_updates == self.patience:
            self.scale, self.good_updates = self.scale * 2, 0


def accumulate(model, loss_of, window, scale, precision):
    """Leave the gradient of the mean over a window of equal micro-batches; return that mean.

    The loss of a batch is a mean over its samples. The mean over k micro-batches of the
    same size is the mean of their losses, and so are the gradients:

        d/dw (L_1 + ... + L_k) / k  =  (dL_1/dw + ... + dL_k/dw) / k

    `backward` adds to `.grad`, so dividing each loss by k is all there is to it; memory is
    needed for one micro-batch at a time. (Micro-batches of different sizes, or sentences
    of different lengths, need each its own weight.)

    Autocast runs matrix products in 16 bits, at several times the speed on hardware made
    for it, and keeps what needs precision (sums, softmax, the weights) in 32. It belongs
    round the forward pass only: backward uses the types that forward has used.
    """
    total = 0.0
    device = next(model.parameters()).device.type
    for batch in window:
        with torch.autocast(device, PRECISIONS.get(precision), enabled=precision is not None):
            loss = loss_of(model, batch) / len(window)
        (loss * scale).backward()
        total += float(loss.detach())
    return total


def train(model, loss_of, batches, recipe):
    """Train the model; return the loss of each update.

    Args:
        model: The weights are changed in place.
        loss_of: `loss_of(model, batch)`, a mean over the batch.
        batches: An iterator over batches of one size, enough of them.
        recipe: How.
    """
    optimizer = AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    scaled = recipe.precision == "fp16"  # bf16 has the range of fp32 and needs no scale
    scaler = LossScaler() if scaled else LossScaler(1.0)
    batches, losses = iter(batches), []
    for update in range(recipe.total_updates):
        optimizer.lr = learning_rate(update, recipe)
        optimizer.zero_grad()
        window = [next(batches) for _ in range(recipe.micro_batches)]
        losses.append(accumulate(model, loss_of, window, scaler.scale, recipe.precision))
        finite = scaler.unscale(optimizer.parameters) if scaled else True
        if finite:
            clip(optimizer.parameters, recipe.max_norm)
            optimizer.step()
        if scaled:
            scaler.adapt(finite)
    return losses


# Sources: https://arxiv.org/abs/1706.02677 (warmup), https://arxiv.org/abs/1608.03983 (cosine),
#          https://arxiv.org/abs/1211.5063 (clipping), https://arxiv.org/abs/1710.03740 (AMP)
