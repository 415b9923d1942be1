"""The towers find halves that belong together, and on several ranks see all negatives."""

import loopkit as lk
import torch
from torch.nn import functional as F

import contrastive
from pool import POOL


def test_halves_find_each_other(tmp_path, capsys, monkeypatch):
    """After 200 updates a third of 400 unseen halves have their own among five, not 1.25 %."""
    monkeypatch.setattr(contrastive, "EPOCHS", 20)
    path = tmp_path / "deep" / "pairs.png"
    scores = contrastive.main(path)
    assert scores[5] > 0.33
    assert scores[1] < scores[5] < scores[20]
    assert str(path) in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def halves(start, stop):
    """Some of the images to learn from."""
    return contrastive.halves()[0][start:stop]


def towers():
    """The same each time, with nothing that is random or shared by the images of a batch."""
    torch.manual_seed(0)
    model = contrastive.Towers()
    for tower in (model.upper, model.lower):
        tower.eval()
    return model


def work(expected, loss, path):
    """What each of two ranks does: it has the gradient of the whole batch, and the same loss."""
    contrastive.EPOCHS = 1
    scores = contrastive.main(path)
    model = towers()
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0))
    data = [halves(0, 6), halves(6, 12)]
    lk.run(contrastive.train_step, state, data, max_steps=1).finish()
    found = [*state.gradients(), state.metrics["InfoNCE"]]
    torch.testing.assert_close(found, [*expected, loss], rtol=1e-3, atol=1e-6)
    return scores


def test_two_ranks_give_the_gradient_of_the_one_big_batch(tmp_path):
    """Negatives come from all ranks, what ranks average is exact, and one of them draws."""
    model = towers()
    upper, lower = model(*halves(0, 12))
    likeness, own = upper @ lower.T, torch.arange(12)
    loss = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    expected = [p.grad for p in model.parameters()]
    path = tmp_path / "pairs.png"
    first, second = POOL.run(2, work, expected, loss.detach(), path)
    assert first == second
    assert path.exists()
