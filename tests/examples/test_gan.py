"""The GAN draws digits, and one state saves both of its networks."""

import loopkit as lk
import torch

import gan


def test_its_drawings_teach_to_read_real_digits(tmp_path, capsys, monkeypatch):
    """After 210 updates a reader of drawn digits is far above chance; no kind is drawn once."""
    path = tmp_path / "deep" / "samples.png"
    monkeypatch.setattr(gan, "EPOCHS", 10)
    score = gan.main(path)
    assert score["read"] > 0.6
    assert score["variety"] > 0.08
    assert str(path) in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def both():
    """Both states, from the same weights each time."""
    torch.manual_seed(0)
    return gan.players()


def play(c, g, rounds):
    """Some rounds of the game, on random images."""
    improve = lk.train_step(gan.critic_step)
    for _ in range(rounds):
        real, labels, noise = torch.rand(8, 64), torch.arange(8), torch.randn(2, 8, gan.LATENT)
        c = improve(c, (real, g.model(noise[0], labels).detach(), labels))
        g = gan.generator_step(g, (real, noise[1], labels))
    return g


def test_one_checkpoint_of_the_generator_holds_both(tmp_path):
    """Stopped and resumed from the generator's checkpoint, the game ends at the same weights."""
    unbroken = play(*both(), rounds=4).state_dict()
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(play(*both(), rounds=2))
    c, g = both()
    assert lk.Checkpointer(tmp_path).restore(g)
    assert (c.step, g.step) == (2, 2)
    resumed = play(c, g, rounds=2).state_dict()
    for part in ("model", "features"):
        torch.testing.assert_close(resumed[part], unbroken[part], rtol=0, atol=0)
    critics = [d["extras"]["critic"]["model"] for d in (resumed, unbroken)]
    torch.testing.assert_close(*critics, rtol=0, atol=0)
