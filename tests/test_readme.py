"""The README: its code runs, and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_code_runs_and_prints_what_it_says():
    """The Python blocks, run one after the other, print the text blocks that follow them."""
    blocks = BLOCK.findall(README.read_text())
    assert sum(kind == "python" for kind, _ in blocks) >= 5
    namespace, printed = {"__name__": "readme"}, ""
    for kind, code in blocks:
        if kind == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, str(README), "exec"), namespace)  # noqa: S102
            printed = output.getvalue()
        elif kind == "text" and printed:
            assert printed.strip() == code.strip()
            printed = ""
