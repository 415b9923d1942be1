"""A curriculum that a network makes for itself keeps wrong labels out."""

import curriculum


def test_it_leaves_wrong_labels_out(monkeypatch, tmp_path, capsys):
    """After twelve epochs less than 3 % of what is taken is wrong, and more digits are right."""
    monkeypatch.setattr(curriculum, "EPOCHS", 12)
    monkeypatch.setattr(curriculum, "SHRINK", 6)
    picture = tmp_path / "deep" / "curriculum.png"
    found = curriculum.main(picture)
    (right, wrong), (_, mistaken) = found["self_paced"], found["everything"]
    assert right[-1] > 0.9
    assert mistaken[-1] > 0.35
    assert wrong[-1] < 0.03
    assert "self paced" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
