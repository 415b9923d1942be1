"""Two networks that train against each other: two states, two steps, one plain loop.

    python examples/gan.py --picture runs/gan/samples.png

A conditional GAN draws handwritten digits of 8 x 8 pixels, with the relativistic loss and
the gradient penalty on real and drawn images that keep it from drawing one of each.
RESULT

Source: https://arxiv.org/abs/2501.05441
"""

import argparse
from pathlib import Path

import loopkit as lk
import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

LATENT, BATCH_SIZE, PEAK_LR, STEEPNESS = 32, 64, 1e-3, 0.3


def digits():
    """Images in [-1, 1] with their labels: 1,397 to learn from, and 400 to be judged by."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images).float().div(8).sub(1), torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return TensorDataset(images[400:], labels[400:]), TensorDataset(images[:400], labels[:400])


def layers(entering, leaving):
    """Four linear layers; no normalisation, so that each image is judged by itself."""
    sizes = [(entering, 256), (256, 256), (256, 256)]
    hidden = [part for size in sizes for part in (nn.Linear(*size), nn.LeakyReLU(0.2))]
    return nn.Sequential(*hidden, nn.Linear(256, leaving))


class Generator(nn.Module):
    """From noise and a wanted digit to an image."""

    def __init__(self):
        super().__init__()
        self.digit, self.layers = nn.Embedding(10, 32), layers(LATENT + 32, 64)

    def forward(self, noise, labels):
        """Images (n, 64)."""
        return self.layers(torch.cat([noise, self.digit(labels)], 1)).tanh()


class Critic(nn.Module):
    """How real an image looks, as an image of that digit."""

    def __init__(self):
        super().__init__()
        self.digit, self.layers = nn.Embedding(10, 64), layers(64 + 64, 1)

    def forward(self, images, labels):
        """Scores (n,)."""
        return self.layers(torch.cat([images, self.digit(labels)], 1)).squeeze(1)


def noise(count):
    """What a drawing starts from."""
    return torch.randn(count, LATENT)


def critic_step(state, batch):
    """Score real images above drawn ones, and nowhere steeply."""
    real, drawn, labels = batch
    images = torch.cat([real, drawn]).requires_grad_()
    scores = state.model(images, labels.repeat(2))
    (slopes,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    on_real, on_drawn = scores.chunk(2)
    return F.softplus(on_drawn - on_real).mean() + STEEPNESS * slopes.square().sum(1).mean()


@lk.with_ema(0.99)
def generator_step(state, batch):
    """Draw what the critic scores above real images."""
    real, start, labels = batch
    critic = state.extras["critic"].model
    return F.softplus(critic(real, labels) - critic(state.model(start, labels), labels)).mean()


def draw_digits(state, batch):
    """What the generator draws; for `lk.predict`."""
    return state.model(*batch)


def variety(images, labels):
    """How far images of a digit lie from their mean."""
    return sum(images[labels == digit].var(0).sum() for digit in range(10)).sqrt().item()


def judged(drawn, labels, test):
    """The share of real digits that are read by their nearest neighbours among drawn ones."""
    reader = KNeighborsClassifier(3).fit(drawn.numpy(), labels.numpy())
    images, truth = test.tensors
    return {
        "read": reader.score(images.numpy(), truth.numpy()),
        "variety": variety(drawn, labels) / variety(images, truth),
    }


def picture(drawn, path):
    """Drawings of each digit, a row for each."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(10, 15, figsize=(8, 5.6), layout="constrained")
    for axes, image in zip(grid.T.flat, drawn, strict=True):
        axes.imshow(image.view(8, 8).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def adam(model):
    """As GANs are trained: without momentum."""
    return torch.optim.Adam(model.parameters(), betas=(0.0, 0.99))


def main(argv=None):
    """Train both, draw, and judge the drawings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--picture", type=Path, default=Path("runs/gan/samples.png"))
    args = parser.parse_args(argv)
    shuffling = lk.seed_everything(0)
    train, test = digits()
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=shuffling)

    critic, generator = Critic(), Generator()
    c = lk.TrainState(critic, adam(critic))
    g = lk.TrainState(generator, adam(generator), critic=c)  # saving g saves both
    falling = lk.cosine(peak=PEAK_LR, floor=PEAK_LR / 20).over(args.epochs * len(loader))
    scheduled = lk.with_schedule(lr=falling)
    improve_critic, improve_generator = scheduled(critic_step), scheduled(generator_step)

    for epoch in range(args.epochs):
        for real, labels in loader:
            drawn = generator(noise(len(labels)), labels).detach()
            c = improve_critic(c, (real, drawn, labels))
            g = improve_generator(g, (real, noise(len(labels)), labels))
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: critic {c.loss:.2f}, generator {g.loss:.2f}")

    labels = torch.arange(1500) % 10
    with lk.ema_weights(g):
        (drawn,) = lk.predict(draw_digits, g, [(noise(1500), labels)])
    score = judged(drawn, labels, test)
    print(f"nearest neighbours among 1,500 drawn digits read {score['read']:.1%} of 400 real ones;")
    print(f"drawn digits are {score['variety']:.0%} as various as real ones")
    picture(drawn[:150], args.picture)
    print(f"picture: {args.picture}")
    return score


if __name__ == "__main__":
    main()
