"""True precisions, TensorFloat-32 and float8."""

import functools
import importlib.util
import itertools

import loopkit as lk
import pytest
import torch
from loopkit.testing import Problem, assert_bitwise_equal, check_decorator
from torch import nn
from torch.nn import functional as F

from problems import classifier, make_batches, make_state

DTYPES = {
    "64-true": torch.float64, "32-true": torch.float32, "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
}  # fmt: skip

# Adam's usual eps of 1e-8 is zero in float16, and its updates 0 / 0
OPTIMIZERS = {
    "momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4),
    "foreach adamw": functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4, foreach=True),
}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_true_precision_is_the_model_cast_by_hand(precision, optimizer):
    """Weights, statistics, losses and optimizer equal a loop over model.to(dtype)."""
    ours, theirs, dtype = make_state("conv"), make_state("conv"), DTYPES[precision]
    ours = lk.TrainState(ours.model, OPTIMIZERS[optimizer](ours.model.parameters()))
    weight = ours.model[1].weight
    step = lk.compose(lk.with_clip(0.5), lk.with_precision(precision))(classifier)
    losses = [s.loss for s in lk.run(step, ours, make_batches(6), max_epochs=1)]
    model = theirs.model.to(dtype)
    made = OPTIMIZERS[optimizer](model.parameters())
    wanted = []
    for inputs, labels in make_batches(6):
        made.zero_grad()
        loss = F.cross_entropy(model(inputs.to(dtype)), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        made.step()
        wanted.append(loss.detach())
    assert weight.dtype is dtype
    assert weight.isfinite().all()
    assert ours.model[1].weight is weight
    assert_bitwise_equal(losses, wanted)
    assert_bitwise_equal(ours.model.state_dict(), model.state_dict())
    assert_bitwise_equal(ours.optimizer.state_dict(), made.state_dict())


@pytest.mark.parametrize("precision", ["32-true", "16-true", "bf16-true"])
def test_a_true_precision_keeps_the_laws(precision):
    """It compares, pickles, and resumes bit for bit into a model that was not cast before."""
    problem = Problem(lambda: make_state("dropout", "momentum"), classifier, make_batches(5))
    check_decorator(lk.with_precision(precision), problem)


def test_double_precision_keeps_the_laws():
    """On a model in float64 nothing is lost, restored or not."""
    batches = make_batches(4, dtype=torch.float64)
    problem = Problem(lambda: make_state("dropout", dtype=torch.float64), classifier, batches)
    check_decorator(lk.with_precision("64-true"), problem)


def test_double_precision_that_was_lost_is_told():
    """Restoring into float32 before the cast is an error; after set_up it is right."""
    step = lk.with_precision("64-true")(classifier)
    state, batches = make_state(), make_batches(3)
    step(state, batches[0])
    saved = state.state_dict()
    early, late = make_state(seed=1), step.set_up(make_state(seed=1))
    early.load_state_dict(saved)
    with pytest.raises(lk.UsageError, match=r"lost digits\n.*step.set_up"):
        step(early, batches[1])
    late.load_state_dict(saved)
    for one in (state, late):
        step(one, batches[1])
    assert_bitwise_equal(late.model.state_dict(), state.model.state_dict())


def test_another_precision_than_before_is_told():
    """A training in bf16 does not go on in fp16 unnoticed."""
    state, other = make_state(), make_state()
    lk.with_precision("bf16-true")(classifier)(state, make_batches(1)[0])
    other.load_state_dict(state.state_dict())
    with pytest.raises(lk.UsageError, match="trained with 'bf16-true'"):
        lk.with_precision("16-true")(classifier)(other, make_batches(1)[0])


def test_all_orders_give_the_same_bits():
    """bf16 throughout among accumulation, clipping, averages and SAM: 120 orders, one result."""
    stack = [
        lk.with_precision("bf16-true"), lk.with_grad_accum(2), lk.with_clip(0.3),
        lk.with_ema(0.9), lk.with_sam(0.1),
    ]  # fmt: skip
    first = None
    for order in itertools.permutations(stack):
        state = make_state("dropout")
        torch.manual_seed(2)
        [*lk.run(lk.compose(*order)(classifier), state, make_batches(4), max_epochs=1)]
        first = first or state
        assert_bitwise_equal(state.state_dict(), first.state_dict(), str(order))
    assert first.features["ema"].weights["0.weight"].dtype is torch.float32


def test_evaluation_casts_its_inputs_too():
    """An eval step with the same decorator takes the batches as they are."""
    state = make_state("conv")
    decorated = lk.with_precision("bf16-true")
    decorated(classifier)(state, make_batches(1)[0])
    assert lk.evaluate(decorated(classifier), state, make_batches(2)).keys() == {"loss"}
    with pytest.raises(RuntimeError, match=r"d?type"):
        lk.evaluate(classifier, state, make_batches(2))


def test_tf32_is_on_inside_and_as_it_was_outside():
    """Forward and backward run with it, whatever happens the process's setting comes back."""
    seen = []

    def function(state, batch):
        seen.append(torch.get_float32_matmul_precision())
        loss = classifier(state, batch)
        loss.register_hook(lambda g: seen.append(torch.get_float32_matmul_precision()))
        return loss

    step = lk.compose(lk.with_amp("bf16"), lk.with_precision("tf32"), lk.with_grad_accum(2))(
        function
    )
    step(make_state(), lk.Window(make_batches(2)))
    assert seen == ["high"] * 4
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError):
        lk.with_precision("tf32")(lambda s, b: 1 / 0)(make_state(), make_batches(1)[0])
    assert torch.get_float32_matmul_precision() == "highest"
    check_decorator(lk.with_precision("tf32"))


