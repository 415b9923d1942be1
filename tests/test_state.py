"""The training state."""

import copy

import loopkit as lk
import torch
from loopkit.testing import assert_bitwise_equal
from torch import nn

from problems import classifier, halving, make_batches, make_state

STEP = lk.compose(
    lk.with_ema(0.8), lk.with_clip(0.3), lk.with_amp("fp16"), lk.with_schedule(lr=halving)
)(classifier)


def test_the_users_objects_stay_the_users():
    """The state holds the very model and optimizer, and state_dict keys are plain."""
    state = make_state()
    model, optimizer, keys = state.model, state.optimizer, [*state.model.state_dict()]
    for batch in make_batches(3):
        STEP(state, batch)
    assert state.model is model
    assert state.optimizer is optimizer
    assert [*state.state_dict()["model"]] == keys


def test_metrics_are_tensors_of_the_last_update():
    """loss, grad_norm, lr and the function's own 0-d tensors are there as detached 0-d tensors."""

    def function(state, batch):
        loss = classifier(state, batch)
        return {"loss": loss, "double": loss * 2, "logits": state.model(batch[0]), "text": "x"}

    state = make_state()
    step = lk.compose(lk.with_clip(0.3), lk.with_schedule(lr=halving))(function)
    for i, batch in enumerate(make_batches(3)):
        step(state, batch)
        assert sorted(state.metrics) == ["double", "grad_norm", "loss", "lr"]
        assert all(v.ndim == 0 and not v.requires_grad for v in state.metrics.values())
        assert state.metrics["lr"] == torch.tensor(halving(i))
        assert state.metrics["double"] == 2 * state.metrics["loss"]
        assert state.output["text"] == "x"
        assert state.metrics is state.metrics
    assert make_state().metrics["loss"].isnan()


def test_the_learning_rate_in_metrics_is_that_of_the_update():
    """With a torch scheduler, also over a tensor learning rate, lr is the one that was used."""
    for lr in (0.1, torch.tensor(0.1)):
        model = nn.Linear(4, 3)
        state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=lr))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(state.optimizer, 0.5)
        step = lk.with_schedule(scheduler)(classifier)
        seen = [step(state, batch).metrics["lr"].item() for batch in make_batches(3)]
        assert torch.allclose(torch.tensor(seen), torch.tensor([0.1, 0.05, 0.025]))


def test_saved_and_restored_training_equals_uninterrupted_training():
    """state_dict, load_state_dict and the same batches continue bit for bit, also twice."""
    whole = make_state()
    for batch in make_batches(9):
        STEP(whole, batch)
    state = make_state()
    for third in range(3):
        for batch in make_batches(9)[3 * third : 3 * third + 3]:
            STEP(state, batch)
        saved = copy.deepcopy(state.state_dict())
        state = make_state(seed=third + 5)
        state.load_state_dict(saved)
    STEP(whole, make_batches(1)[0])
    STEP(state, make_batches(1)[0])
    assert_bitwise_equal(state.state_dict(), whole.state_dict())


def test_a_state_dict_that_was_loaded_is_copied():
    """Training on leaves the state dict that was loaded as it was."""
    state = make_state()
    STEP(state, make_batches(1)[0])
    saved = copy.deepcopy(state.state_dict())
    kept = copy.deepcopy(saved)
    resumed = make_state()
    resumed.load_state_dict(saved)
    for batch in make_batches(3):
        STEP(resumed, batch)
    assert_bitwise_equal(saved, kept)


def test_a_snapshot_is_independent_and_trains_on_the_same():
    """A branch trains bit for bit as the original does, and neither changes the other."""
    for make in (make_state, make_state_with_scheduler):
        step = STEP if make is make_state else lk.with_schedule(torch_scheduler)(classifier)
        state = make()
        for batch in make_batches(3):
            step(state, batch)
        before = copy.deepcopy(state.model.state_dict())
        branch = state.snapshot()
        for batch in make_batches(3, seed=7):
            step(branch, batch)
        assert_bitwise_equal(state.model.state_dict(), before)
        for batch in make_batches(3, seed=7):
            step(state, batch)
        assert_bitwise_equal(state.model.state_dict(), branch.model.state_dict())
        assert_bitwise_equal(state.optimizer.state_dict(), branch.optimizer.state_dict())
        assert branch.step == state.step == 6


def torch_scheduler(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


def make_state_with_scheduler():
    return make_state(optimizer="momentum")


def test_extras_with_state_or_plain_data_are_saved_and_others_are_not():
    """What has state_dict, or is plain data, travels; a tokenizer or a function does not."""
    state = make_state()
    state.extras |= {"teacher": nn.Linear(2, 2), "seen": [1, {"a": 2.5}], "tokenizer": object()}
    saved = copy.deepcopy(state.state_dict())
    assert sorted(saved["extras"]) == ["seen", "teacher"]
    other = make_state()
    other.extras |= {"teacher": nn.Linear(2, 2), "tokenizer": len}
    other.load_state_dict(saved)
    assert_bitwise_equal(other.extras["teacher"].state_dict(), saved["extras"]["teacher"])
    assert other.extras["seen"] == [1, {"a": 2.5}]
    assert other.extras["tokenizer"] is len


def test_averaged_weights_come_and_go_and_are_never_saved_as_the_model():
    """Within ema_weights the model computes with the averages, but its own weights are saved."""
    state = make_state()
    for batch in make_batches(3):
        STEP(state, batch)
    own = copy.deepcopy(state.model.state_dict())
    averages = copy.deepcopy(state.features["ema"].weights)
    with lk.ema_weights(state):
        assert_bitwise_equal(dict(state.model.named_parameters()), averages)
        assert_bitwise_equal(state.state_dict()["model"], own)
    assert_bitwise_equal(state.model.state_dict(), own)


def test_averages_of_a_restored_state_can_be_used_before_any_update():
    """A state that was restored for evaluation has its averages at hand."""
    state, restored = make_state(), make_state(seed=3)
    for batch in make_batches(3):
        STEP(state, batch)
    restored.load_state_dict(copy.deepcopy(state.state_dict()))
    with lk.ema_weights(restored):
        assert_bitwise_equal(dict(restored.model.named_parameters()), state.features["ema"].weights)
