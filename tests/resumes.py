"""Trainings that are cut, saved and gone on with, in every way, on one process and on several."""

import gc
import os
import random
import warnings

import attrs
import loopkit as lk
import numpy as np
import torch
from loopkit.nested import map_tensors
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from trainings import digest

COUNT, SIZE, EPOCHS, OVERFLOWS = 44, 4, 2, 8


class Samples(Dataset):
    """Numbered samples with random augmentation from every generator."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        noise = torch.randn(4) + random.random() + np.random.rand()
        return torch.full((4,), index / COUNT) + 0.1 * noise, index


class Stream(IterableDataset):
    """Samples without numbers or a length; workers, and ranks if asked to, share them.

    There are as many for each: what a rank computes on fillers has no weight, but new noise.

    Args:
        by_rank: Whether each rank has its own.
    """

    def __init__(self, by_rank=False):
        self.by_rank, self.epoch = by_rank, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        ranks = int(os.environ.get("WORLD_SIZE", "1")) if self.by_rank else 1
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = int(os.environ.get("RANK", "0")) % ranks + ranks * worker
        for index in range(first, COUNT + SIZE, ranks * workers):
            own = random.Random(f"{self.epoch} {index}").random()
            yield torch.full((4,), index / COUNT) + 0.1 * own + 0.1 * torch.randn(4), index


def loader(dataset, workers, kind=DataLoader, **settings):
    if workers:
        gc.collect()  # here: a worker that did it at its very start would hang on a DDP of before
        # Ranks that were spawned would spawn their workers, which takes seconds
        settings |= {"multiprocessing_context": "fork", "timeout": 60}
    return kind(dataset, SIZE, num_workers=workers, **settings)


def stateful(dataset, workers, **settings):
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():  # of torchdata 0.11 on torch 2.13
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return loader(dataset, workers, StatefulDataLoader, **settings)


DATA = {
    "shuffled": lambda workers: loader(lk.seeded(Samples(), seed=3), workers, shuffle=True),
    "iterable": lambda workers: loader(Stream(), workers),
    "stateful": lambda workers: stateful(lk.seeded(Samples(), seed=3), workers, shuffle=True),
    "iterable of each rank": lambda workers: loader(Stream(True), workers),
    "stateful of each rank": lambda workers: stateful(Stream(True), workers),
}
STREAMS = {
    "iterable": "split",
    "iterable of each rank": "sharded",
    "stateful of each rank": "sharded",
}


class Noting:
    """A step function that notes what it is given, and what dropout makes of it.

    Args:
        overflows: A sample whose gradient no half precision number can hold.
    """

    def __init__(self, overflows=None):
        self.overflows, self.seen = overflows, []

    def __call__(self, state, batch):
        inputs, indices = batch
        logits = state.model(inputs)
        self.seen.append((indices.tolist(), digest(inputs), digest(logits)))
        loss = F.cross_entropy(logits.float(), indices % 3)
        return loss * (1e30 if self.overflows in indices.tolist() else 1.0)


def eval_step(state, batch):
    """A loss; and random numbers, which the training must not notice."""
    torch.rand(3), random.random()
    return {"loss": state.model(batch).square().mean()}


def save(state, checkpoints):
    """Nothing but that."""
    checkpoints.save(state)


def evaluate_and_save(state, checkpoints):
    """An evaluation, and what it gave."""
    held_out = [torch.full((3, 4), float(i)) for i in range(5)]
    checkpoints.save(state, lk.evaluate(eval_step, state, held_out))


def save_within_averages(state, checkpoints):
    """A save with the averages in the model's place."""
    with lk.ema_weights(state):
        checkpoints.save(state)


MIDST = (lambda state: state.step == 2,)
CUTS = {
    "mid-epoch": (MIDST, save),
    "epoch end": ((lambda state: state.epoch_end,), save),
    "after evaluate": (MIDST, evaluate_and_save),
    "inside averages": (MIDST, save_within_averages),
    "fp16, after a skipped update": ((lambda state: not state.applied,), save),
    "twice": ((lambda s: s.step == 1, lambda s: s.step == 2, lambda s: s.epoch == 1), save),
}


