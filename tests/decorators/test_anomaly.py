"""Anomaly detection: it names the line that made a NaN, and otherwise changes nothing."""

import loopkit as lk
import pytest
import torch
from loopkit.testing import assert_bitwise_equal

from problems import classifier, make_batches, make_state


def broken(state, batch):
    """The backward pass of sqrt at zero is infinite, and times zero NaN."""
    return classifier(state, batch) + (state.model(batch[0]).sum() * 0).sqrt()


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.filterwarnings("ignore:Error detected in MulBackward0")
def test_the_operation_is_named_with_its_line(window):
    """The error names the backward node, and the traceback of its forward is shown."""
    step = lk.compose(lk.with_anomaly_detection(), lk.with_grad_accum(window))(broken)
    data = lk.Window(make_batches(window))
    with pytest.warns(UserWarning, match=r"\.sum\(\) \* 0\)\.sqrt\(\)"):  # noqa: SIM117
        with pytest.raises(RuntimeError, match="Function 'MulBackward0' returned nan"):
            step(make_state(), data)
    assert not torch.is_anomaly_enabled()


def test_without_the_check_a_nan_passes():
    """With check_nan=False it only remembers where forwards were written."""
    state = make_state()
    step = lk.with_anomaly_detection(check_nan=False)(broken)
    step(state, make_batches(1)[0])
    assert all(p.isnan().any() for p in state.model.parameters())


def test_a_sound_training_is_the_same_bit_for_bit_and_the_switch_is_put_back():
    """Weights, and torch's own setting outside of the step, whichever it was."""
    plain, looked = make_state("dropout"), make_state("dropout")
    for state, step in ((plain, classifier), (looked, lk.with_anomaly_detection()(classifier))):
        torch.manual_seed(0)
        lk.run(step, state, make_batches(), max_epochs=2).finish()
    assert_bitwise_equal(looked.model.state_dict(), plain.model.state_dict())
    seen = []
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        for state in lk.run(lk.with_anomaly_detection()(classifier), looked, make_batches(2)):
            seen.append(torch.is_anomaly_check_nan_enabled())
            if state.step % 2:
                break
    assert seen[0] is False
