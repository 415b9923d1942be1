"""What `lk.evaluate` costs over an evaluation written by hand, with the same torchmetrics.

    python benchmarks/evaluate.py

Both run in turns in one process, in CPU time, one thread; the medians of the pairs'
ratios are printed with their quartiles. Both find the same figures, which is checked.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import loopkit as lk
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from report import quartiles, show, table

HEAD = "| | by hand, us a batch | ratio | quartiles | figures equal |"
TEXT = """
# What `evaluate` costs over an evaluation written by hand

A tiny MLP on 100 batches of 8, with the same torchmetrics; goal: a ratio of at most 1.0. It is
below that, as metrics are updated with several batches at once where that gives the same figures.
CPU time, one thread; medians of pairs.
"""
Batches = list[tuple[Tensor, Tensor]]


def metrics(several: bool) -> MetricCollection | MulticlassAccuracy:
    """One metric, or three in compute groups."""
    if not several:
        return MulticlassAccuracy(4)
    kinds = (MulticlassAccuracy, MulticlassF1Score, MulticlassConfusionMatrix)
    return MetricCollection([kind(4) for kind in kinds])


def by_hand(model: nn.Module, batches: Batches, measured: Callable) -> dict:
    """The evaluation that one writes by hand."""
    model.eval()
    measured.reset()
    total, count = 0.0, 0
    with torch.inference_mode():
        for inputs, labels in batches:
            logits = model(inputs)
            total += F.cross_entropy(logits, labels).item() * len(labels)
            count += len(labels)
            measured.update(logits, labels)
        found = measured.compute()
    model.train()
    return {"loss": total / count, "found": found}


def step(state: lk.TrainState, batch: tuple[Tensor, Tensor]) -> dict:
    """What a user writes."""
    inputs, labels = batch
    logits = state.model(inputs)
    return {"loss": F.cross_entropy(logits, labels), "preds": logits, "target": labels}


def cpu_seconds(evaluation: Callable[[], object]) -> float:
    """CPU time of one evaluation."""
    start = time.process_time()
    evaluation()
    return time.process_time() - start


def compare(several: bool, rounds: int) -> str:
    """The ratio with its spread, as a row of a table."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    batches = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(100)]
    state, mine, its = lk.TrainState(model), metrics(several), metrics(several)
    ours = lk.evaluate(step, state, batches, mine)
    theirs = by_hand(model, batches, its)
    found = theirs["found"] if several else {"MulticlassAccuracy": theirs["found"]}
    equal = all(float(v) == ours[k] for k, v in found.items() if v.ndim == 0)
    pairs = []
    for i in range(rounds):
        runs = [
            lambda: by_hand(model, batches, its),
            lambda: lk.evaluate(step, state, batches, mine),
        ]
        times = [cpu_seconds(run) for run in runs[:: -1 if i % 2 else 1]]
        pairs.append(times[:: -1 if i % 2 else 1])
    low, ratio, high = quartiles([our / hand for hand, our in pairs])
    base = statistics.median(hand for hand, _ in pairs) / len(batches) * 1e6
    name = "three metrics" if several else "one metric"
    return (
        f"| {name} | {base:.0f} | {ratio:.3f} | {low:.3f} to {high:.3f}"
        f" | {'yes' if equal else 'no'} |"
    )


def main() -> None:
    """Compare with one metric and with three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(several, args.rounds) for several in (False, True)]
    show("evaluate", TEXT, table(HEAD, *rows), write=args.write)


if __name__ == "__main__":
    main()
