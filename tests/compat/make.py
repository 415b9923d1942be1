"""Writes the checkpoint that `test_formats.py` reads, once for each version of the format.

    python tests/compat/make.py

What was written by a release stays as it is: this is run for a new version only.
"""

import shutil
import sys
from pathlib import Path

import loopkit as lk
import torch
from loopkit.checkpoint.manifest import VERSION

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from trainings import digest, make_batches, make_state, noisy  # noqa: E402


def make(seed=0):
    """A state of each kind of thing; its features come with the first update."""
    return make_state(
        seed=seed, note={"a": (1, 2.5, None), 3: [True]}, tensor=torch.arange(3.0), big=2**70
    )


def parts_of(state):
    """The digest of each part; torch may give random states, and we positions, more fields."""
    parts = {name: p for name, p in state.state_dict().items() if name not in {"rng", "data"}}
    parts["optimizer"] = parts["optimizer"]["state"]
    return {name: digest(part)[:16] for name, part in parts.items()}


def save(folder):
    """Train, on two processes with a part of the state each, and save."""
    state = make()
    step = lk.compose(lk.with_ema(0.8), lk.with_grad_accum(2), lk.distributed("fsdp"))(noisy)
    lk.run(step, state, make_batches(), max_steps=3).finish()
    with lk.Checkpointer(folder) as checkpoints:
        checkpoints.save(state, {"loss": 0.25})


def main():
    """Keep the digests of what one process restores beside the checkpoint."""
    folder = HERE / f"format-{VERSION}"
    shutil.rmtree(folder, ignore_errors=True)
    lk.launch(save, 2, folder)
    state = make(seed=5)
    lk.Checkpointer(folder).restore(state)
    lines = [f"{name} {found}" for name, found in parts_of(state).items()]
    (folder / "digests.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
