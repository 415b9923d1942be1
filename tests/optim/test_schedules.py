"""Schedules against torch's schedulers and the formulas that other trainers use."""

import math
import pickle

import loopkit as lk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loopkit import CompositionError, UsageError
from loopkit.decorators.schedule import PHASES
from loopkit.optim.schedule import Schedule
from torch import nn
from torch.optim import SGD, lr_scheduler

WARMUP, TOTAL, PEAK = 30, 200, 3e-4
DECAY = TOTAL - WARMUP

# The multipliers of the Hugging Face Trainer's schedulers, written down from their definitions.


def hf_warmup(n):
    return n / max(1, WARMUP)


def hf_progress(n):
    return (n - WARMUP) / max(1, TOTAL - WARMUP)


def hf_cosine(n):
    return max(0.0, 0.5 * (1 + math.cos(math.pi * hf_progress(n))))


def hf_restarts(n):
    if hf_progress(n) >= 1:
        return 0.0
    return max(0.0, 0.5 * (1 + math.cos(math.pi * ((3 * hf_progress(n)) % 1))))


def hf_linear(n):
    return max(0.0, (TOTAL - n) / max(1, TOTAL - WARMUP))


def hf_polynomial(n):
    if n > TOTAL:
        return 1e-7 / PEAK
    return ((PEAK - 1e-7) * (1 - hf_progress(n)) ** 2 + 1e-7) / PEAK


def hf_inverse_sqrt(n):
    shift = 50 - WARMUP
    return 1 / math.sqrt((n + shift) / 50)


def hf_wsd(n):
    stable, decay = 100, 70
    if n < WARMUP + stable:
        return 1.0
    if n < WARMUP + stable + decay:
        return max(0.0, 1 - (n - WARMUP - stable) / decay)
    return 0.0


HF = {
    "constant": (lk.constant(), lambda _: 1.0),
    "cosine": (lk.cosine(DECAY), hf_cosine),
    "cosine with restarts": (lk.cosine_with_restarts(DECAY, cycles=3), hf_restarts),
    "linear": (lk.linear(DECAY), hf_linear),
    "polynomial": (lk.polynomial(DECAY, power=2, floor=1e-7), hf_polynomial),
    "inverse sqrt": (lk.inverse_sqrt(timescale=50), hf_inverse_sqrt),
    "wsd": (lk.constant(100) >> lk.linear(70), hf_wsd),
}


@pytest.mark.parametrize("name", HF)
def test_warmup_then_a_decay_is_the_trainers_schedule(name):
    """Each `lr_scheduler_type` of the Hugging Face Trainer is `warmup >> phase`."""
    phase, multiplier = HF[name]
    schedule = lk.warmup(WARMUP, peak=PEAK) >> phase
    for n in range(TOTAL + 1):
        expected = PEAK * (hf_warmup(n) if n < WARMUP else multiplier(n))
        assert schedule(n) == pytest.approx(expected, rel=1e-12, abs=1e-18), n


def of_torch(make, updates=TOTAL, lr=0.5):
    """The learning rates that a torch scheduler sets, one for each update."""
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=lr)
    scheduler, values = make(optimizer), []
    for _ in range(updates):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


