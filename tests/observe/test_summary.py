"""The summary: shapes, parameters and FLOPs, and a model that is as it was."""

import loopkit as lk
import pytest
import torch
from torch import nn

from problems import Tied, make_state


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
        )
        self.head = nn.Linear(8, 10)

    def forward(self, images, scale=1.0):
        return {"logits": self.head(self.body(images).mean((2, 3))) * scale}


IMAGES = torch.zeros(2, 3, 16, 16)


def by_name(summary):
    return {row.name: row for row in summary.rows}


def test_shapes_parameters_and_flops_are_right():
    """As reckoned by hand: 2 N H W C_out C_in k^2 for the convolution, 2 N m n after it."""
    net = Net()
    net.body[1].requires_grad_(False)
    rows = by_name(found := lk.summary(net, IMAGES))
    assert [*rows] == [name for name, _ in net.named_modules()]
    assert rows["body.0"].shape == (2, 8, 16, 16)
    assert rows[""].shape == (2, 10)  # the first tensor of the mapping
    conv, linear = 2 * 2 * 16 * 16 * 8 * 3 * 9, 2 * 2 * 8 * 10
    assert (rows["body.0"].flops, rows["body"].flops, rows["head"].flops) == (conv, conv, linear)
    assert found.flops == conv + linear
    assert found.parameters == sum(p.numel() for p in net.parameters()) == 216 + 16 + 90
    assert found.trainable == 216 + 90
    assert (rows["body.1"].parameters, rows["body.1"].trainable) == (16, 0)


def test_shared_parameters_count_once():
    """A tied weight is one parameter of the model, though two layers have it."""
    model = Tied()
    assert lk.summary(model).parameters == sum(p.numel() for p in model.parameters())


def test_attention_is_counted():
    """A transformer layer: projections, scores, values and the two layers after, by hand."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    found = lk.summary(layer, torch.zeros(2, 16, 64))
    tokens = 2 * 16
    linear = 2 * tokens * 64 * (3 * 64 + 64 + 2 * 128)
    attention = 2 * 2 * 2 * 16 * 16 * 64  # queries with keys, scores with values
    assert found.flops == linear + attention
    assert by_name(found)["linear1"].shape == (2, 16, 128)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_model_is_left_as_it_was():
    """Modes, one by one, gradients, buffers, hooks and random numbers are untouched."""
    net = Net().train()
    net.body[1].eval()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, rng = [m.training for m in net.modules()], torch.get_rng_state()
    lk.summary(net, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert net.body[0].weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_forward_that_fails_leaves_no_hooks():
    """Also then the model is as it was."""
    net = Net()
    with pytest.raises(RuntimeError):
        lk.summary(net, torch.zeros(2, 5, 16, 16))
    assert not any(m._forward_hooks for m in net.modules())
    assert net.training


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES, 2.0), {"images": IMAGES, "scale": 2.0}])
def test_a_batch_is_what_the_model_takes(batch):
    """A tensor, a tuple of arguments, or named ones."""
    assert by_name(lk.summary(Net(), batch))["head"].shape == (2, 10)


def test_the_table_fits_80_columns_and_says_what_is_not_trained():
    """Each layer has its line up to the depth, with its counts."""
    net = Net()
    net.body.requires_grad_(False)
    lines = str(lk.summary(net, IMAGES, depth=1)).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines[2:5]] == ["Net", "body", "head"]
    assert "232*" in lines[3]
    assert lines[-1].startswith("322 parameters, 90 trained")
    assert "* not trained" in lines[-1]


def test_without_a_batch_there_are_parameters_only():
    """No shapes, no FLOPs, and no forward pass; a state will do, too."""
    found = lk.summary(make_state())
    assert (found.flops, found.rows[0].shape) == (None, None)
    assert found.parameters == 51


def test_parameters_without_a_shape_are_an_error_that_teaches():
    """A lazy layer must have seen a batch."""
    with pytest.raises(lk.UsageError, match="called once"):
        lk.summary(nn.Sequential(nn.LazyLinear(3)), torch.zeros(2, 4))
    with pytest.raises(lk.UsageError, match="Module"):
        lk.summary(3)
