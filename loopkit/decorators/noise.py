"""Noise: on gradients, and on embeddings."""

import functools
import math
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from loopkit.check import positive
from loopkit.compose import Decorator, wrap
from loopkit.errors import UsageError
from loopkit.state import TrainState
from loopkit.types import Forward, Output, Transform

KEPT_AS = "grad_noise"


@attrs.frozen(eq=False)
class Noise:
    """A generator of its own, so that all ranks draw the same, and dropout is left alone."""

    generator: torch.Generator

    def state_dict(self) -> dict[str, Any]:
        """Where the generator is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.generator.set_state(state_dict["generator"].cpu())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Noise":
        return Noise(self.generator.clone_state())

    def like(self, gradient: Tensor) -> Tensor:
        """Normal noise in the shape of the gradient."""
        if type(gradient) is not Tensor:  # a shard: its ranks draw each their own part
            return torch.randn_like(gradient)
        return torch.empty_like(gradient).normal_(generator=self.generator)


@attrs.frozen
class AddNoise:
    """The layer of `with_grad_noise`."""

    inner: Transform
    eta: float
    gamma: float

    def __call__(self, state: TrainState) -> None:
        """Add noise to the gradients, then go on."""
        noise, deviation = state.features[KEPT_AS], self._deviation(state.step)
        with torch.no_grad():
            for gradient in state.gradients():
                if gradient.is_sparse:
                    _refuse(gradient)
                gradient.add_(noise.like(gradient), alpha=deviation)
        self.inner(state)

    def _deviation(self, update: int) -> float:
        return math.sqrt(self.eta / (1 + update) ** self.gamma)


def _refuse(gradient: Tensor) -> None:
    raise UsageError(
        "with_grad_noise(...)",
        f"a sparse gradient of shape {[*gradient.shape]}",
        "nn.Embedding(..., sparse=False), or no gradient noise",
    )


def _make_noise(state: TrainState, seed: int) -> Noise:
    return Noise(torch.Generator(state.device).manual_seed(seed))


def with_grad_noise(eta: float, gamma: float = 0.55, *, seed: int = 0) -> Decorator:
    """Add Gaussian noise to the gradients, less from update to update.

    `g <- g + N(0, eta / (1 + t)**gamma)`, with t the updates so far (`state.step`) and the
    second argument the variance. It sees the gradients of the mean loss, after loss scales.
    Written inside of `with_clip` the noise is clipped with the gradient, outside it is not.

    Args:
        eta: Variance at the first update; 0.01, 0.3 and 1.0 are the paper's.
        gamma: How fast it falls; 0 for constant noise.
        seed: Of the noise's own generator, the same on all ranks.

    Raises:
        UsageError: If eta is not above 0, gamma is no number of 0 or more, or a gradient is
            sparse.

    Example:
        >>> with_grad_noise(0.3)
        with_grad_noise(0.3, gamma=0.55)

    Source: https://arxiv.org/abs/1511.06807
    """
    name = f"with_grad_noise({eta!r}, gamma={gamma!r}{f', seed={seed!r}' if seed else ''})"
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 <= gamma < math.inf:
        raise UsageError(name, f"gamma = {gamma!r:.60}", "gamma: a number of 0 or more; 0.55")
    layer = functools.partial(AddNoise, eta=positive(name, "eta", eta), gamma=float(gamma))
    return wrap(
        name=name, init={KEPT_AS: functools.partial(_make_noise, seed=seed)}, transform=layer
    )


@attrs.frozen
class NoisyEmbedding:
    """The layer of `with_neftune`."""

    inner: Forward
    alpha: float
    embedding: str | None

    def __call__(self, state: TrainState, batch: Any) -> Output:
        """The step function, with noise on the embedding's output while the model trains."""
        module = _embedding_of(state.model, self.embedding)
        if not module.training:
            return self.inner(state, batch)
        with module.register_forward_hook(functools.partial(_add_uniform, self.alpha)):
            return self.inner(state, batch)


def _add_uniform(alpha: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG001
    """`alpha / sqrt(length * width)`, of one sequence."""
    most = alpha / math.sqrt(max(1, output[0].numel()))
    return output + torch.empty_like(output).uniform_(-most, most)


def _embedding_of(model: nn.Module, name: str | None) -> nn.Module:
    if name is not None:
        try:
            return model.get_submodule(name)
        except AttributeError as error:
            found = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
            raise UsageError(
                f"with_neftune(..., embedding={name!r})", f"no such module: {error}",
                f"the name of a module; embeddings are {found}",
            ) from error  # fmt: skip
    if hasattr(model, "get_input_embeddings"):  # what Transformers' models have
        return model.get_input_embeddings()  # type: ignore[no-any-return, operator]
    found = [n for n, module in model.named_modules() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        raise UsageError(
            "with_neftune(alpha)",
            f"{len(found)} embeddings in {type(model).__name__} {found[:4]}",
            "with_neftune(alpha, embedding=name) with the name of the tokens' one",
        )
    return model.get_submodule(found[0])


@attrs.frozen
class CheckEmbedding:
    """Finds the embedding before the first update, so that a wrong name is told then."""

    embedding: str | None

    def __call__(self, state: TrainState) -> None:
        """Look for it."""
        _embedding_of(state.model, self.embedding)


def with_neftune(alpha: float, *, embedding: str | None = None) -> Decorator:
    """Uniform noise on the embedded tokens while training: noisy embeddings for fine-tuning.

    `x + uniform(-1, 1) * alpha / sqrt(length * width)`, for the output `(batch, length,
    width)` of the embedding. Evaluation, and a model in eval mode, see none.

    Args:
        alpha: How much; the paper has 5, 10 and 15.
        embedding: The module's name; by default what `model.get_input_embeddings()` gives, or
            the model's only `nn.Embedding`.

    Raises:
        UsageError: If alpha is not above 0, or it is not clear which module it is.

    Example:
        >>> with_neftune(5)
        with_neftune(5)

    Source: https://arxiv.org/abs/2310.05914
    """
    name = f"with_neftune({alpha!r}{f', embedding={embedding!r}' if embedding else ''})"
    layer = functools.partial(
        NoisyEmbedding, alpha=positive(name, "alpha", alpha), embedding=embedding
    )
    return wrap(name=name, prepare=CheckEmbedding(embedding), forward=layer)