TORCH = {
    "ConstantLR": (
        lk.constant(50, value=0.25) >> lk.constant(value=0.5),
        lambda o: lr_scheduler.ConstantLR(o, 0.5, 50),
    ),
    "LinearLR": (
        lk.warmup(50, start=0.125, peak=0.5),
        lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 50),
    ),
    "LinearLR down": (
        lk.linear(50, peak=0.5, floor=0.1),
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, 50),
    ),
    "PolynomialLR": (
        lk.polynomial(150, power=3, peak=0.5),
        lambda o: lr_scheduler.PolynomialLR(o, 150, power=3),
    ),
    "CosineAnnealingLR": (
        lk.cosine(TOTAL, peak=0.5, floor=0.01),
        lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.01),
    ),
    "CosineAnnealingWarmRestarts": (
        lk.cosine(20, peak=0.5, floor=0.01)
        >> lk.cosine(40, peak=0.5, floor=0.01)
        >> lk.cosine(80, peak=0.5, floor=0.01),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 20, T_mult=2, eta_min=0.01),
    ),
    "SequentialLR": (
        lk.warmup(50, start=0.05, peak=0.5) >> lk.cosine(150),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 0.1, 1, 50), lr_scheduler.CosineAnnealingLR(o, 150)],
            [50],
        ),
    ),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_schedules_are_those_of_torch(name):
    """Each of torch's schedulers with a closed form has its schedule here."""
    schedule, make = TORCH[name]
    updates = 140 if "Restarts" in name else TOTAL
    expected = of_torch(make, updates)
    assert [schedule(n) for n in range(updates)] == pytest.approx(expected, rel=1e-9, abs=1e-15)


counts = st.integers(0, 50)
values = st.floats(1e-6, 1.0)


@st.composite
def schedules(draw):
    """A warmup and up to three phases of any kind."""
    phases = {
        "constant": lk.constant,
        "linear": lambda n: lk.linear(n, floor=draw(values)),
        "cosine": lambda n: lk.cosine(n, floor=draw(values)),
        "restarts": lambda n: lk.cosine_with_restarts(n, cycles=draw(st.integers(1, 4))),
        "polynomial": lambda n: lk.polynomial(n, power=draw(values), floor=draw(values)),
        "inverse_sqrt": lambda n: lk.inverse_sqrt(n, timescale=draw(st.integers(1, 100))),
    }
    made = lk.warmup(draw(counts), peak=draw(values))
    for kind in draw(st.lists(st.sampled_from(sorted(phases)), max_size=3)):
        made = made >> phases[kind](draw(counts))
    return made


@given(schedules())
def test_a_schedule_prints_as_what_makes_it_again(schedule):
    """`eval(repr(schedule))` and a pickle of it are equal to it, and hash the same."""
    again = eval(repr(schedule), vars(lk).copy())  # noqa: S307  what it prints is ours
    pickled = pickle.loads(pickle.dumps(schedule))
    assert schedule == again == pickled
    assert hash(schedule) == hash(again) == hash(pickled)


@given(schedules(), st.integers(0, 300), st.sampled_from([0.5, 2.0]))
def test_scaling_scales_every_value(schedule, n, factor):
    """`(schedule * k)(n) == k * schedule(n)`, on both sides."""
    assert (schedule * factor)(n) == (factor * schedule)(n) == pytest.approx(factor * schedule(n))


@given(schedules(), st.integers(1, 50), st.integers(0, 60))
def test_a_phase_without_a_peak_goes_on_where_the_one_before_has_ended(schedule, steps, n):
    """`a >> b` is a until it ends, then b from the value that a ended with."""
    end, last = sum(schedule.lengths()), schedule(10**9)
    chained = schedule >> lk.linear(steps, floor=0.5)
    assert chained(end + n) == lk.linear(steps, peak=last, floor=0.5)(n)
    assert all(chained(m) == schedule(m) for m in range(max(0, end - 5), end))


def test_chaining_is_associative():
    """`(a >> b) >> c` and `a >> (b >> c)` are one and the same schedule."""
    a, b, c = lk.warmup(10), lk.constant(20, value=0.1), lk.linear(30)
    assert (a >> b) >> c == a >> (b >> c)
    assert a >> b != b >> a


def test_a_warmup_takes_the_peak_that_comes_next():
    """The peak can be named at either phase."""
    assert (lk.warmup(10) >> lk.cosine(90, peak=0.1))(10) == 0.1
    assert (lk.warmup(10) >> lk.cosine(90, peak=0.1))(5) == 0.05
    assert (lk.warmup(10, peak=0.1) >> lk.cosine(90))(5) == 0.05


def test_a_peak_of_its_own_is_a_restart():
    """A phase with a peak starts there, wherever the one before has ended."""
    schedule = lk.cosine(10, peak=1.0) >> lk.cosine(10, peak=0.5)
    assert schedule(9) < 0.03
    assert schedule(10) == 0.5


