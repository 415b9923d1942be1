"""The house style's numbers, as far as a test can say them."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "loopkit"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}

# Arrows point down: a module may import from lines below its own, never from above. One
# line is one layer; a package is one layer, unless its modules have lines of their own.
LAYERS = """
loopkit
testing
checking
debug
debug.check debug.rehearse debug.rates debug.memory debug.overflow
debug.fork debug.samples
debug.findings
optim.configure
optim.create
optim.combined optim.groups optim.plot optim.phases
optim.schedule
optim
run predict collect
observe.log observe.plot
observe.delivery observe.console observe.trackers observe.progress observe.timing observe.throughput
observe.profile observe.summary observe.monitor
observe.files observe.display observe.fetch observe.flops observe.peak
observe.sink
observe.record observe.stopwatch
observe
evaluate
data.lengths data.collate
decorators parallel.decorator
compose
compiled
step
setup places
feature
checkpoint.preemption
checkpoint.checkpointer
checkpoint.saver checkpoint.saving checkpoint.export checkpoint.best
checkpoint.snapshot checkpoint.restore checkpoint.writer checkpoint.owner
checkpoint.difference
checkpoint.read checkpoint.commit checkpoint.objects
checkpoint.pieces
checkpoint.folder checkpoint.format checkpoint.lock checkpoint.options
checkpoint.remote
checkpoint.disk
checkpoint.manifest checkpoint.tensors
checkpoint.messages
checkpoint
parallel.tensor_parallel
parallel.fsdp
parallel.ddp
parallel.group_ranks
parallel.whole data.shard
parallel.zero
parallel.decisions parallel.group parallel.launch
parallel.failure parallel.repoint parallel.gathered
types modes metrics averages
updates every stop
given
state feed
limits device output opening functional graphs background
restored
check checked outcome window interrupt seed position
parts
nested plain extras rng counting norms data.order data.samples data.watch ranks silence skips
parallel.environment parallel
errors exact closing data.epoch data arriving
""".split("\n")[1:-1]


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(tree):
    """The loopkit modules that a module imports, wherever in its code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "loopkit":
            if node.module == "loopkit":
                yield from (f"loopkit.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "loopkit")


def layer_of(module):
    words = [module.removeprefix("loopkit."), (module.split(".") + ["loopkit"])[1]]
    return next(i for w in words for i, line in enumerate(LAYERS) if w in line.split())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    """A module imports from lower layers only: no cycles, and nobody imports the root."""
    module = module_of(path)
    for imported in imports_of(TREES[path]):
        assert imported in {module_of(p) for p in FILES}, (
            f"{module} imports the root for {imported}"
        )
        assert layer_of(imported) > layer_of(module), f"{module} imports {imported}"


def test_decorators_are_leaves():
    """No decorator imports another, and none reaches behind the public API of the core."""
    for path in (PACKAGE / "decorators").glob("*.py"):
        imported = {*imports_of(TREES[path])}
        assert not [name for name in imported if name.startswith("loopkit.decorators")]
        assert not imported & {"loopkit.step", "loopkit.places", "loopkit.setup", "loopkit.feature"}


def functions_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(function, source):
    """Lines of a function's body that hold code: no docstring, comment or blank line."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    lines = {
        line
        for statement in body
        for line in range(statement.lineno, (statement.end_lineno or 0) + 1)
        if (text := source[line - 1].strip()) and not text.startswith("#")
    }
    return len(lines)


def test_functions_are_short():
    """Code lines of the functions: median at most 6, nine of ten at most 20, none over 40."""
    lengths = {}
    for path, tree in TREES.items():
        source = path.read_text().splitlines()
        for function in functions_of(tree):
            lengths[f"{module_of(path)}.{function.name}"] = code_lines(function, source)
    # The oracle is one long flat loop on purpose: it is read beside the PyTorch manual.
    del lengths["loopkit.testing.train_by_hand"]
    assert statistics.median(lengths.values()) <= 6
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 20
    assert {name: n for name, n in lengths.items() if n > 40} == {}


def test_files_are_short():
    """No file has more than 350 lines."""
    long = {module_of(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 350}
    assert long == {}


def is_public(name):
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_public_names_are_documented(path):
    """Each module, public class and public function says what it promises."""
    tree = TREES[path]
    assert ast.get_docstring(tree), path
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            inside_function = any(
                node in ast.walk(other) for other in functions_of(tree) if other is not node
            )
            assert inside_function or ast.get_docstring(node), f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_parameters_and_returns_are_annotated(path):
    """Every parameter and return has a type."""
    for function in functions_of(TREES[path]):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += [a for a in (arguments.vararg, arguments.kwarg) if a]
        bare = [a.arg for a in named if a.annotation is None and a.arg not in {"self", "cls"}]
        assert bare == [], f"{path.name}: {function.name}"
        assert function.returns is not None, f"{path.name}: {function.name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_error_has_three_parts(path):
    """Whatever is raised says what was written, what was found, and what to write instead."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            if name not in {"AssertionError", "AttributeError", "empty"}:  # two are the language's
                assert name.endswith("Error"), f"{path.name}:{node.lineno}"
                assert len(node.exc.args) == 3, f"{path.name}:{node.lineno}"


def test_importing_loopkit_imports_no_extras_and_changes_nothing():
    """`import loopkit` pulls in neither torchmetrics nor an extra, and draws no random number."""
    code = """
import sys, torch
before = torch.get_rng_state()
import loopkit
assert torch.equal(before, torch.get_rng_state())
extras = (
    "torchmetrics rich matplotlib sklearn safetensors.torch tensorboard wandb mlflow fsspec s3fs"
    " huggingface_hub peft transformers accelerate lightning torchao schedulefree psutil torchdata"
)
print([name for name in extras.split() if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
