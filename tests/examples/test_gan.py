"""The GAN draws digits, and one state saves both of its networks."""

import loopkit as lk
import torch

import gan


def test_its_drawings_teach_to_read_real_digits(tmp_path, capsys):
    """After 210 updates a reader of drawn digits alone is far above chance, and no two are alike."""
    path = tmp_path / "deep" / "samples.png"
    score = gan.main(["--epochs", "10", "--picture", str(path)])
    assert score["read"] > 0.5
    assert score["variety"] > 0.25
    assert str(path) in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def both():
    """The states of critic and generator, the first among the extras of the second."""
    torch.manual_seed(0)
    critic, generator = gan.Critic(), gan.Generator()
    c = lk.TrainState(critic, gan.adam(critic))
    return c, lk.TrainState(generator, gan.adam(generator), critic=c)


def play(c, g, rounds):
    """Some rounds of the game, on random images."""
    improve = lk.train_step(gan.critic_step)
    for _ in range(rounds):
        labels = torch.arange(8)
        drawn = g.model(gan.noise(8), labels).detach()
        c = improve(c, (torch.rand(8, 64), drawn, labels))
        g = gan.generator_step(g, (torch.rand(8, 64), gan.noise(8), labels))
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
