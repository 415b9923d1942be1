"""Whether a model mixes the samples of a batch, and what its output looks like."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.debug.findings import Finding, note, ok, wrong
from loopkit.modes import eval_modes
from loopkit.nested import leaves_of, map_tensors
from loopkit.state import TrainState
from loopkit.step import Step

ABOUT = "samples"


@attrs.define
class Probe:
    """What goes into a model and comes out, at the first call of a forward pass.

    Attributes:
        samples: Samples in the batch.
        sources: Tensors that the output is differentiated by: inputs, and embeddings of them.
        output: The first float tensor of the model's output that has a row for each sample.
    """

    samples: int
    sources: list[Tensor] = attrs.field(factory=list)
    output: Tensor | None = None

    def _has_rows(self, leaf: object) -> bool:
        return (
            isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and leaf.ndim > 0
            and leaf.shape[0] == self.samples
        )

    def _source(self, leaf: Any) -> Any:
        if not self._has_rows(leaf):
            return leaf
        self.sources.append(leaf.detach().clone().requires_grad_())
        return self.sources[-1]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """Give the model inputs that can be differentiated by."""
        if self.output is not None:
            return None
        return map_tensors(self._source, args), map_tensors(self._source, kwargs)

    def embed(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        """Note what an embedding made of tokens, which cannot be differentiated by."""
        if self.output is None and self._has_rows(output):
            self.sources.append(output if output.requires_grad else output.requires_grad_())

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        """Note what the model made."""
        if self.output is None:
            self.output = next((leaf for leaf in leaves_of(output) if self._has_rows(leaf)), None)


@contextmanager
def _watched(model: nn.Module, probe: Probe) -> Iterator[None]:
    handles = [model.register_forward_pre_hook(probe.enter, with_kwargs=True)]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles += [module.register_forward_hook(probe.embed) for module in embeddings]
    handles.append(model.register_forward_hook(probe.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe(step: Step, state: TrainState, batch: Any, samples: int) -> Probe:
    """Run the forward pass in eval mode, and note what went into the model and came out."""
    found = Probe(samples)
    with eval_modes(state), torch.enable_grad(), _watched(state.model, found):
        step.forward(state, batch)
    return found


def check_mixing(found: Probe) -> Finding:
    """Whether the output for one sample depends on another: its gradient there is not zero."""
    if found.samples < 2:
        return note(ABOUT, "one sample in the batch: nothing to mix; give more to find out")
    if found.output is None or not found.sources or not found.output.requires_grad:
        return note(ABOUT, "the model's inputs or output have no row for each sample to look at")
    one = found.samples // 2
    row = found.output[one]
    weights = torch.linspace(0.5, 1.5, max(1, row.numel()), dtype=row.dtype, device=row.device)
    try:
        gradients = torch.autograd.grad(
            (row.flatten() * weights).sum(), found.sources, allow_unused=True
        )
    except RuntimeError as error:  # cuDNN's RNNs have no backward pass in eval mode
        return note(ABOUT, f"no gradient in eval mode: {str(error).splitlines()[0]:.80}")
    reached: set[int] = set()
    for gradient in gradients:
        if gradient is not None:
            sizes = gradient.reshape(found.samples, -1).abs().amax(dim=1)
            reached |= {*sizes.nonzero().flatten().tolist()}
    if not reached:
        return note(ABOUT, f"the output for sample {one} has no gradient at any input")
    if others := sorted(reached - {one}):
        return wrong(
            ABOUT,
            f"the output for sample {one} depends on {len(others)} others (such as"
            f" {', '.join(map(str, others[:3]))}) in eval mode: look for a view, reshape, mean"
            " or softmax over the batch dimension",
        )
    return ok(ABOUT, f"not mixed: the output for sample {one} depends on no other, in eval mode")


def classes_of(found: Probe, batch: Any) -> int | None:
    """Number of classes, if the output has a number for each class of integer labels."""
    if found.output is None or found.output.ndim < 2:
        return None
    shape = found.output.shape
    last, middle = (*shape[:-1],), (shape[0], *shape[2:])
    longer = (*last[:-1], last[-1] + 1)  # tokens, of which the first is no label
    for leaf in leaves_of(batch):
        if isinstance(leaf, Tensor) and leaf.dtype == torch.int64 and leaf.numel():
            for count, places in ((shape[1], middle), (shape[-1], last), (shape[-1], longer)):
                if count > 1 and leaf.shape == places and int(leaf.max()) < count:
                    return int(count)
    return None
