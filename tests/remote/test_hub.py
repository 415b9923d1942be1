"""Uploads by Hugging Face's own client, to a hub on this machine that answers as theirs does."""

import textwrap

import pytest
import torch
from safetensors.torch import load

from hub import TOKEN, local_hub, run_beside

pytest.importorskip("huggingface_hub")

TRAINED = """
    import loopkit as lk, torch
    from huggingface_hub import HfApi
    from pathlib import Path

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    state = lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = [torch.randn(5, 4) for _ in range(4)]
    step = lambda state, x: state.model(x).square().mean()
"""
AT_THE_END = (
    TRAINED
    + """
    state = lk.run(step, state, data, max_epochs=2).finish()
    hub = HfApi()
    hub.create_repo("me/digits", exist_ok=True)
    lk.export(state, "runs/hub/model.safetensors")
    Path("runs/hub/README.md").write_text("# Digits")
    hub.upload_folder(repo_id="me/digits", folder_path="runs/hub", commit_message="trained")
    torch.save(model.state_dict(), "weights.pt")
"""
)


def script(code):
    return textwrap.dedent(code)


def test_the_bytes_of_an_export_arrive(tmp_path):
    """Weights and card are in the repository, byte for byte, as one commit with its message."""
    with local_hub() as hub:
        done = run_beside(hub, script(AT_THE_END), tmp_path)
    assert done.returncode == 0, done.stderr
    files = hub.repos["me/digits"]
    assert {*files} == {"model.safetensors", "README.md"}
    assert files["README.md"] == b"# Digits"
    assert files["model.safetensors"] == (tmp_path / "runs/hub/model.safetensors").read_bytes()
    assert hub.commits == ["trained"]
    weights, wanted = load(files["model.safetensors"]), torch.load(tmp_path / "weights.pt")
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    kinds = [path.split("/")[-1] for command, path in hub.asked if command == "POST"]
    assert "batch" in kinds  # the weights went as a large file
    for path in (tmp_path / "runs").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()


def test_what_was_uploaded_is_downloaded_into_another_model(tmp_path):
    """`hf_hub_download` and `load_weights` give a model of random weights those of the hub."""
    again = """
    other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    print(lk.load_weights(other, HfApi().hf_hub_download("me/digits", "model.safetensors")))
    wanted = torch.load("weights.pt")
    assert all(torch.equal(other.state_dict()[name], wanted[name]) for name in wanted)
    """
    with local_hub() as hub:
        run_beside(hub, script(AT_THE_END), tmp_path)
        done = run_beside(hub, script(TRAINED + again), tmp_path)
    assert (done.returncode, done.stdout) == (0, "4 loaded\n"), done.stderr


def test_uploads_go_on_behind_a_training(tmp_path):
    """`run_as_future` in the loop's body: a commit for each, in order, with the weights of then."""
    every_epoch = """
    hub, uploads = HfApi(), []
    hub.create_repo("me/digits", exist_ok=True)
    for state in lk.run(step, state, data, max_epochs=3):
        if state.epoch_end:
            path = lk.export(state, f"runs/hub/epoch-{state.epoch}.safetensors")
            uploads.append(hub.upload_file(
                path_or_fileobj=path, path_in_repo="model.safetensors", repo_id="me/digits",
                commit_message=f"epoch {state.epoch}", run_as_future=True,
            ))
    for upload in uploads:
        upload.result()
    """
    with local_hub() as hub:
        done = run_beside(hub, script(TRAINED + every_epoch), tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.commits == ["epoch 0", "epoch 1", "epoch 2"]
    last = (tmp_path / "runs/hub/epoch-2.safetensors").read_bytes()
    assert hub.repos["me/digits"]["model.safetensors"] == last
    assert len(hub.objects) == 3


def test_a_token_that_is_wrong_is_the_clients_own_error(tmp_path):
    """401 comes through as such, and the export stays on disk for another try."""
    with local_hub() as hub:
        done = run_beside(hub, script(AT_THE_END), tmp_path, token="hf_" + "x" * 32)
    assert done.returncode == 1
    assert "401" in done.stderr
    assert hub.repos == {}


def test_the_mixin_uploads_what_save_pretrained_writes(tmp_path):
    """A model of one's own with huggingface_hub's mixin: settings and weights, and back."""
    mixin = """
    import loopkit as lk, torch
    from huggingface_hub import PyTorchModelHubMixin

    class Net(torch.nn.Module, PyTorchModelHubMixin):
        def __init__(self, width=16):
            super().__init__()
            self.layer = torch.nn.Linear(4, width)
        def forward(self, x):
            return self.layer(x)

    net = Net(width=5)
    state = lk.TrainState(net, torch.optim.SGD(net.parameters(), lr=0.1))
    lk.run(lambda s, x: s.model(x).mean(), state, [torch.ones(2, 4)], max_steps=3).finish()
    net.push_to_hub("me/net")
    again = Net.from_pretrained("me/net")
    assert torch.equal(again.layer.weight, net.layer.weight) and again is not net
    """
    with local_hub() as hub:
        done = run_beside(hub, script(mixin), tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors"} <= {*hub.repos["me/net"]}
    assert b'"width": 5' in hub.repos["me/net"]["config.json"]
