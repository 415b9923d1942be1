"""README and guides: their code runs, and prints what they say; their links lead somewhere."""

import ast
import contextlib
import importlib
import io
import re
import sys
import tokenize
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Its blocks are rows, each of which starts anew: tests/test_migrating.py.
ROWS = {"migrating.md"}


def pages(of):
    return [pytest.param(path, id=path.name) for path in of]


@pytest.mark.parametrize("path", pages(p for p in PAGES if p.name not in ROWS))
def test_the_code_runs_and_prints_what_it_says(path, tmp_path, monkeypatch):
    """The Python blocks, run one after the other, print the text blocks that follow them."""
    monkeypatch.chdir(tmp_path)
    module, printed = types.ModuleType(f"page_{path.stem}"), ""
    monkeypatch.setitem(sys.modules, module.__name__, module)  # its classes can be pickled
    for kind, code in BLOCK.findall(path.read_text()):
        if kind == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, str(path), "exec"), vars(module))  # noqa: S102
            printed = output.getvalue()
        elif kind == "text" and printed:
            assert printed.strip() == code.strip()
            printed = ""


def test_pages_of_the_site_have_the_code_of_the_files_they_are_made_from(monkeypatch):
    """What a page is made from is changed in its links alone, and they lead to pages."""
    pytest.importorskip("mkdocs", reason="of the extra docs")
    monkeypatch.syspath_prepend(ROOT / "docs")
    hooks = importlib.import_module("hooks")
    for source in hooks.COPIED:
        text = (ROOT / source).read_text()
        made = hooks.moved(text, source)
        assert BLOCK.findall(made) == BLOCK.findall(text)
        for link in LINK.findall(BLOCK.sub("", made)):
            assert link in hooks.COPIED.values() or (ROOT / "docs" / link).exists()


def test_the_index_of_examples_has_them_all():
    """Each file of examples/ is named, with what it shows."""
    index = (ROOT / "examples" / "README.md").read_text()
    names = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    assert len(names) >= 16
    assert [name for name in names if f"| `{name}` |" not in index] == []


def lines_of_code(path):
    """Without blank lines, comments and docstrings."""
    tree, lines = ast.parse(path.read_text()), set()
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    told = [n.body[0] for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)]
    silent = {number for node in told for number in range(node.lineno, node.end_lineno + 1)}
    without = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in {*without, tokenize.ENCODING, tokenize.ENDMARKER}:
                lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - silent)


def test_the_index_of_examples_counts_their_lines():
    """What it says beside well-known files is what is there, and none is above 135 in all."""
    index = (ROOT / "examples" / "README.md").read_text()
    said = dict(re.findall(r"^\| `(\w+\.py)`: (\d+)", index, re.MULTILINE))
    files = sorted((ROOT / "examples").glob("*.py"))
    assert said == {path.name: str(lines_of_code(path)) for path in files}
    assert max(len(path.read_text().splitlines()) for path in files) <= 135


def test_the_readme_shows_code():
    """It has blocks to run, so that the test above can fail."""
    assert sum(kind == "python" for kind, _ in BLOCK.findall(PAGES[0].read_text())) >= 5


@pytest.mark.parametrize(
    "path", pages([*PAGES, *ROOT.glob("examples/**/*.md"), *ROOT.glob("C*.md")])
)
def test_links_lead_to_files_that_are_there(path):
    """Each relative link, and each picture."""
    text = BLOCK.sub("", path.read_text())
    assert [link for link in LINK.findall(text) if not (path.parent / link).exists()] == []
