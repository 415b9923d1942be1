"""Run the same training in each library that is installed, and compare weights and lines.

python examples/migrate/side_by_side.py
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from pathlib import Path

from torch import nn

FORMS = {
    "plain_pytorch": "torch",
    "with_loopkit": "loopkit",
    "with_accelerate": "accelerate",
    "with_ignite": "ignite",
    "with_lightning": "lightning",
    "with_transformers": "transformers",
}


def lines_of(form: str) -> int:
    """Lines of code between the marks: no imports, comments, docstrings or blank lines."""
    source = (Path(__file__).parent / f"{form}.py").read_text()
    code = source.split("# begin\n")[1].split("# end\n")[0].splitlines()
    return sum(bool(line.strip()) and not line.strip().startswith(('"""', "#")) for line in code)


def trained(form: str) -> tuple[nn.Module, list[float]]:
    """What one form trains, without the words and warnings of its library."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return importlib.import_module(form).train()


def difference(first: nn.Module, second: nn.Module) -> float:
    """The largest difference of two models' weights."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def main() -> dict[str, float]:
    """Compare all that are installed with the plain loop."""
    plain, _ = trained("plain_pytorch")
    found = {}
    print(f"{'':<20}{'lines':>6}{'accuracy':>10}   largest difference to the plain loop's weights")
    for form, package in FORMS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{form:<20}{lines_of(form):>6}   {package} is not installed")
            continue
        model, accuracies = trained(form)
        found[form] = difference(model, plain)
        same = "none, bit for bit" if found[form] == 0 else f"{found[form]:.2g}"
        print(f"{form:<20}{lines_of(form):>6}{accuracies[-1]:>10.2%}   {same}")
    return found


if __name__ == "__main__":
    main()
