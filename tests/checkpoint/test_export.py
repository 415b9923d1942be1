"""Weights by themselves."""

from collections import OrderedDict

import loopkit as lk
import pytest
import safetensors.torch
import torch
from torch import nn

from trainings import digest, make_model, make_state, train


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, *, tie=True):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        if tie:
            self.second.weight = self.first.weight


def weights(model):
    return digest(dict(model.state_dict()))


def test_what_is_exported_is_loaded(tmp_path):
    """A state's model, with its plain keys, by this library and by safetensors'."""
    state = train(make_state(), 2)
    path = lk.export(state, tmp_path / "models" / "model.safetensors")
    model = make_model()
    report = lk.load_weights(model, path)
    assert str(report) == "9 loaded"
    assert weights(model) == weights(state.model)
    assert sorted(safetensors.torch.load_file(path)) == sorted(state.model.state_dict())


def test_a_checkpoint_is_a_place_for_weights_as_well(tmp_path):
    """load_weights takes a checkpoint's folder, and checks it."""
    state = train(make_state(), 2)
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
    model = make_model()
    lk.load_weights(model, checkpoints.latest.path)
    assert weights(model) == weights(state.model)
    (checkpoints.latest.path / "rng.safetensors").write_bytes(b"")
    with pytest.raises(lk.DamageError):
        lk.load_weights(model, checkpoints.latest.path)


def test_within_averages_the_averages_are_exported(tmp_path):
    """`with ema_weights(state)` exports what the model computes with there."""
    state = train(make_state(), 3, "ema")
    with lk.ema_weights(state):
        inside = weights(state.model)
        path = lk.export(state, tmp_path / "ema.safetensors")
    model = make_model()
    lk.load_weights(model, path)
    assert weights(model) == inside != weights(state.model)


def test_tied_weights_are_written_once_and_loaded_under_both_names(tmp_path):
    """Also into a model that does not tie them, and from a file that does not name the second."""
    model = Tied()
    path = lk.export(model, tmp_path / "tied.safetensors")
    assert sorted(safetensors.torch.load_file(path)) == [
        "first.bias",
        "first.weight",
        "second.bias",
    ]
    for other in (Tied(), Tied(tie=False)):
        assert len(lk.load_weights(other, path).loaded) == 4
        assert weights(other) == weights(model)
    bare = {k: v for k, v in model.state_dict().items() if k != "second.weight"}
    safetensors.torch.save_file(bare, tmp_path / "bare.safetensors")
    lk.load_weights(other := Tied(), tmp_path / "bare.safetensors")
    assert weights(other) == weights(model)
    with pytest.raises(lk.CheckpointError, match=r"1 missing in the file: second\.weight"):
        lk.load_weights(Tied(tie=False), tmp_path / "bare.safetensors")


def test_what_does_not_fit_is_reported_and_nothing_loaded(tmp_path):
    """Missing, unexpected and mismatched names, in a report; never silently random weights."""
    path = lk.export(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), tmp_path / "a.safetensors")
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    before = weights(model)
    with pytest.raises(lk.CheckpointError) as caught:
        lk.load_weights(model, path)
    assert "2 missing in the file: 2.weight, 2.bias" in str(caught.value)
    assert "2 of another shape: 1.weight, 1.bias" in str(caught.value)
    assert weights(model) == before
    report = lk.load_weights(model, path, strict=False)
    assert report.loaded == ("0.weight", "0.bias")
    assert report.missing == ("2.weight", "2.bias")
    assert report.mismatched == ("1.weight", "1.bias")
    assert weights(model) != before


def test_a_prefix_is_found_and_named(tmp_path):
    """Keys of a wrapped model say which prefix to leave away."""
    model = nn.Linear(2, 1)
    wrapped = nn.ModuleDict({"module": model})
    path = lk.export(wrapped, tmp_path / "wrapped.safetensors")
    with pytest.raises(lk.CheckpointError, match=r"prefix='module\.'"):
        lk.load_weights(nn.Linear(2, 1), path)
    lk.load_weights(other := nn.Linear(2, 1), path, prefix="module.")
    assert weights(other) == weights(model)


def test_many_names_are_counted(tmp_path):
    """A report of a large model stays readable."""
    path = lk.export(nn.Linear(1, 1), tmp_path / "a.safetensors")
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(50)])
    report = str(lk.load_weights(model, path, strict=False))
    assert (
        "100 missing in the file: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 95 more"
        in report
    )


