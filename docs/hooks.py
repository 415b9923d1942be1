"""Pages of the site that are made: from files elsewhere in the repository, and from docstrings."""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath

import loopkit as lk
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")

# Files that are pages as they stand.
COPIED = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "examples/tutorial/README.md": "tutorial.md",
    "examples/migrate/README.md": "side_by_side.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}

# The reference: a page for each part of the package, with the modules whose public names it has.
PARTS = {
    "steps": ("Steps and states", ["state", "step", "compose", "window", "types"]),
    "running": (
        "Running and evaluating",
        ["run", "evaluate", "predict", "collect", "modes", "every", "stop", "updates"],
    ),
    "decorators": ("Decorators", ["decorators", "averages", "graphs", "debug.overflow"]),
    "optim": ("Optimizers and schedules", ["optim"]),
    "checkpoints": ("Checkpoints", ["checkpoint"]),
    "data": ("Data and devices", ["data", "device", "background", "seed"]),
    "distributed": ("Many processes", ["parallel", "ranks"]),
    "observing": ("Observing", ["observe"]),
    "debugging": ("Debugging", ["debug"]),
    "errors": ("Errors and warnings", ["errors"]),
}
TESTING = ("check_decorator", "train_by_hand", "Problem", "assert_bitwise_equal")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for source, target in COPIED.items():
        text = moved((ROOT / source).read_text(), source)
        files.append(File.generated(config, target, content=text))
    for name, text in reference().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def moved(text: str, source: str) -> str:
    """The text with its links as they are in the site; one that leads out of it becomes words."""

    def link(found: re.Match[str]) -> str:
        picture, words, path, anchor = found.groups()
        target = normpath(f"{dirname(source)}/{path}".lstrip("/"))
        page = COPIED.get(target, target.removeprefix("docs/"))
        if target not in COPIED and not target.startswith("docs/"):
            return words
        return f"{picture}[{words}]({relpath(page, dirname(COPIED[source]) or '.')}{anchor or ''})"

    # Code is left alone: `extras["teacher"](inputs)` is no link.
    return "".join(
        part if part.startswith("```") else LINK.sub(link, part) for part in CODE.split(text)
    )


def part_of(module: str) -> tuple[str, int]:
    """The page that has a module's public names, and where: the longest fitting beginning."""
    fitting = [
        (len(start), part, at)
        for part, (_, starts) in PARTS.items()
        for at, start in enumerate(starts)
        if f"{module}.".startswith(f"loopkit.{start}.")
    ]
    if not fitting:
        message = f"docs/hooks.py: no part of the reference has {module}: add it to PARTS"
        raise LookupError(message)
    return max(fitting)[1:]


def reference() -> dict[str, str]:
    """A page for each part, with all its names."""
    names: dict[str, list[tuple[int, str]]] = {part: [] for part in PARTS}
    for name in sorted(lk.__all__, key=str.lower):
        module = getattr(getattr(lk, name), "__module__", "")
        of_types = not module.startswith("loopkit")
        home = (
            ("loopkit.window" if name == "MicroBatches" else "loopkit.types")
            if of_types
            else module
        )
        part, at = part_of(home)
        names[part].append((at, f"{home}.{name}"))
    names["debugging"].insert(0, (0, "loopkit.debug.check.check"))
    pages = {}
    for part, (title, _) in PARTS.items():
        ordered = sorted(names[part], key=lambda found: found[0])
        pages[part] = page(title, [name for _, name in ordered])
    tests = [f"loopkit.testing.{name}" for name in TESTING]
    return pages | {"testing": page("Testing decorators", tests)}


def page(title: str, names: list[str]) -> str:
    """A heading, and what mkdocstrings makes of each name."""
    return f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"
