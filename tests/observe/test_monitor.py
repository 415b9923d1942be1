"""Numbers to log beside the metrics."""

import loopkit as lk
import pytest
import torch

from problems import classifier, halving, make_batches, make_state


def test_each_group_has_its_rate_as_the_schedule_left_it():
    """The row follows the param groups, update by update; tuples are spelled out."""
    model = torch.nn.Linear(4, 3)
    groups = [{"params": [model.weight], "name": "matrix"}, {"params": [model.bias], "lr": 0.5}]
    state = lk.TrainState(model, torch.optim.AdamW(groups, lr=0.1))
    step = lk.with_schedule(lr=[halving, lambda n: 0.5])(classifier)
    for state in lk.run(step, state, make_batches(3), max_epochs=1):
        row = lk.learning_rates(state, "betas")
        for group, name in zip(state.optimizer.param_groups, ("matrix", "1"), strict=True):
            assert row[f"lr/{name}"] == group["lr"]
            assert (row[f"betas/{name}/0"], row[f"betas/{name}/1"]) == group["betas"]


def test_the_row_of_the_device_is_of_plausible_numbers():
    """On the CPU: the memory of this process, in GiB, which holds what it just allocated."""
    before = lk.device_stats(make_state())["device/memory_gib"]
    held = torch.ones(2**26)  # a quarter of a GiB, touched
    after = lk.device_stats(make_state())
    assert 0.2 < after["device/memory_gib"] - before < 0.3
    assert after["device/peak_gib"] >= after["device/memory_gib"] - 0.01
    assert held[0] == 1


def test_both_go_into_a_log(tmp_path):
    """As extras of `wrap`: one row with everything."""
    seen = []
    with lk.Log(tmp_path, seen.append) as log:
        run = lk.run(classifier, make_state(), make_batches(2), max_epochs=1)
        list(log.wrap(run, every=2, extras=[lk.learning_rates, lk.device_stats]))
    assert {"loss", "lr", "lr/0", "device/memory_gib"} <= seen[0].values.keys()


def test_a_wrong_use_is_an_error_that_teaches():
    """A state without an optimizer, and a value that the groups do not have."""
    with pytest.raises(lk.UsageError, match="optimizer"):
        lk.learning_rates(lk.TrainState(torch.nn.Linear(1, 1)))
    with pytest.raises(lk.UsageError, match="weight_decay"):
        lk.learning_rates(make_state(), "momentun")