def test_a_file_that_is_none_is_refused(tmp_path):
    """Pickles, empty files and files that are not there."""
    torch.save({}, tmp_path / "model.pt")
    (tmp_path / "empty.safetensors").touch()
    for name in ["model.pt", "empty.safetensors"]:
        with pytest.raises(lk.CheckpointError, match="no safetensors file"):
            lk.load_weights(nn.Linear(1, 1), tmp_path / name)
    with pytest.raises((lk.CheckpointError, FileNotFoundError)):
        lk.load_weights(nn.Linear(1, 1), tmp_path / "missing.safetensors")


def test_a_model_with_more_than_tensors_is_not_exported(tmp_path):
    """An extra state has no place in a file of weights."""
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.eye(2).to_sparse())
    with pytest.raises(lk.UsageError):
        lk.export(model, tmp_path / "a.safetensors")
    assert [*tmp_path.iterdir()] == []


def adapted(*, frozen=("first",), seed=0):
    """A state of a model, some layers of which are frozen."""
    torch.manual_seed(seed)
    layers = {name: nn.Linear(3, 3) for name in ("first", "second")}
    model = nn.Sequential(OrderedDict(**layers, norm=nn.BatchNorm1d(3)))
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return lk.TrainState(model, torch.optim.Adam(trained, lr=0.1))


def step(state, batch):
    return state.model(batch).square().mean()


BATCHES = list(torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1)))
ADAPTERS = lk.CheckpointOptions(frozen=False)


def test_without_frozen_weights_a_run_goes_on_as_it_would_have(tmp_path):
    """A checkpoint has none of them; beside the same ones the rest resumes bit for bit."""
    whole = lk.run(step, adapted(), BATCHES, max_epochs=1).finish()
    with lk.Checkpointer(tmp_path, options=ADAPTERS, async_save=False) as checkpoints:
        checkpoints.save(lk.run(step, adapted(), BATCHES, max_steps=3).finish())
    saved = safetensors.torch.load_file(checkpoints.latest.path / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"second", "norm"}
    assert "norm.running_mean" in saved  # which changes, though it is no parameter
    resumed = adapted()
    resumed.model.second.weight.data.zero_()
    assert lk.Checkpointer(tmp_path).restore(resumed)  # says itself what it has not
    lk.run(step, resumed, BATCHES, max_epochs=1).finish()
    assert weights(resumed.model) == weights(whole.model)


def test_frozen_weights_that_were_left_out_keep_their_values(tmp_path):
    """What another model has in their place stays there."""
    with lk.Checkpointer(tmp_path, options=ADAPTERS) as checkpoints:
        state, other = adapted(), adapted(seed=5)
        first, second = other.model.first.weight.clone(), state.model.second.weight
        checkpoints.save(state)
        assert checkpoints.restore(other)
    assert torch.equal(other.model.first.weight, first)
    assert torch.equal(other.model.second.weight, second)
    assert not other.model.first.weight.requires_grad


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (lambda: adapted(frozen=()), "first.weight, first.bias left out .* trained in the state"),
        (make_state, "first.weight, first.bias left out .* not in the state"),
    ],
)
def test_weights_that_were_left_out_have_to_be_frozen_where_they_go(tmp_path, other, found):
    """A model that trains them, or has none of them, is refused and stays as it was."""
    with lk.Checkpointer(tmp_path, options=ADAPTERS) as checkpoints:
        checkpoints.save(adapted())
        state = other()
        before = weights(state.model)
        with pytest.raises(lk.CheckpointError, match=found):
            checkpoints.restore(state)
    assert weights(state.model) == before


def test_a_whole_checkpoint_lacks_no_weight_for_being_frozen(tmp_path):
    """A frozen layer that came later is no part of what was saved, and that is an error."""
    with lk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(adapted(frozen=()))
        state = adapted()
        state.model.add_module("more", nn.Linear(3, 3).requires_grad_(False))
        with pytest.raises(lk.CheckpointError, match=r"more\.bias in the state, not in"):
            checkpoints.restore(state)


def test_adapters_are_exported_alone(tmp_path):
    """frozen=False leaves out what needs no gradient; loading reports what was missing."""
    state = adapted()
    path = lk.export(state, tmp_path / "adapters.safetensors", frozen=False)
    assert {n.split(".")[0] for n in safetensors.torch.load_file(path)} == {"second", "norm"}
    report = lk.load_weights(adapted(seed=5).model, path, strict=False)
    assert report.missing == ("first.weight", "first.bias")
    with pytest.raises(lk.CheckpointError, match="2 missing in the file"):
        lk.load_weights(adapted().model, path)