def test_a_warmup_in_the_middle_starts_where_the_phase_before_ended():
    """Warming up again does not fall to zero first."""
    schedule = lk.linear(10, peak=1.0, floor=0.2) >> lk.warmup(10, peak=0.6)
    assert schedule(10) == 0.2
    assert schedule(15) == pytest.approx(0.4)


def test_the_last_value_stays():
    """After its end a schedule keeps its value: a cosine does not rise again."""
    schedule = lk.warmup(10, peak=0.1) >> lk.cosine(90, floor=0.01)
    assert schedule(100) == schedule(150) == schedule(10**9) == 0.01


def test_a_phase_of_no_steps_is_left_out():
    """`warmup(0)` from a setting needs no special case."""
    without = lk.cosine(100, peak=0.1)
    schedule = lk.warmup(0, peak=0.1) >> lk.cosine(100)
    assert [schedule(n) for n in range(101)] == [without(n) for n in range(101)]


def test_a_floor_above_the_peak_rises():
    """Weight decay grows with a cosine in some recipes; the same phase does it."""
    schedule = lk.cosine(100, peak=0.04, floor=0.4)
    assert schedule(0) == 0.04
    assert schedule(50) == pytest.approx(0.22)
    assert schedule(100) == 0.4


def test_fractions_and_rests_are_of_the_total():
    """`over(total)` makes numbers of steps of the fractions and of what is left."""
    schedule = lk.warmup(0.03, peak=0.1) >> lk.constant() >> lk.linear(0.2)
    assert schedule.over(1000) == (lk.warmup(30, peak=0.1) >> lk.constant(770) >> lk.linear(200))
    assert lk.wsd(10, None, 0.5, peak=1.0).over(100) == lk.wsd(10, 40, 50, peak=1.0)
    assert lk.cosine(peak=0.1).over(7) == lk.cosine(7, peak=0.1)


@given(st.integers(1, 10_000), st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_fractions_of_one_fill_the_total(total, shares):
    """However the fractions are rounded, the phases end at the total, none off by a step."""
    fractions = [share / sum(shares) for share in shares]
    schedule = lk.constant(fractions[0], value=1.0)
    for fraction in fractions[1:]:
        schedule = schedule >> lk.linear(fraction)
    lengths = schedule.over(total).lengths()
    assert sum(lengths) == total
    for length, fraction in zip(lengths, fractions, strict=True):
        assert abs(length - fraction * total) < 1 + 1e-6


def test_a_phase_of_your_own_chains_with_the_others():
    """A frozen attrs class with `at` is a phase: it chains, scales and prints."""
    schedule = lk.warmup(10, peak=2.0) >> OneMinusSqrt(100)
    assert schedule(35) == pytest.approx(1.0)
    assert repr(schedule * 2) == "warmup(10, peak=4.0) >> OneMinusSqrt(100)"


class OneMinusSqrt(lk.linear):
    """The cooldown of https://arxiv.org/abs/2405.18392."""

    def remaining(self, done):
        return 1 - math.sqrt(done)


def test_with_schedule_sets_any_value_of_the_param_groups():
    """lr, weight decay and momentum follow their schedules, one for each group where given so."""
    model = nn.Linear(2, 1)
    optimizer = SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=1.0, momentum=0.1)
    lr = lk.warmup(4, peak=0.1) >> lk.cosine(6)
    decay, momentum = lk.linear(10, peak=0.1, floor=0.2), lk.warmup(10, start=0.85, peak=0.95)
    step = lk.with_schedule(lr=[lr, lr * 10], weight_decay=decay, momentum=momentum)(loss_of)
    state = lk.TrainState(model, optimizer)
    for n in range(12):
        step(state, torch.ones(3, 2))
        first, second = optimizer.param_groups
        assert (first["lr"], second["lr"]) == (lr(n), (lr * 10)(n))
        assert (first["weight_decay"], first["momentum"]) == (decay(n), momentum(n))


