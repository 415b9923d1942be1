"""Stochastic gradient descent from scratch: momentum, Nesterov, weight decay.

We look for weights w that make a loss L(w) small. The gradient g = dL/dw points to
where the loss rises fastest, so the plainest thing to do is a small step the other way:

    w ← w - lr * g                                                     (gradient descent)

"Stochastic" means that g comes from a batch of the data, not from all of it: it is
right on average, cheap, and noisy. Three refinements follow; each is one line below.
"""

import torch


class SGD:
    """SGD with momentum, as torch.optim.SGD computes it.

    Args:
        parameters: The tensors to train; their `.grad` is read by `step`.
        lr: Length of a step.
        momentum: mu, from 0 (none) to below 1; 0.9 is usual.
        nesterov: Look ahead along the velocity before stepping.
        weight_decay: lambda, the strength of the pull towards zero.
    """

    def __init__(self, parameters, lr, *, momentum=0.0, nesterov=False, weight_decay=0.0):
        self.parameters = list(parameters)
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.weight_decay = weight_decay
        self.velocity = [torch.zeros_like(w) for w in self.parameters]

    def zero_grad(self):
        """Forget the gradients: backward() adds to `.grad`, it does not replace it."""
        for w in self.parameters:
            w.grad = None

    @torch.no_grad()  # the update itself is not something to differentiate
    def step(self):
        """Change the weights by one update."""
        for w, v in zip(self.parameters, self.velocity, strict=True):
            if w.grad is not None:
                w.sub_(self.lr * self.direction(w, w.grad, v))

    def direction(self, w, g, v):
        """What is subtracted from w, but for the learning rate; updates the velocity v."""
        # 1. Weight decay adds lambda / 2 * |w|^2 to the loss. Its gradient is lambda * w:
        #
        #        g ← g + lambda * w
        #
        g = g + self.weight_decay * w

        # 2. Momentum keeps a running sum of the gradients, like a ball that rolls on:
        #
        #        v ← mu * v + g            w ← w - lr * v
        #
        #    Where gradients agree, v grows to g / (1 - mu): with mu = 0.9 a step is ten times
        #    as long. Where they flip from one batch to the next, they cancel.
        v.mul_(self.momentum).add_(g)

        # 3. Nesterov asks for the gradient not where we are, but where the velocity will have
        #    carried us. Written for the point ahead, so that the gradient is taken where the
        #    weights are, it is
        #
        #        v ← mu * v + g            w ← w - lr * (g + mu * v)
        #
        return g + self.momentum * v if self.nesterov else v


# Without momentum v is g, so that the plain method needs no case of its own.
#
# Sources: Polyak 1964; Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html
