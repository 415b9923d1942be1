"""Two towers learn which halves of a digit belong together: nobody tells them what a digit is.

    python examples/contrastive.py --picture runs/contrastive/pairs.png

One network sees upper halves, the other lower halves; InfoNCE pulls the two halves of one
image together, and pushes those of all other images in the batch apart. Under torchrun
the negatives come from the batches of all ranks.

1,000 updates, 12 s of processor time: of 400 digits never seen, 29 % of the upper halves
choose their own lower half first (by chance: 0.25 %), and 71 % have it among five.

Source: https://arxiv.org/abs/1807.03748, https://arxiv.org/abs/2103.00020
"""

import argparse
from pathlib import Path

import loopkit as lk
import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE, PEAK_LR = 128, 2e-3


def halves():
    """Upper and lower halves, (n, 32) each: 1,397 to learn from and 400 never seen."""
    images = torch.tensor(load_digits().data).float().div(16)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    upper, lower = images.split(32, dim=1)
    return TensorDataset(upper[400:], lower[400:]), TensorDataset(upper[:400], lower[:400])


def tower():
    """From half an image to a point."""
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(32, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Dropout(0.3), nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64),
    )  # fmt: skip


class Towers(nn.Module):
    """Both towers; their points lie on a sphere, whose radius is learned."""

    def __init__(self):
        super().__init__()
        self.upper, self.lower = tower(), tower()
        self.log_radius = nn.Parameter(torch.tensor(1.0))

    def forward(self, upper, lower):
        """The points of both halves: (n, 64) each."""
        a, b = F.normalize(self.upper(upper)), F.normalize(self.lower(lower))
        return a * self.log_radius.exp(), b * self.log_radius.exp()


class Gather(torch.autograd.Function):
    """The points of all ranks, one below the other; their losses' slopes come back, summed."""

    @staticmethod
    def forward(_, points):
        """From (n, d) on each rank to (ranks * n, d)."""
        parts = [torch.empty_like(points) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, points.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_, slopes):
        """What all ranks' losses want of this rank's points."""
        total = slopes.clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def of_all_ranks(points):
    """The points of all ranks, and which of them are this rank's."""
    mine = torch.arange(len(points), device=points.device)
    if not dist.is_initialized():
        return points, mine
    return Gather.apply(points), mine + dist.get_rank() * len(points)


@lk.with_clip(1.0)
def train_step(state, batch):
    """InfoNCE: among all lower halves the right one for each upper half, and the reverse."""
    upper, lower = state.model(*batch)
    all_upper, mine = of_all_ranks(upper)
    all_lower, _ = of_all_ranks(lower)
    down, up = (
        F.cross_entropy(upper @ all_lower.T, mine),
        F.cross_entropy(lower @ all_upper.T, mine),
    )
    return (down + up) / 2


def eval_step(state, batch):
    """Which lower halves each upper half likes best, and how often its own is among them."""
    upper, lower = state.model(*batch)
    liked = (upper @ lower.T).argsort(1, descending=True)
    own = liked == torch.arange(len(upper), device=liked.device).view(-1, 1)
    scores = {f"top {k}": own[:, :k].any(1).float().mean() for k in (1, 5, 20)}
    return {**scores, "liked": liked}


def draw(test, liked, path):
    """Upper halves of test digits, each with the lower half that it likes best."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    upper, lower = test.tensors
    figure, grid = plt.subplots(5, 16, figsize=(10, 4), layout="constrained")
    figure.suptitle("upper halves with the lower half they chose (red: of another image)")
    for i, axes in enumerate(grid.flat):
        chosen = int(liked[i, 0])
        image = torch.cat([upper[i], lower[chosen]]).view(8, 8)
        axes.imshow(image.numpy(), cmap="gray_r")
        axes.axhline(3.5, color="black" if chosen == i else "red", lw=0.6)
        axes.spines[:].set_color("lightgray" if chosen == i else "red")
        axes.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv=None):
    """Train the towers, and let each upper half choose."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--picture", type=Path, default=Path("runs/contrastive/pairs.png"))
    args = parser.parse_args(argv)
    generator = lk.seed_everything(0)
    train, test = halves()
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=generator)

    model = Towers().to(lk.device("auto"))
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    schedule = lk.warmup(0.1, peak=PEAK_LR) >> lk.cosine()
    step = lk.with_schedule(lr=schedule.over(args.epochs * len(loader)))(train_step)
    lk.progress(lk.run(step, state, loader, max_epochs=args.epochs)).finish()

    everyone = DataLoader(test, len(test))  # one batch: each chooses among all 400
    scores = lk.evaluate(eval_step, state, everyone)
    print("its own lower half: " + ", ".join(f"{k} {v:.1%}" for k, v in scores.items()))
    (output,) = lk.predict(eval_step, state, everyone)
    draw(test, output["liked"], args.picture)
    print(f"picture: {args.picture}")
    return scores


if __name__ == "__main__":
    main()
