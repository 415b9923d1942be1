"""The examples do what they say, at a reduced size."""

import importlib.util
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_quickstart_reaches_97_percent_and_draws_its_curves(tmp_path, capsys):
    """The quickstart learns real digits, shows a table, and writes a picture where it says."""
    quickstart = load("quickstart")
    quickstart.EPOCHS = 6
    quickstart.PICTURE = tmp_path / "deep" / "curves.png"
    assert quickstart.main() >= 0.97
    printed = capsys.readouterr()
    assert "test accuracy" in printed.out
    assert str(quickstart.PICTURE) in printed.out.replace("\n", "")
    assert quickstart.PICTURE.read_bytes().startswith(b"\x89PNG")
    assert "step 132/132" in printed.err