def wide():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 3))
    return lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))


def wide_batches(count=5):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 16, generator=generator), torch.randint(3, (16,), generator=generator))
        for _ in range(count)
    ]


needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao"
)


@needs_torchao
@pytest.mark.filterwarnings("ignore")  # importing torchao warns of its own code
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_is_torchaos(recipe):
    """Emulated on any device, the weights equal those of a model converted by hand."""
    import dataclasses

    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    ours, theirs = wide(), wide()
    weight, keys = ours.model[0].weight, [*ours.model.state_dict()]
    step = lk.with_precision("fp8", recipe=recipe, emulate=True)(classifier)
    [*lk.run(step, ours, wide_batches(), max_epochs=1)]
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    convert_to_float8_training(
        theirs.model, config=config, module_filter_fn=lambda m, n: n in {"0", "2"}
    )
    for inputs, labels in wide_batches():
        theirs.optimizer.zero_grad()
        F.cross_entropy(theirs.model(inputs), labels).backward()
        theirs.optimizer.step()
    assert ours.model[0].weight is weight
    assert [*ours.model.state_dict()] == keys
    assert "Float8" in type(ours.model[2]).__name__
    assert type(ours.model[3]) is nn.Linear  # 3 is no multiple of 16
    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict())
    plain = wide()
    [*lk.run(classifier, plain, wide_batches(), max_epochs=1)]
    assert not torch.equal(plain.model[0].weight, ours.model[0].weight)


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_float8_keeps_the_laws():
    """It compares, pickles, resumes bit for bit, and stands anywhere, beside bf16 as well."""
    check_decorator(
        lk.with_precision("fp8", emulate=True), Problem(wide, classifier, wide_batches())
    )


WRONG = {
    "mixed": (lambda: lk.with_precision("16-mixed"), 'with_amp("fp16")'),
    "mixed bf16": (lambda: lk.with_precision("bf16-mixed"), 'with_amp("bf16")'),
    "a near name": (lambda: lk.with_precision("bf16true"), "'bf16-true'"),
    "a number": (lambda: lk.with_precision(32), "32-true"),
    "two precisions": (
        lambda: lk.compose(lk.with_precision("bf16-true"), lk.with_amp("bf16"))(classifier),
        "'precision'",
    ),
    "float8 on the CPU": (
        lambda: lk.with_precision("fp8")(classifier).set_up(wide()),
        "a model on cpu, which has no float8",
    ),
    "float8 without linear layers": (
        lambda: lk.with_precision("fp8", emulate=True)(classifier).set_up(make_state()),
        "sizes that 16 divides",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_precision_is_an_error_that_teaches(case):
    """Other names, devices and models are told with what to write."""
    wrong, found = WRONG[case]
    if case == "float8 without linear layers":
        pytest.importorskip("torchao")
    with pytest.raises(lk.LoopkitError) as caught:
        wrong()
    assert found in str(caught.value)