def loss_of(state, batch):
    return state.model(batch).mean()


def test_a_step_with_a_schedule_compares_and_pickles():
    """Schedules keep the step a value."""
    step = lk.with_schedule(lr=lk.warmup(4, peak=0.1) >> lk.cosine(6))(loss_of)
    assert pickle.loads(pickle.dumps(step)) == step
    assert "warmup(4, peak=0.1) >> cosine(6)" in repr(step)


BAD = {
    "no peak": (lambda: lk.cosine(900)(0), "no peak", "peak=3e-4"),
    "no peak in a chain": (lambda: (lk.warmup(10) >> lk.cosine(90))(0), "no peak", "peak="),
    "no value": (lambda: lk.constant(5)(0), "no value", "value="),
    "a fraction without a total": (
        lambda: (lk.warmup(10, peak=1.0) >> lk.cosine(0.9))(0),
        "0.9 of a total",
        "schedule.over(",
    ),
    "a rest without a total": (lambda: lk.cosine(peak=1.0)(0), "all that other", "schedule.over("),
    "an endless phase before another": (
        lambda: (lk.constant(value=1.0) >> lk.cosine(9))(0),
        "all that other",
        "schedule.over(",
    ),
    "a learning rate for a length": (lambda: lk.constant(3e-4)(0), "0.0003 of a total", "over("),
    "a length of 0.0": (lambda: lk.warmup(0.0), "steps = 0.0", "(0, 1]"),
    "a length of 1.5": (lambda: lk.warmup(1.5), "steps = 1.5", "(0, 1]"),
    "a negative length": (lambda: lk.warmup(-1), "steps = -1", "int"),
    "a length in words": (lambda: lk.warmup("100"), "'100' (str)", "int"),
    "a peak that is not finite": (lambda: lk.warmup(9, peak=math.nan), "peak = nan", "finite"),
    "a floor of None": (lambda: lk.linear(9, floor=None), "floor = None", "finite"),
    "no power": (lambda: lk.polynomial(9, power=0), "power = 0", "above 0"),
    "no cycles": (lambda: lk.cosine_with_restarts(9, cycles=1.5), "cycles = 1.5", "int"),
    "no timescale": (lambda: lk.inverse_sqrt(timescale=-1), "timescale = -1", "above 0"),
    "too long": (lambda: lk.wsd(100, 800, 0.2, peak=1.0).over(1000), "1100 steps", "at most 1000"),
    "two rests": (lambda: lk.wsd(None, None, 9, peak=1.0).over(99), "2 without", "one phase"),
    "no total": (lambda: lk.warmup(0.1).over(0), "total_steps = 0", "1 or more"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_schedule_that_cannot_be_right_says_what_to_write(what):
    """Each mistake is found at the first update at the latest, with its value and the remedy."""
    make, found, instead = BAD[what]
    with pytest.raises(UsageError) as caught:
        make()
    assert found in caught.value.found
    assert instead in caught.value.instead


def test_only_schedules_chain():
    """A plain function on the right of `>>` is an error that names it."""
    with pytest.raises(CompositionError, match="a function on the right"):
        lk.warmup(10, peak=0.1) >> (lambda n: n)


def test_what_is_a_schedule():
    """Phases and chains are both schedules."""
    assert isinstance(lk.constant(value=1.0), Schedule)
    assert isinstance(lk.warmup(1) >> lk.linear(2), Schedule)


def test_a_name_that_is_near_is_proposed():
    """Each phase is proposed for its name, and of loopkit whatever is near a slip of the pen."""
    modules = {name: getattr(getattr(lk, name), "__module__", "") for name in lk.__all__}
    assert {n for n, module in modules.items() if module.endswith("phases")} == {*PHASES}
    for name, near in {"cosin": "cosine", "with_gradaccum": "with_grad_accum"}.items():
        with pytest.raises(AttributeError, match=f"no attribute {name!r}; did you mean {near!r}"):
            getattr(lk, name)
    assert not hasattr(lk, "zzz")
