"""The same training in six libraries: each ends with the weights of the plain loop."""

import pytest
import side_by_side


@pytest.fixture(scope="module")
def plain():
    return side_by_side.trained("plain_pytorch")


@pytest.mark.parametrize("form", side_by_side.FORMS)
def test_each_form_trains_the_weights_of_the_plain_loop(form, plain):
    """Bit for bit, after 88 updates with clipping, a schedule, shuffling and dropout."""
    pytest.importorskip(side_by_side.FORMS[form])
    model, accuracies = side_by_side.trained(form)
    assert side_by_side.difference(model, plain[0]) == 0
    assert accuracies == pytest.approx(plain[1])
    assert accuracies[-1] > 0.75


def test_the_plain_loop_did_train(plain):
    """Its weights are far from where they began, so that equal weights say something."""
    from task import network

    assert side_by_side.difference(plain[0], network()) > 0.01


def test_the_lines_are_counted_and_printed(capsys, monkeypatch):
    """A row for each form, with its lines; what is not installed is said."""
    few = {"plain_pytorch": "torch", "with_loopkit": "loopkit", "with_ignite": "no_such_package"}
    monkeypatch.setattr(side_by_side, "FORMS", few)
    assert side_by_side.main() == {"plain_pytorch": 0.0, "with_loopkit": 0.0}
    rows = capsys.readouterr().out.splitlines()[1:]
    counts = [int(row.split()[1]) for row in rows]
    assert counts == [side_by_side.lines_of(form) for form in few]
    assert "bit for bit" in rows[1]
    assert "no_such_package is not installed" in rows[2]
    assert 10 < counts[1] <= counts[0]
