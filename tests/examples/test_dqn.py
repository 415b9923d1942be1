"""DQN learns, and goes on bit for bit with buffer, target and episode where it was stopped."""

import pytest

from trainings import digest_of

pytest.importorskip("gymnasium", reason="of the extra examples-all")
import dqn


@pytest.fixture
def short(monkeypatch):
    """A training that takes seconds."""
    for name, value in {"STEPS": 8_000, "TEST_EVERY": 1_000, "WARM": 500}.items():
        monkeypatch.setattr(dqn, name, value)


def test_stopped_and_gone_on_with_it_is_the_uninterrupted_training(short, tmp_path):
    """Whatever it is made of is equal bit for bit, the replay buffer included."""
    whole = dqn.train(tmp_path / "whole", until=2_000)
    for until in (1_000, 2_000):
        state = dqn.train(tmp_path / "cut", until=until)
    assert whole.step == 750
    assert digest_of(state) == digest_of(whole)


def test_it_learns_and_shows_its_best(short, monkeypatch, tmp_path, capsys):
    """The best of eight tries balances for more than 150 steps; chance gets 22."""
    monkeypatch.setattr("sys.argv", ["dqn.py", "--runs", str(tmp_path)])
    dqn.main()
    assert float(capsys.readouterr().out.rsplit(": ", 1)[1]) > 150
    assert (tmp_path / "dqn.png").read_bytes().startswith(b"\x89PNG")
