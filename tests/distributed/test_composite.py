"""Pipeline and context parallel: torch's own fit the places of a step; to be copied from here."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import attrs
import loopkit as lk
import pytest
import torch
import torch.distributed as dist
from loopkit.testing import train_by_hand
from test_parity import close
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.experimental import context_parallel

from pool import POOL
from problems import halving, make_batches

CHUNKS = 5


@attrs.define
class Objective:
    """What a schedule calls on the last stage, for each chunk: the user's step function."""

    forward: Callable[[Any], Any] | None = None
    share: float = 1.0

    def __call__(self, output, target):
        """The chunk's share of the loss."""
        return self.forward((output, target)) * self.share


@attrs.frozen
class Pipeline:
    """The owner of `gradients`: a schedule of torch's makes them, stage by stage."""

    parts: Any  # what stood in the place: `around`, `forward`, `backward`
    schedule: Any
    objective: Objective

    def __call__(self, state, window):
        """The gradients of a window, each micro-batch in chunks that follow each other."""
        micro_batches, count = window
        outcome, last = state.begin_update(count), dist.get_world_size() - 1
        self.objective.forward = functools.partial(self.parts.forward, state)
        self.objective.share = 1.0 / (count * CHUNKS)
        for inputs, labels in micro_batches:
            losses = []
            if dist.get_rank() == 0:
                self.schedule.step(inputs)
            else:
                self.schedule.step(target=labels, losses=losses)
            loss = torch.stack(losses or [inputs.new_zeros(())]).sum().detach()
            dist.broadcast(loss, last)
            outcome.parts.append((loss * count, None, {}))
            outcome.samples += len(labels)


def layers():
    torch.manual_seed(0)
    made = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*made).to(torch.float64)


def last_stage(state, batch):
    """The step function sees what the last stage made, and the labels."""
    logits, labels = batch
    return nn.functional.cross_entropy(logits, labels)


def piped(kind, accumulate, data):
    dist.init_process_group("gloo")
    rank, whole = dist.get_rank(), layers()
    part = whole[:2] if rank == 0 else whole[2:]
    stage, objective = PipelineStage(part, rank, 2, torch.device("cpu")), Objective()
    schedule = kind(stage, CHUNKS, loss_fn=objective, scale_grads=False)
    pipeline = functools.partial(Pipeline, schedule=schedule, objective=objective)
    features = [lk.with_schedule(lr=halving), lk.with_ema(0.9), lk.own(gradients=pipeline)]
    features += [lk.with_grad_accum(accumulate)] * (accumulate > 1)
    step = lk.compose(*features)(last_stage)
    state = lk.TrainState(part, torch.optim.AdamW(part.parameters(), lr=0.01))
    losses = [float(state.loss) for state in lk.run(step, state, data, max_epochs=1)]
    names = {id(p): name for name, p in whole.named_parameters()}
    return {names[id(p)]: p.detach().clone() for p in part.parameters()}, losses


def direct(state, batch):
    return nn.functional.cross_entropy(state.model(batch[0]), batch[1])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [ScheduleGPipe, Schedule1F1B])
def test_a_pipeline_owns_the_gradients(kind, accumulate):
    """Stages on two ranks end with the weights of the whole model on one, schedule included."""
    data = make_batches(8, size=10, dtype=torch.float64)
    (first, losses), (second, also) = POOL.run(2, piped, kind, accumulate, data)
    model = layers()
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    hand = train_by_hand(direct, state, data, accumulate=accumulate, lr=halving)
    close(first | second, state.model.state_dict())
    assert losses == also == pytest.approx(hand.losses)


def of_all(tensor, dim):
    """The parts of all ranks, with gradients; what is alone is whole."""
    if not dist.is_initialized():
        return tensor
    return all_gather_tensor_autograd(tensor.contiguous(), dim, dist.group.WORLD)


class Attending(nn.Module):
    """One layer of causal attention, whose keys and values come from all parts of a sequence.

    Torch's own ring, under `scaled_dot_product_attention`, runs on accelerators only.
    """

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 48), nn.Linear(16, 3)

    def forward(self, inputs, positions):
        queries, keys, values = self.qkv(inputs).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        keys, values, others = of_all(keys, 2), of_all(values, 2), of_all(positions, 1)
        later = positions[:, None, :, None] < others[:, None, None, :]
        scores = (queries @ keys.transpose(-1, -2)).masked_fill(later, -float("inf"))
        return self.head((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))


@attrs.frozen
class ContextParallel:
    """A layer of `around`: each rank has its part of the sequences, and attention goes round."""

    inner: Any
    dim: int

    def __call__(self, state, last):
        """The context of a micro-batch, with its backward pass; the batch is sharded in place."""
        mesh = init_device_mesh("cpu", (state.ranks.size,))
        batch = state.window[0][len(state.outcome.parts)]
        stack = ExitStack()
        stack.enter_context(self.inner(state, last))
        stack.enter_context(
            context_parallel(mesh, buffers=[*batch], buffer_seq_dims=[self.dim] * len(batch))
        )
        return stack


def sequence_step(state, batch):
    inputs, positions, labels = batch
    logits = state.model(inputs, positions)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return {"loss": loss, "weight": (labels != -100).sum().item()}


def sequences(count):
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        labels = torch.randint(3, (2, 16), generator=generator)
        labels[0, :5] = -100  # more of them on the first rank
        positions = torch.arange(16).repeat(2, 1)
        made.append((torch.randn(2, 16, 4, generator=generator), positions, labels))
    return made


def attending():
    torch.manual_seed(0)
    model = Attending()
    return lk.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def in_contexts(data):
    step = lk.compose(
        lk.with_clip(0.5),
        lk.wrap(around=functools.partial(ContextParallel, dim=1)),
        lk.distributed(stream="sharded"),
    )(sequence_step)
    state = attending()
    own = [
        [tensor.clone() for tensor in batch] for batch in data
    ]  # processes share a tensor's memory
    [*lk.run(step, state, iter(own), max_epochs=1)]  # the same sequences on each rank
    return state.model.state_dict()


def test_context_parallel_wraps_around():
    """Halves of sequences, of unequal weight, end with the weights of whole ones on one rank."""
    data = sequences(6)
    found = POOL.run(2, in_contexts, data)
    state = attending()
    train_by_hand(sequence_step, state, data, clip=0.5)
    for weights in found:
        for name, value in state.model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