@attrs.frozen
class Cell:
    """One cell of the table of resumes.

    Attributes:
        cut: Where the run is cut; a key of `CUTS`.
        workers: Of its loader.
        data: A key of `DATA`.
        strategy: How it is spread over ranks; None for one process.
    """

    cut: str
    workers: int
    data: str
    strategy: str | None = None

    @property
    def fp16(self):
        return self.cut.startswith("fp16")

    @property
    def uncut(self):
        """What tells the runs apart that this one may be compared with."""
        return self.fp16, self.workers, self.data, self.strategy


def decorated(cell, noting):
    """A step with as much state as there is."""
    decorators = [lk.with_ema(0.8), lk.with_clip(0.3), lk.with_grad_accum(2)]
    decorators.append(lk.with_schedule(lr=lambda n: 0.02 * 0.9**n))
    if cell.fp16:
        decorators.append(lk.with_amp("fp16"))
    if cell.strategy is not None:
        decorators.append(lk.distributed(cell.strategy, stream=STREAMS.get(cell.data)))
    return lk.compose(*decorators)(noting)


def make_state():
    """As a script makes it: with the same seed in each of its lives."""
    lk.seed_everything(3)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    return lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))


def parts_of(state):
    """A digest of each part of a state, with this rank's own part of each tensor."""
    parts = state.state_dict()
    del parts["data"]  # how it came to where it is may differ; what comes next may not
    if state.ranks.shards_tensors and state.ranks.rank:  # FSDP: statistics are each rank's own,
        for name, _ in state.model.named_buffers():  # and those of the first one are saved
            del parts["model"][name]

    def local(tensor):
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    return {name: digest(map_tensors(local, part)) for name, part in parts.items()}


def uncut(cell):
    """The run that nobody stops: its parts at the end, and what it saw."""
    noting = Noting(OVERFLOWS if cell.fp16 else None)
    state, data, skipped = make_state(), DATA[cell.data](cell.workers), 0
    for state in lk.run(decorated(cell, noting), state, data, max_epochs=EPOCHS):
        skipped += not state.applied
    assert (skipped > 0) == cell.fp16
    return parts_of(state), noting.seen


def gone_on(cell, folder):
    """The same, of a run that is cut, saved, and restored in another life, as often as is said."""
    (stops, leave), seen = CUTS[cell.cut], []
    for life, stop in enumerate([*stops, lambda state: False]):
        noting = Noting(OVERFLOWS if cell.fp16 else None)
        state, data = make_state(), DATA[cell.data](cell.workers)
        if life:
            torch.rand(7), random.random(), np.random.rand()  # whatever a script may draw
        with lk.Checkpointer(folder) as checkpoints:
            assert checkpoints.restore(state) == bool(life)
            for state in lk.run(decorated(cell, noting), state, data, max_epochs=EPOCHS):
                if stop(state):
                    leave(state, checkpoints)
                    break
            else:
                assert life == len(stops), "the run was to be cut"
        state.ranks.agree(False)  # all wait until the first one has it on disk
        seen += noting.seen
    return parts_of(state), seen


def differences(whole, found):
    """What is not the same, bit for bit, in the endings of two runs; nothing at best."""
    different = [name for name in whole[0] if whole[0][name] != found[0][name]]
    pairs = [*zip(whole[1], found[1], strict=False)]
    for at, name in enumerate(("samples", "inputs", "outputs of the model")):
        first = next((i for i, (a, b) in enumerate(pairs) if a[at] != b[at]), None)
        if first is not None:
            different.append(f"{name} from batch {first} on")
    if len(whole[1]) != len(found[1]):
        different.append(f"{len(found[1])} batches in place of {len(whole[1])}")
    return different
