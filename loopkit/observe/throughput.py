"""How fast a run is: samples, tokens, and what the model makes of the device."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from loopkit.check import at_least_one, one_of, positive
from loopkit.errors import UsageError
from loopkit.observe.fetch import Fetched, fetch
from loopkit.observe.flops import flop_counter
from loopkit.observe.peak import peak_flops
from loopkit.observe.stopwatch import Mark, is_past, mark, since
from loopkit.state import TrainState
from loopkit.updates import Adapted, check_updates

Count = Callable[[TrainState], "float | Tensor"]
Flops = float | str | Count


@attrs.frozen
class Span:
    """One update: when it began and ended, and how much it was."""

    start: Mark
    end: Mark
    samples: int
    counts: Fetched

    def is_over(self) -> bool:
        """Whether the device has done it, and its counts have arrived."""
        return is_past(self.end) and self.counts.ready()


@attrs.define
class Meter:
    """Rates over the last updates, in the time that the updates took: without the loop's body.

    Attributes:
        tokens: What counts the tokens of an update; None for its weight.
        flops: FLOPs of an update, or what counts them, or "count".
        peak: The most that the device can, FLOPs a second.
        rates: `samples_per_s`, and, where they are known, `tokens_per_s`, `flops_per_s`, `mfu`.
    """

    tokens: Count | None
    flops: Flops | None
    peak: float | None
    window: int
    rates: dict[str, float] = attrs.field(factory=dict)
    _waiting: deque[Span] = attrs.field(factory=deque)
    _recent: deque[tuple[float, dict[str, float]]] = attrs.field(factory=deque)
    _flops_each: tuple[str, float] | None = None  # of a token, or of a sample

    def counting(self) -> AbstractContextManager[Any]:
        """The context of the first update, whose FLOPs may have to be counted."""
        if self.flops == "count" and self._flops_each is None:
            return flop_counter()
        return nullcontext()

    def learn(self, state: TrainState, counter: object) -> None:
        """Take what was counted in the first update."""
        if isinstance(counter, FlopCounterMode):
            counts = fetch("throughput(run)", self._counts(state)).values()
            unit = "tokens" if counts.get("tokens") else "samples"
            self._flops_each = unit, counter.get_total_flops() / max(counts[unit], 1)

    def add(self, state: TrainState, start: Mark, end: Mark) -> None:
        """Take an update, and reckon with those that the device has done."""
        counts = fetch("throughput(run)", self._counts(state))
        self._waiting.append(Span(start, end, state.outcome.samples, counts))
        while self._waiting and self._waiting[0].is_over():
            span = self._waiting.popleft()
            self._recent.append((since(span.start, span.end), span.counts.values()))
        while len(self._recent) > self.window:
            self._recent.popleft()
        if self._recent:
            self.rates = self._rates()
            state.metrics.update({k: torch.tensor(v) for k, v in self.rates.items()})

    def _counts(self, state: TrainState) -> dict[str, Any]:
        counts: dict[str, Any] = {"samples": state.outcome.samples}
        tokens = self.tokens(state) if self.tokens else state.outcome.total_weight()
        if tokens is not None:
            counts["tokens"] = tokens
        if self.flops is not None and not isinstance(self.flops, str):
            counts["flops"] = self.flops(state) if callable(self.flops) else self.flops
        return counts

    def _rates(self) -> dict[str, float]:
        passed = max(sum(seconds for seconds, _ in self._recent), 1e-9)
        totals: dict[str, float] = {}
        for _, counts in self._recent:
            for name, count in counts.items():
                totals[name] = totals.get(name, 0) + count
        if self._flops_each is not None:
            totals["flops"] = totals[self._flops_each[0]] * self._flops_each[1]
        rates = {f"{name}_per_s": total / passed for name, total in totals.items()}
        if self.peak and "flops_per_s" in rates:
            rates["mfu"] = rates["flops_per_s"] / self.peak
        return rates


class Throughput(Adapted):
    """The states of a run, whose speed is measured; made by `throughput`."""

    def __init__(self, run: Iterable[TrainState], meter: Meter, given: float | None) -> None:
        super().__init__(run, _measured(run, meter, given))
        self._meter = meter

    @property
    def rates(self) -> dict[str, float]:
        """The last figures, by name; empty before the second update."""
        return self._meter.rates

    @property
    def samples_per_s(self) -> float:
        """Samples a second, of this process; NaN before it is known."""
        return self.rates.get("samples_per_s", math.nan)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, of this process; NaN if they are not counted."""
        return self.rates.get("tokens_per_s", math.nan)

    @property
    def mfu(self) -> float:
        """Share of the device's peak, from 0 to 1; NaN if FLOPs or peak are not known."""
        return self.rates.get("mfu", math.nan)


def throughput(
    run: Iterable[TrainState],
    *,
    tokens: Count | None = None,
    flops: Flops | None = None,
    peak_flops: float | None = None,
    window: int = 50,
) -> Throughput:
    """Measure how fast a run is, over its last updates; the first, which is slow, is left out.

    Puts `samples_per_s`, and where they are known `tokens_per_s`, `flops_per_s` and `mfu`, into
    `state.metrics`, so that logs and progress can show them. Evaluation, logging and whatever
    else the loop's body does is not counted. On an accelerator the time is the device's own,
    taken by events, which nothing waits for: the figures are some updates old.

    `mfu = flops_per_s / peak_flops`, model FLOPs utilisation.

    Args:
        run: A run, or any iterator of states.
        tokens: A function of the state, after an update, that counts its tokens; by default the
            `"weight"` that the step function returned, which leaves padding out.
        flops: FLOPs of an update: a number, a function of the state, or `"count"`: those of the
            first update are counted by torch, and the others taken in proportion to their tokens,
            or samples. What is recomputed (activation checkpointing) or hidden in a custom or
            compiled kernel is counted as torch sees it.
        peak_flops: The device's peak, FLOPs a second; known for usual GPUs, in bf16.
        window: Updates to average over.

    Returns:
        An iterator of the states, with `.rates`, `.samples_per_s`, `.tokens_per_s` and `.mfu`.

    Raises:
        UsageError: For settings that cannot be right.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> [*throughput([])]
        []

    Source: https://arxiv.org/abs/2204.02311 (appendix B), torch.utils.flop_counter
    """
    check_updates("throughput", run)
    at_least_one(f"throughput(run, window={window!r})", "window", window)
    if isinstance(flops, str):
        one_of(f"throughput(run, flops={flops!r})", "flops", flops, ("count",))
    elif flops is not None and not callable(flops):
        positive(f"throughput(run, flops={flops!r})", "flops", flops)
    if tokens is not None and not callable(tokens):
        raise UsageError(
            f"throughput(run, tokens={tokens!r:.40})",
            f"a {type(tokens).__name__}",
            "a function of the state: lambda state: state.output['n_tokens']",
        )
    return Throughput(run, Meter(tokens, flops, None, window), peak_flops)


def _measured(
    run: Iterable[TrainState], meter: Meter, given: float | None
) -> Generator[TrainState]:
    states, start = iter(run), None
    while True:
        with meter.counting() as counter:
            state = next(states, None)
        if state is None:
            return
        if start is None:  # the first
            meter.peak = peak_flops(state.device, given)
            meter.learn(state, counter)
        else:
            meter.add(state, start, mark(state.device))
        yield state
        start = mark(state.device)
