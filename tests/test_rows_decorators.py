"""The rows "you used ... / you write ..." of decorators: each block of code runs."""

import re
import warnings
from pathlib import Path

import torch

ROWS = Path(__file__).parents[1] / "docs" / "rows_decorators.md"
BLOCK = re.compile(r"^## (.*?)$|^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_each_row_runs_and_asserts_something():
    """The blocks run one after the other; each but the first asserts what it promises."""
    namespace, heading, rows = {"__name__": "rows"}, None, {}
    benchmark = torch.backends.cudnn.benchmark
    for title, code in BLOCK.findall(ROWS.read_text()):
        heading = title or heading
        if not code:
            continue
        if heading:
            assert "assert" in code, heading
            rows[heading] = rows.get(heading, 0) + 1
        with warnings.catch_warnings():
            if "detect_anomaly" in (heading or ""):
                warnings.simplefilter("ignore")  # autograd shows the forward as a warning
            exec(compile(code, str(ROWS), "exec"), namespace)  # noqa: S102
    assert len(rows) >= 18
    assert torch.backends.cudnn.benchmark == benchmark
    assert not torch.are_deterministic_algorithms_enabled()
