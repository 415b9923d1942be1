"""Class weights find more of what is rare, and training stops where validation says so."""

import tabular


def test_class_weights_find_more_malignant_tumours(monkeypatch, tmp_path, capsys):
    """Of those put aside most are found, more than without weights; and both are drawn."""
    picture = tmp_path / "deep" / "tabular.png"
    weighted = tabular.main(picture)
    assert f"malignant: {weighted[0, 0]} of 53 found" in capsys.readouterr().out
    assert weighted[0, 0] >= 45
    assert weighted[0, 0] > tabular.train(weighted=False)[2][0, 0]
    assert weighted.sum() == 143
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_it_stops_and_takes_the_best(monkeypatch):
    """The state that comes back is that of the lowest validation loss, `PATIENCE` epochs ago."""
    monkeypatch.setattr(tabular, "PATIENCE", 3)
    best, history, _ = tabular.train()
    losses = [scores["validation/loss"] for scores in history]
    assert losses.index(min(losses)) == best.epoch == len(losses) - 4
