"""The shape of the code: no long functions or files, configs without jax; `lint-imports` checks who imports whom."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "nextllm_jax"

LONGEST_FILE = 400
LONGEST_FUNCTION = 80


def sources() -> dict[str, Path]:
    """The file of every module of ours, by dotted name."""
    files = [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / PACKAGE).rglob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


SOURCES = sources()
FUNCTIONS = {
    f"{name}.{node.name}": node.end_lineno - node.lineno + 1
    for name, file in SOURCES.items()
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
}


@pytest.mark.parametrize("name", SOURCES)
def test_files_are_short(name: str) -> None:
    assert len(SOURCES[name].read_text().splitlines()) <= LONGEST_FILE


def test_functions_are_short() -> None:
    too_long = {name: lines for name, lines in FUNCTIONS.items() if lines > LONGEST_FUNCTION}
    assert not too_long
    assert statistics.quantiles(FUNCTIONS.values(), n=10)[-1] < 45


def test_the_training_loop_reads_as_a_story() -> None:
    """It knows of few other modules, and periodic work is in hooks."""
    loop = f"{PACKAGE}.training.loop"
    imported = set()
    for node in ast.walk(ast.parse(SOURCES[loop].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= names & SOURCES.keys() or {node.module}
    assert 0 < len(imported) <= 14, imported
    assert FUNCTIONS[f"{loop}.run_steps"] <= 30


def test_reading_a_config_does_not_import_jax() -> None:
    program = """
import sys
from pathlib import Path
from nextllm_jax.config.files import load_config_file
for file in sorted(Path("configs").glob("*.py")):
    load_config_file(str(file))
heavy = {"jax", "flax", "numpy", "torch"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
