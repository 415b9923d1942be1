"""Wrong uses: each is an error that names what was written, what was found, what to write."""

import functools
import math

import loopkit as lk
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from problems import classifier, make_batches, make_state

BATCH = make_batches(1)[0]


def step_of(output):
    """A step function that returns what the function makes of the logits."""
    return lambda state, batch: output(state.model(batch[0]))


def call(function, state=None, batch=BATCH):
    return lk.train_step(function)(state or make_state(), batch)


def state_with_ema():
    state = make_state()
    lk.with_ema(0.9)(classifier)(state, BATCH)
    return state


def restored_with_ema():
    state = make_state()
    state.load_state_dict(state_with_ema().state_dict())
    return state


def other_optimizer():
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)


def pasted_loop(state, batch):
    state.optimizer.zero_grad()
    loss = classifier(state, batch)
    loss.backward()
    state.optimizer.step()
    return loss


def recurrent():
    """Two updates, of which the second one's loss depends on the first one's graph."""
    state, kept = make_state(), [torch.zeros(())]

    def step(state, batch):
        kept[0] = kept[0] + classifier(state, batch)
        return kept[0]

    for _ in range(2):
        call(step, state)


U, C, R, D = lk.UsageError, lk.CompositionError, lk.OutputError, lk.DataError

