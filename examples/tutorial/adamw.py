"""AdamW from scratch: a learning rate for every single weight.

SGD gives all weights one learning rate. But the gradients of an embedding that is seen
once in a thousand batches and of a bias that every sample moves differ by orders of
magnitude. Adam divides each gradient by its own typical size, so that every weight
moves by about `lr` in each update, whatever the scale of its gradients.
"""

import torch


class AdamW:
    """Adam with decoupled weight decay, as torch.optim.AdamW computes it.

    Args:
        parameters: The tensors to train; their `.grad` is read by `step`.
        lr: About how far a weight moves in one update.
        betas: How slowly the averages of the gradient and of its square forget.
        eps: Keeps the division from blowing up where gradients are zero.
        weight_decay: lambda, the strength of the pull towards zero.
    """

    def __init__(self, parameters, lr=1e-3, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.mean = [torch.zeros_like(w) for w in self.parameters]
        self.mean_of_squares = [torch.zeros_like(w) for w in self.parameters]
        self.updates = [0] * len(self.parameters)  # of each: one without a gradient sits out

    def zero_grad(self):
        """Forget the gradients: backward() adds to `.grad`, it does not replace it."""
        for w in self.parameters:
            w.grad = None

    @torch.no_grad()  # the update itself is not something to differentiate
    def step(self):
        """Change the weights by one update."""
        for i, w in enumerate(self.parameters):
            if w.grad is not None:
                self.updates[i] += 1
                self.update(w, w.grad, self.mean[i], self.mean_of_squares[i], self.updates[i])

    def update(self, w, g, m, v, t):
        """The t-th change of one tensor of weights w, and of the averages m and v, in place."""
        beta1, beta2 = self.betas

        # 1. Decoupled weight decay: shrink the weights directly,
        #
        #        w ← w - lr * lambda * w
        #
        #    In SGD this equals adding lambda * w to the gradient. Here it does not: Adam would
        #    divide lambda * w by the size of the gradient as well, so that weights with large
        #    gradients would decay less. Keeping the two apart is the W of AdamW.
        w.mul_(1 - self.lr * self.weight_decay)

        # 2. Two running averages, of the gradient and of its square (element by element):
        #
        #        m ← beta1 * m + (1 - beta1) * g
        #        v ← beta2 * v + (1 - beta2) * g^2
        #
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)

        # 3. Both start at zero, so after t updates they are too small: were every gradient g,
        #    m would be (1 - beta1^t) * g. Divide that out:
        #
        #        m^ = m / (1 - beta1^t)          v^ = v / (1 - beta2^t)
        #
        #    Without it the first update would be (1 - beta1) / sqrt(1 - beta2) times as long:
        #    3.2 times with these betas, when the averages are worth least.
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)

        # 4. Step by the gradient over its typical size:
        #
        #        w ← w - lr * m^ / (sqrt(v^) + eps)
        #
        #    Multiply all gradients by 1000 and nothing changes (but for eps). Where the sign of
        #    the gradient keeps flipping, m^ is small against sqrt(v^), and so is the step.
        w.sub_(self.lr * m_hat / (v_hat.sqrt() + self.eps))


# Sources: Kingma and Ba 2014, https://arxiv.org/abs/1412.6980
#          Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101
