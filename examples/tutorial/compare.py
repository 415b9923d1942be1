"""The optimizers from scratch beside torch's, on handwritten digits; and what AMP gives.

Run it (`python compare.py`), or cell by cell in an editor that knows `# %%`. It writes
`compare.png` where it is started.
"""

# %% Data and model: 1797 digits of 8x8 pixels, a perceptron with two hidden layers
import itertools
import time

import adamw
import sgd
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

UPDATES, BATCH = 200, 128
inputs, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
inputs = inputs / 16  # pixels are from 0 to 16; float64, to compare to the last digits
train_set, test_set = slice(0, 1437), slice(1437, None)


def make_model(width=128):
    """The same weights at each call."""
    torch.manual_seed(0)
    layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(width, 10))


def batches():
    """The same batches, in the same order, at each call."""
    generator = torch.Generator().manual_seed(1)
    while True:
        chosen = torch.randint(train_set.stop, (BATCH,), generator=generator)
        yield inputs[chosen], labels[chosen]


# %% Train four times: SGD and AdamW, ours and torch's
def train(make_optimizer):
    """The trained model, and the loss of each update."""
    model = make_model().double()
    optimizer = make_optimizer(model.parameters())
    losses = []
    for x, y in itertools.islice(batches(), UPDATES):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def accuracy(model):
    """Share of the digits held back that are recognized."""
    return (model(inputs[test_set]).argmax(1) == labels[test_set]).double().mean().item()


SETTINGS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "AdamW": {"lr": 2e-3, "weight_decay": 1e-2},
}
OURS = {"SGD": sgd.SGD, "AdamW": adamw.AdamW}
runs = {}
for name, chosen in SETTINGS.items():
    for source, made in {"ours": OURS[name], "torch": getattr(torch.optim, name)}.items():
        runs[name, source] = train(lambda parameters, m=made, c=chosen: m(parameters, **c))
    ours, theirs = runs[name, "ours"][0], runs[name, "torch"][0]
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(
        f"{name:6} accuracy {accuracy(ours):.4f} ours, {accuracy(theirs):.4f} torch;"
        f" largest difference of a weight after {UPDATES} updates {difference:.1e}"
    )

# %% AMP: time of an update, and memory that the forward pass holds for the backward pass
device = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, SIZES, REPEATS = 512, (256, 4096), 15


def measure(precision, size):
    """Median milliseconds of an update, and MiB that its forward pass holds for backward."""
    model = make_model(WIDTH).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.rand(size, 64, device=device)
    y = torch.randint(10, (size,), device=device)
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    held = {}  # bytes by storage, because two operations may save the same tensor

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return F.cross_entropy(model(x), y)

    def update():
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    times = sorted(seconds(update) for _ in range(REPEATS))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    loss.backward()  # after the count: what is held must live until then, each in its own place
    return times[REPEATS // 2] * 1e3, sum(held.values()) / 2**20


def seconds(function):
    """How long a call takes; work on a GPU goes on after the call that has started it."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


amp = {(p, size): measure(p, size) for size in SIZES for p in ("fp32", "bf16")}
for size in SIZES:
    (slow, much), (fast, little) = amp["fp32", size], amp["bf16", size]
    print(
        f"batch {size:4} on {device}: {slow:.1f} ms an update in fp32, {fast:.1f} with bf16"
        f" autocast ({slow / fast:.2f} times as fast); {much:.1f} MiB held for backward in fp32,"
        f" {little:.1f} with autocast ({little / much:.2f} of it)"
    )
print("autocast also holds copies of the weights in 16 bits: small batches gain no memory from it")

# %% Draw the curves
figure = Figure(figsize=(12, 4), layout="constrained")
curves, *bars = figure.subplots(1, 3, width_ratios=[2.4, 1, 1])
colors = {"SGD": "tab:blue", "AdamW": "tab:orange"}
styles = {"ours": {"linewidth": 6, "alpha": 0.3}, "torch": {"linewidth": 1.2}}
for (name, source), (_, losses) in runs.items():
    curves.semilogy(losses, label=f"{name}, {source}", color=colors[name], **styles[source])
curves.set(xlabel="update", ylabel="loss of the batch", title="Ours lie under torch's")
curves.legend()
curves.grid(alpha=0.3)
for axis, index, title in zip(bars, (0, 1), ("ms an update", "MiB held for backward"), strict=True):
    for offset, precision, color in ((-0.2, "fp32", "tab:gray"), (0.2, "bf16", "tab:green")):
        places = [i + offset for i in range(len(SIZES))]
        heights = [amp[precision, size][index] for size in SIZES]
        drawn = axis.bar(places, heights, width=0.38, label=precision, color=color)
        axis.bar_label(drawn, fmt="%.1f", fontsize=8)
    axis.set_xticks(range(len(SIZES)), [f"batch {size}" for size in SIZES])
    axis.set_title(f"{title}, {device}", fontsize=10)
    axis.margins(y=0.12)
    axis.legend(fontsize=8)
figure.savefig("compare.png", dpi=130)
