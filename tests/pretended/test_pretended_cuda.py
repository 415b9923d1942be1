"""Where tensors are, and who waits, in steps on a CUDA device that is only pretended."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux" or torch.cuda.is_available(),
    reason="needs a C++ compiler, and no CUDA device of the machine's own",
)
CASES = [
    "plain", "plain, fused", "bf16", "clip", "clip value", "accumulation",
    "accumulation, weights of the device", "accumulation, weights of the host",
    "accumulation, skip, weights of the host", "averages", "schedule", "skip", "skip and schedule",
    "fp16", "fp16, averages, accumulation", "full", "sam", "micro-batches",
    "micro-batches that fit", "checkpointing", "in backward", "freeze",
    "plain, from the host", "full, from the host", "fp16, from the host",
]  # fmt: skip
ON_DEVICE = ("skip", "fp16", "full")  # what the fused optimizer decides there


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case has come to, by its name."""
    library = tmp_path_factory.mktemp("pretended") / "device.so"
    torch_at = Path(torch.__file__).parent
    build = [COMPILER, "-std=c++20", "-w", "-shared", "-fPIC", f"-I{torch_at / 'include'}"]
    build += [HERE / "device.cpp", "-o", library, f"-L{torch_at / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([*build, f"-Wl,-rpath,{torch_at / 'lib'}"], check=True, timeout=200)
    line = [sys.executable, HERE / "steps.py", library]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    said = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    return {answer.pop("case"): answer for answer in said}


@pytest.mark.parametrize("case", CASES)
def test_no_update_waits_for_the_device(found, case):
    """From the third one on nothing reads a tensor of it, or copies one there and waits."""
    decides = any(word in case for word in ON_DEVICE)
    assert found[case] == {"loss": "cuda:0", "applied": "cuda:0" if decides else "cpu"}


def test_all_cases_are_asked_for(found):
    """Each case of the script is one of those here."""
    assert sorted(found) == sorted([*CASES, "offloaded", "restored"])


def test_averages_that_are_restored_go_on_where_the_weights_are(found):
    """Read from a checkpoint they lie on the host, and a state that has none yet takes them so."""
    assert found["restored"] == {"averages": ["cuda:0"]}


def test_what_fsdp_keeps_on_the_host_is_computed_on_the_device(found):
    """Batches, autocast and random states go by where the model computes.

    A model that lies on the host is no reason to compute there. What a checkpoint is read into is
    the memory of the restored tensor, on the host, not of a copy on the device.
    """
    assert found["offloaded"] == {
        "kinds": ["cuda", "cuda"], "computes": "cuda:0", "parameters": "cpu",
        "restored": "cpu", "filled": True, "taken": "cpu",
    }  # fmt: skip
