"""The towers find halves that belong together, and on several ranks see all negatives."""

import warnings

import loopkit as lk
import torch
from torch import distributed as dist

import contrastive


def test_halves_find_each_other(tmp_path, capsys):
    """After 200 updates a third of 400 unseen halves have their own among five, not 1.25 %."""
    path = tmp_path / "deep" / "pairs.png"
    scores = contrastive.main(["--epochs", "20", "--picture", str(path)])
    assert scores["top 5"] > 0.33
    assert scores["top 1"] < scores["top 5"] < scores["top 20"]
    assert str(path) in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def gradients(rank=0, ranks=1):
    """Of this rank's share of 12 images, in eval mode: nothing random, nothing shared."""
    torch.manual_seed(0)
    model = contrastive.Towers().eval()
    state = lk.TrainState(model)
    upper, lower = contrastive.halves()[0][:12]
    mine = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
    contrastive.train_step.function(state, (upper[mine], lower[mine])).backward()
    return [p.grad for p in model.parameters()]


def work(expected):
    """What each of two ranks does: the mean of both gradients is that of the whole batch."""
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    found = gradients(dist.get_rank(), 2)
    for gradient in found:
        dist.all_reduce(gradient)
    torch.testing.assert_close([g / 2 for g in found], expected, rtol=1e-4, atol=1e-6)


def test_two_ranks_give_the_gradient_of_the_one_big_batch():
    """Negatives come from all ranks with their gradients, so the mean over ranks is exact."""
    lk.launch(work, 2, gradients(), timeout_s=120)