# What is written, the error, and what its message names: the finding and the remedy.
WRONG = {
    "a step that is no function": (lambda: lk.train_step(3), C, "int", "(state, batch) -> loss"),
    "a decorator not called": (lambda: lk.with_clip(1.0)(lk.with_clip(1.0)), C, "Decorator", "@lk.with_clip(1.0)"),
    "a class as a step": (lambda: lk.with_clip(1.0)(nn.Linear), C, "type", "a function"),
    "a function composed as a decorator": (lambda: lk.compose(classifier), C, "function", "compose(a, b)(function)"),
    "two owners of a place": (
        lambda: lk.compose(lk.with_grad_accum(2), lk.with_grad_accum(4))(classifier),
        C, "with_grad_accum(4)", "one of the two",
    ),
    "two names of state": (
        lambda: lk.compose(lk.with_ema(0.9), lk.with_ema(0.99))(classifier), C, "'ema'", "name="
    ),
    "two precisions": (
        lambda: lk.compose(lk.with_amp("bf16"), lk.with_amp("fp16"))(classifier), C, "'precision'", "one of",
    ),
    "two schedules of one value": (
        lambda: lk.compose(lk.with_schedule(lr=abs), lk.with_schedule(lr=abs))(classifier), C, "lr", "one of",
    ),
    "an unknown place to wrap": (lambda: lk.wrap(transfrom=dict), C, "no such place", "'transform'"),
    "an unknown place to own": (lambda: lk.own(init=dict), C, "no such place", "'apply'"),
    "a layer that is not callable": (lambda: lk.wrap(transform=3), C, "int", "a callable"),
    "a model that is no module": (lambda: lk.TrainState(3), U, "int", "torch.nn.Module"),
    "an optimizer that is none": (lambda: lk.TrainState(nn.Linear(1, 1), 3), U, "int", "torch.optim"),
    "an optimizer of another model": (
        lambda: lk.TrainState(nn.Linear(1, 1), other_optimizer()), U, "none of them", "model.parameters()",
    ),
    "no optimizer": (lambda: call(classifier, lk.TrainState(nn.Linear(4, 3))), U, "no optimizer", "TrainState(model, optimizer)"),
    "a model as the state": (lambda: call(classifier, nn.Linear(4, 3)), U, "Linear", "the state first"),
    "a model as the state of a run": (
        lambda: lk.run(classifier, nn.Linear(4, 3), [BATCH]), U, "Linear", "second argument",
    ),
    "a state from another step": (
        lambda: call(classifier, state_with_ema()), C, "['ema']", "same decorators",
    ),
    "a restored state from another step": (
        lambda: call(classifier, restored_with_ema()), C, "['ema']", "same decorators",
    ),
    "a state of the same step with other settings": (
        lambda: lk.with_ema(0.5)(classifier)(state_with_ema(), BATCH), C, "with_ema(0.9)", "equal settings",
    ),
    "a bare batch for an accumulating step": (
        lambda: lk.with_grad_accum(2)(classifier)(make_state(), BATCH), U, "tuple", "lk.windows(loader, n)",
    ),
    "a window for a plain step": (lambda: call(classifier, batch=lk.Window([BATCH])), U, "Window", "with_grad_accum"),
    "a window without batches": (lambda: lk.Window([]), U, "0 micro-batches", "at least one"),
    "a lazy window without batches": (
        lambda: lk.with_grad_accum(2)(classifier)(make_state(), lk.Window(iter([]))), D, "0 in it", "at least one",
    ),
    "a window with a wrong length": (
        lambda: lk.with_grad_accum(2)(classifier)(make_state(), lk.Window([BATCH], 2)), D, "1 in it", "length says",
    ),
    "windows as the data of a run": (
        lambda: next(lk.run(lk.with_grad_accum(2)(classifier), make_state(), lk.windows([BATCH] * 4, 2))),
        D, "windows, for a step", "run(step, state, data)",
    ),
    "windows by a schedule": (lambda: lk.windows([], {0: 1, 4: 8}), U, "n as a dict", "if state.epoch < 4 else 8"),
    "windows by a function": (lambda: lk.windows([], lambda state: 4), U, "n as a function", "lk.run(step, state, data)"),
    "windows of nothing": (lambda: lk.windows([], 0), U, "n = 0", "n >= 1"),
    "a loss that is no scalar": (lambda: call(step_of(lambda x: x)), R, "(5, 3)", "loss.mean()"),
    "a loss without a gradient": (
        lambda: call(step_of(lambda x: x.detach().mean())), R, "requires_grad is False", "without detach",
    ),
    "a mapping without a loss": (lambda: call(step_of(lambda x: {"los": x.mean()})), R, "los", '"loss"'),
    "a loss that is a number": (lambda: call(step_of(lambda x: {"loss": 1.0})), R, "float", '"loss"'),
    "a step that returns nothing": (lambda: call(step_of(lambda x: None)), R, "NoneType", "0-d loss"),
    "a negative weight": (
        lambda: call(step_of(lambda x: {"loss": x.mean(), "weight": -1})), R, "weight = -1", ">= 0",
    ),
    "a weight that is no scalar": (
        lambda: call(step_of(lambda x: {"loss": x.mean(), "weight": x})), R, "tensor", "0-d tensor",
    ),
    "a weight that is not a number": (
        lambda: call(step_of(lambda x: {"loss": x.mean(), "weight": math.nan})), R, "nan", ">= 0",
    ),
    "weights for some micro-batches": (
        lambda: lk.with_grad_accum(2)(
            lambda s, b: {"loss": classifier(s, b), **({} if s.outcome.parts else {"weight": 1})}
        )(make_state(), lk.Window([BATCH] * 2)),
        R, "1 of the 2", "or for none",
    ),
    "an unknown dtype": (lambda: lk.with_amp("float16"), U, "'float16'", "'bf16' or 'fp16'"),
    "a scale of zero": (lambda: lk.with_amp("fp16", init_scale=0), U, "init_scale = 0", "above 0"),
    "a window of zero": (lambda: lk.with_grad_accum(0), U, "n = 0", "1 or more"),
    "a window of a half": (lambda: lk.with_grad_accum(0.5), U, "n = 0.5", "1 or more"),
    "a window schedule from epoch 1": (lambda: lk.with_grad_accum({1: 4}), U, "[1]", "from epoch 0"),
    "a window schedule with zero": (lambda: lk.with_grad_accum({0: 0}), U, "n = 0", "1 or more"),
    "a window function that gives zero": (
        lambda: next(lk.run(lk.with_grad_accum(lambda s: 0)(classifier), make_state(), [BATCH])), U, "n = 0", "1 or more",
    ),
    "a NaN norm": (lambda: lk.with_clip(math.nan), U, "max_norm = nan", "above 0"),
    "a negative norm": (lambda: lk.with_clip(-1), U, "max_norm = -1", "above 0"),
    "a function as the norm": (lambda: lk.with_clip(classifier), U, "function", "above 0"),
    "a NaN limit": (lambda: lk.with_clip_value(math.nan), U, "limit = nan", "above 0"),
    "a decay above one": (lambda: lk.with_ema(1.1), U, "decay = 1.1", "from 0 to 1"),
    "a NaN decay": (lambda: lk.with_ema(math.nan), U, "decay = nan", "from 0 to 1"),
    "averages that are not kept": (lambda: lk.ema_weights(make_state()), U, "keeps []", "with_ema"),
    "a policy that is none": (lambda: lk.with_nonfinite("ignore"), U, "'ignore'", "'skip' or 'raise'"),
    "no schedule": (lambda: lk.with_schedule(), U, "no schedule", "lr=f"),
    "a schedule that is a number": (lambda: lk.with_schedule(lr=0.1), U, "lr = 0.1", "a function"),
    "a schedule by its name": (lambda: lk.with_schedule(lr="cosin"), U, "lr = 'cosin'", "as 'cosine'; known are"),
    "a schedule by another's name": (
        lambda: lk.with_schedule("linear_with_warmup"), U, "a str", "as 'linear'; known are constant",
    ),
    "a schedule of an unknown key": (
        lambda: lk.with_schedule(lrr=abs)(classifier)(make_state(), BATCH), U, "no 'lrr'", "'lr'",
    ),
    "schedules for other groups": (
        lambda: lk.with_schedule(lr=[abs, abs])(classifier)(make_state(), BATCH), U, "2 schedules for 1", "one for each",
    ),
    "a scheduler and a schedule": (
        lambda: lk.with_schedule(functools.partial(print), lr=abs), U, "['lr']", "one or the other",
    ),
    "a scheduler that needs a metric": (
        lambda: lk.with_schedule(ReduceLROnPlateau(other_optimizer())), U, "ReduceLROnPlateau", "scheduler.step(score)",
    ),
    "a scheduler of another optimizer": (
        lambda: lk.with_schedule(torch.optim.lr_scheduler.StepLR(other_optimizer(), 1))(classifier)(make_state(), BATCH),
        U, "another optimizer", "state.optimizer",
    ),
    "a loop pasted into the step": (
        lambda: call(pasted_loop), R, "the function has called loss.backward() itself", "only `return loss`",
    ),
    "a loop pasted into a decorated step": (
        lambda: lk.compose(lk.with_amp("fp16"), lk.with_grad_accum(2), lk.with_ema(0.9))(pasted_loop)(
            make_state(), lk.Window([BATCH, BATCH])
        ),
        R, "the loss of pasted_loop", "no optimizer.step()",
    ),
    "a hidden state that is not detached": (lambda: recurrent(), R, "a tensor of an earlier batch", "hidden.detach()"),
    "a state dict with a part missing": (lambda: make_state().load_state_dict({"model": {}}), U, "['model']", "exactly the parts"),
    "an update with other weights in place": (
        lambda: call_within_averages(), C, "other weights", "after the with block",
    ),
}  # fmt: skip


def call_within_averages():
    state = state_with_ema()
    with lk.ema_weights(state):
        lk.with_ema(0.9)(classifier)(state, BATCH)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_an_error_that_teaches(case):
    """A wrong use raises the error of its kind, naming what was found and what to write."""
    wrong, kind, found, remedy = WRONG[case]
    with pytest.raises(kind) as caught:
        wrong()
    error = caught.value
    assert isinstance(error, lk.LoopkitError)
    assert found in error.wrote + " " + error.found
    assert remedy in error.instead
    assert str(error) == f"{error.wrote}: found {error.found}\n  write instead: {error.instead}"


def test_a_failing_step_in_set_up_leaves_the_state_without_traces():
    """A state that was refused by a step can go on with the right one."""
    state = make_state()
    with pytest.raises(lk.UsageError):
        lk.compose(lk.with_schedule(lrr=abs), lk.with_ema(0.9))(classifier)(state, BATCH)
    assert state.features == {}
    assert state.step == 0
    lk.with_clip(1.0)(classifier)(state, BATCH)
    assert state.step == 1
