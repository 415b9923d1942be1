"""Updates that are not finite: skipped or refused, and nothing else advances."""

import copy

import loopkit as lk
import pytest
import torch
from loopkit.skips import Skips
from loopkit.testing import assert_bitwise_equal

from problems import OPTIMIZERS, classifier, halving, make_batches, make_state

STACK = [lk.with_ema(0.8), lk.with_clip(0.3), lk.with_schedule(lr=halving)]


def poison(where, value):
    """A step function whose loss or gradient is not finite at the third update."""

    def function(state, batch):
        loss = classifier(state, batch)
        if state.step != 2:
            return loss
        if where == "loss":
            return loss + (value - loss.detach())  # the value is not finite, its gradient is
        weight = state.model[0].weight
        return loss + (weight.reshape(-1)[0] - weight.reshape(-1)[0].detach()) * value

    return function


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_skipped_update_advances_nothing(optimizer, where, value):
    """Weights, optimizer, schedule and averages are those of training without that batch."""
    batches = make_batches(6)
    ours, theirs = make_state(optimizer=optimizer), make_state(optimizer=optimizer)
    step = lk.compose(*STACK, lk.with_nonfinite("skip"))(poison(where, value))
    applied = []
    for batch in batches:
        step(ours, batch)
        applied.append(bool(ours.applied))
    plain = lk.compose(*STACK)(classifier)
    for batch in [*batches[:2], *batches[3:]]:
        plain(theirs, batch)
    assert applied == [True, True, False, True, True, True]
    assert ours.step == 6
    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict())
    assert_bitwise_equal(ours.optimizer.state_dict(), theirs.optimizer.state_dict())
    for name in ("ema", "schedule.lr"):
        assert_bitwise_equal(ours.features[name].state_dict(), theirs.features[name].state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_first_update_leaves_no_garbage(optimizer):
    """A first update that overflows leaves the optimizer as if it had not been made."""
    ours, theirs = make_state(optimizer=optimizer), make_state(optimizer=optimizer)
    batch, rest = make_batches(1)[0], make_batches(4, seed=9)
    step = lk.with_nonfinite("skip")(
        lambda s, b: classifier(s, b) * (float("inf") if s.step == 0 else 1)
    )
    for taken in [batch, *rest]:
        step(ours, taken)
    for taken in rest:
        lk.train_step(classifier)(theirs, taken)
    assert_bitwise_equal(ours.model.state_dict(), theirs.model.state_dict())


def test_raising_stops_before_the_update_and_names_it():
    """with_nonfinite("raise") leaves the state of the update before, and names the update."""
    for where in ("loss", "gradient"):
        state = make_state()
        step = lk.compose(*STACK, lk.with_nonfinite("raise"))(poison(where, float("nan")))
        batches = make_batches(4)
        for batch in batches[:2]:
            step(state, batch)
        before = copy.deepcopy(state.state_dict())
        with pytest.raises(lk.NonFiniteError, match="update 3"):
            step(state, batches[2])
        after = state.state_dict()
        after["optimizer"]["param_groups"] = before["optimizer"]["param_groups"]
        assert_bitwise_equal(after, before)


def test_the_culprits_are_named():
    """The error names parameters whose gradients are not finite."""
    step = lk.with_nonfinite("raise")(poison("gradient", float("inf")))
    state = make_state()
    state.step = 2
    with pytest.raises(lk.NonFiniteError, match=r"1 parameters \(0\.weight\)"):
        step(state, make_batches(1)[0])


def test_fp16_goes_on_after_an_error_in_the_middle_of_an_update():
    """An exception between unscaling and the scaler's update does not stop the next update."""
    step = lk.compose(lk.with_amp("fp16", init_scale=1024.0), lk.with_nonfinite("raise"))(
        poison("loss", float("nan"))
    )
    state = make_state()
    batches = make_batches(4)
    for batch in batches[:2]:
        step(state, batch)
    with pytest.raises(lk.NonFiniteError):
        step(state, batches[2])
    state.step += 1
    step(state, batches[3])
    assert state.applied


def test_a_user_can_vote_to_skip_without_touching_the_loss_scale():
    """state.skip_if skips the update; the scale of fp16 falls for overflows alone."""

    def function(state, batch):
        state.skip_if(torch.tensor(state.step == 1))
        return classifier(state, batch)

    state = make_state()
    step = lk.with_amp("fp16", init_scale=256.0)(function)
    applied = [bool(step(state, batch).applied) for batch in make_batches(3)]
    assert applied == [True, False, True]
    assert state.features["amp"].get_scale() == 256.0


def test_large_but_finite_gradients_are_not_skipped():
    """Gradients whose 2-norm overflows are finite, and are applied."""
    state = make_state(optimizer="sgd")
    step = lk.with_nonfinite("skip")(lambda s, b: classifier(s, b) * 1e30)
    assert step(state, make_batches(1)[0]).applied


@pytest.mark.parametrize("optimizer", ["fused adamw", "fused sgd"])
def test_fused_optimizers_decide_on_the_device(optimizer):
    """With a fused optimizer the answer stays a tensor that nobody waited for."""
    state = make_state(optimizer=optimizer)
    step = lk.with_nonfinite("skip")(classifier)
    for batch in make_batches(2):
        step(state, batch)
    assert isinstance(state.applied, torch.Tensor)
    assert not hasattr(state.optimizer, "found_inf")


@pytest.mark.parametrize("optimizer", ["sgd", "fused adamw"])
def test_skipping_without_end_is_an_error(optimizer):
    """After `most` skipped updates in a row, not before; an applied one ends the count."""

    def function(state, batch):
        return classifier(state, batch) * (1 if state.step == 4 else float("nan"))

    state = make_state(optimizer=optimizer)
    run = lk.run(lk.with_nonfinite("skip", most=6)(function), state, make_batches(30), max_epochs=1)
    with pytest.raises(lk.NonFiniteError, match="6 updates in a row skipped: loss nan") as caught:
        run.finish()
    assert state.step == 4 + 1 + 6
    assert "most=None" in caught.value.instead


def test_fp16_whose_scale_falls_for_ever_is_an_error():
    """A hundred overflows in a row: the error says what the scale has come to, 2**(16 - 100)."""
    state = make_state()
    step = lk.compose(lk.with_amp("fp16"), lk.with_nonfinite("skip"))(
        lambda s, b: classifier(s, b) * float("inf")
    )
    batch = make_batches(1)[0]
    for _ in range(99):
        step(state, batch)
    with pytest.raises(lk.NonFiniteError, match=r"100 updates in a row.* down to 5\.17e-26"):
        step(state, batch)


def test_updates_over_nothing_are_no_skips_without_end():
    """Windows without a label may come for as long as they like; they do not end a count either."""

    def function(state, batch):
        broken = state.step in {2, 6}
        loss = classifier(state, batch) * (float("nan") if broken else 1)
        return {"loss": loss, "weight": int(broken)}

    state = make_state()
    step = lk.with_nonfinite("skip", most=2)(function)
    for batch in make_batches(6):
        step(state, batch)
    with pytest.raises(lk.NonFiniteError, match="2 updates in a row"):
        step(state, batch)


def test_fp16_takes_an_update_over_nothing():
    """It is skipped; the loss scale stays, and the next update is as if it had not been."""

    def function(state, batch):
        return {"loss": classifier(state, batch), "weight": int(state.step != 1)}

    state, batches = make_state(), make_batches(3)
    step = lk.with_amp("fp16", init_scale=256.0)(function)
    assert [bool(step(state, batch).applied) for batch in batches] == [True, False, True]
    assert state.features["amp"].get_scale() == 256.0
    other = make_state()
    plain = lk.with_amp("fp16", init_scale=256.0)(classifier)
    for batch in (batches[0], batches[2]):
        plain(other, batch)
    assert_bitwise_equal(state.model.state_dict(), other.model.state_dict())


def test_a_branch_counts_for_itself_and_none_is_no_limit():
    """A snapshot begins to count anew; most=None goes on; a wrong limit is told."""
    state, batch = make_state(), make_batches(1)[0]
    step = lk.with_nonfinite("skip", most=3)(lambda s, b: classifier(s, b) * float("nan"))
    for _ in range(2):
        step(state, batch)
    branch = state.snapshot()
    assert not step(branch, batch).applied
    with pytest.raises(lk.NonFiniteError):
        step(state, batch)
    endless = lk.with_nonfinite("skip", most=None)(lambda s, b: classifier(s, b) * float("nan"))
    assert "most=None" in str(endless)
    state = make_state()
    for _ in range(20):
        assert not endless(state, batch).applied
    with pytest.raises(lk.UsageError, match="most = 0"):
        lk.with_nonfinite("skip", most=0)


def test_on_a_device_the_count_is_kept_there():
    """There, count = skipped * (count + 1), in place, and nothing of it is read before its time."""
    skips, counts = Skips(), []
    for step, skipped in enumerate((1, 1, 0, 1, 1, 1), 1):
        skips._count_on_device(step, torch.tensor(float(skipped)))
        counts.append(skips._on_device.item())
    assert counts == [1, 2, 0, 1, 2, 3]
    assert skips.in_a_row == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_device_that_skips_without_end_is_found_without_waiting():
    """With a fused optimizer on CUDA no update waits, and the error comes within 128 updates."""
    state = make_state()
    state.model.cuda()
    state.optimizer = torch.optim.AdamW(state.model.parameters(), fused=True)
    step = lk.with_nonfinite("skip", most=10)(lambda s, b: classifier(s, b) * float("nan"))
    batch = lk.to_device(make_batches(1)[0], state.device)
    step(state, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(126):
            step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(lk.NonFiniteError, match="updates in a row"):
        step(state, batch)
