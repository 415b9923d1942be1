"""Two networks that train against each other: two states, two steps, one plain loop.

    python examples/gan.py --picture runs/gan/samples.png

A conditional GAN draws handwritten digits of 8 x 8 pixels. It is judged by how well one
learns to read real digits from drawn ones alone, which needs them true and various.
RESULT
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

LATENT, BATCH_SIZE, PEAK_LR = 32, 64, 5e-4


def digits():
    """Images in [-1, 1] with their labels: 1,397 to learn from, and 400 to be judged by."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images).float().div(8).sub(1), torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].view(-1, 1, 8, 8), labels[order]
    return TensorDataset(images[400:], labels[400:]), TensorDataset(images[:400], labels[:400])


class Generator(nn.Module):
    """From noise and a wanted digit to an image."""

    def __init__(self):
        super().__init__()
        self.digit = nn.Embedding(10, LATENT)
        self.layers = nn.Sequential(
            nn.Linear(2 * LATENT, 512), nn.Unflatten(1, (128, 2, 2)),
            nn.BatchNorm2d(128), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 1, 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise, labels):
        """Images (n, 1, 8, 8)."""
        return self.layers(torch.cat([noise, self.digit(labels)], 1))


class Critic(nn.Module):
    """How real an image is, as an image of that digit (a projection discriminator)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.LeakyReLU(0.2), nn.Dropout2d(0.3),
            nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(0.3),
            nn.Conv2d(64, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Dropout(0.3),
        )  # fmt: skip
        self.real, self.digit = nn.Linear(256, 1), nn.Embedding(10, 256)

    def forward(self, images, labels):
        """Scores (n,)."""
        features = self.layers(images)
        return self.real(features).squeeze(1) + (features * self.digit(labels)).sum(1) / 16


def noise(count):
    """What a drawing starts from."""
    return torch.randn(count, LATENT)


def critic_step(state, batch):
    """Tell real images from drawn ones."""
    real, drawn, labels = batch
    on_real, on_drawn = state.model(real, labels), state.model(drawn, labels)
    return F.softplus(-on_real).mean() + F.softplus(on_drawn).mean()


@lk.with_ema(0.99)
def generator_step(state, batch):
    """Draw what the critic takes for real."""
    critic = state.extras["critic"].model
    return F.softplus(-critic(state.model(*batch), batch[1])).mean()


def draw_digits(state, batch):
    """What the generator draws; for `lk.predict`."""
    return state.model(*batch)


def judged(drawn, labels, test):
    """The share of real digits that are read by their nearest neighbours among drawn ones."""
    reader = KNeighborsClassifier(3).fit(drawn.flatten(1).numpy(), labels.numpy())
    images, truth = test.tensors
    return reader.score(images.flatten(1).numpy(), truth.numpy())


def picture(drawn, path):
    """Drawings of each digit, a row for each."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(10, 15, figsize=(8, 5.6), layout="constrained")
    for axes, image in zip(grid.T.flat, drawn, strict=True):
        axes.imshow(image[0].numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def adam(model):
    """As GANs are trained: with little momentum."""
    return torch.optim.Adam(model.parameters(), betas=(0.5, 0.99))


def main(argv=None):
    """Train both, draw, and judge the drawings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--picture", type=Path, default=Path("runs/gan/samples.png"))
    args = parser.parse_args(argv)
    shuffling = lk.seed_everything(0)
    train, test = digits()
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=shuffling)

    critic, generator = Critic(), Generator()
    c = lk.TrainState(critic, adam(critic))
    g = lk.TrainState(generator, adam(generator), critic=c)  # saving g saves both
    falling = lk.linear(peak=PEAK_LR, floor=PEAK_LR / 20).over(args.epochs * len(loader))
    scheduled = lk.with_schedule(lr=falling)
    improve_critic, improve_generator = scheduled(critic_step), scheduled(generator_step)

    for epoch in range(args.epochs):
        for real, labels in loader:
            drawn = generator(noise(len(labels)), labels).detach()
            c = improve_critic(c, (real, drawn, labels))
            g = improve_generator(g, (noise(len(labels)), labels))
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: critic {c.loss:.2f}, generator {g.loss:.2f}")

    labels = torch.arange(1500) % 10
    with lk.ema_weights(g):
        (drawn,) = lk.predict(draw_digits, g, [(noise(1500), labels)])
    score = judged(drawn, labels, test)
    print(f"nearest neighbours among 1,500 drawn digits read {score:.1%} of the real ones")
    picture(drawn[:150], args.picture)
    print(f"picture: {args.picture}")
    return score


if __name__ == "__main__":
    main()
