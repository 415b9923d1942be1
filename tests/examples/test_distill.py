"""The student reads what it was never shown, if a teacher taught it."""

import distill


def test_only_the_distilled_student_reads_the_unseen_digit(tmp_path, capsys, monkeypatch):
    """Without a 3 among the images, labels teach no 3; the teacher teaches some."""
    monkeypatch.setattr(distill, "TEACHER_EPOCHS", 6)
    monkeypatch.setattr(distill, "EPOCHS", 30)
    path = tmp_path / "deep" / "accuracy.png"
    scores = distill.main(path)
    assert scores["teacher"]["all digits"] > 0.95
    assert scores["labels"]["the 3s"] == 0
    assert scores["distilled"]["the 3s"] > 0.2
    assert scores["distilled"]["all digits"] > scores["labels"]["all digits"]
    assert "distilled" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_students_are_never_shown_the_digit():
    """The images that students learn from hold no 3; the others hold some."""
    without, everything, test = distill.digits()
    assert (without.tensors[1] != distill.UNSEEN).all()
    assert (everything.tensors[1] == distill.UNSEEN).any()
    assert (test.tensors[1] == distill.UNSEEN).any()
