"""Five networks side by side choose a setting that explains what was put aside."""

import loopkit as lk
import torch
from torch.utils.data import TensorDataset

import kfold


def test_the_chosen_setting_explains_the_patients_put_aside(monkeypatch, tmp_path, capsys):
    """With one setting of two, and ten epochs at most, more than a quarter of the variance."""
    monkeypatch.setattr(kfold, "DROPOUTS", (0.0, 0.95))
    monkeypatch.setattr(kfold, "MAX_EPOCHS", 8)
    picture = tmp_path / "deep" / "kfold.png"
    explained, linear = kfold.main(picture)
    assert explained > 0.25
    assert 0.3 < linear < 0.4
    assert "chosen: dropout 0.0" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_network_is_judged_on_what_it_was_trained_on(monkeypatch):
    """Noise cannot be foretold: no fold is, though the networks learn theirs by heart."""
    monkeypatch.setattr(kfold, "PATIENCE", 40)
    monkeypatch.setattr(kfold, "MAX_EPOCHS", 40)
    targets = torch.randn(100)
    noise = TensorDataset(torch.randn(100, 10), (targets - targets.mean()) / targets.std())
    assert min(kfold.cross_validate(0.0, noise)) > 0.9
    *_, state = kfold.epochs(0.0, noise, 40)
    assert float(lk.evaluate(kfold.step, state, [noise[:]])["loss"]) < 0.4
