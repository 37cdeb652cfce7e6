"""The shape of the code: who may import whom, no cycles, no long functions or files, configs without jax."""

import ast
import graphlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "nextllm_jax"

LAYERS = [  # a module imports from the rows below its own
    ("train", "sample"),
    ("cli",),
    ("server",),
    ("",),  # nextllm_jax/__init__.py
    ("convert_cli", "plan_cli", "text_cli"),
    ("doctor", "resume_proof"),
    ("conversation", "evaluation", "harness", "plan"),
    ("llm", "verify", "machine"),
    ("import_cache",),
    ("convert",),
    ("init_from",),
    ("source",),
    ("training", "inference"),
    ("data", "model"),
    ("interop",),
    ("base",),
    ("checkpoint",),
    ("checkpoint_files", "checkpoint_leaves", "orbax_errors"),
    ("sharding",),
    ("config_files",),
    ("config",),
    ("config_model",),
    ("config_checks",),
    ("distributed",),
    ("hardware", "ops", "process", "rendezvous", "tokenizer"),
    ("published_models",),
    ("errors", "standard_streams"),
]
FOLDERS = {  # inside a folder a file imports from those to its left
    "ops": (
        *("rope", "linear", "quantized", "cross_entropy"),
        *("scores", "attention", "blockwise", "ring", "splash", "cudnn"),
    ),
    "model": ("lora", "layers", "kv_cache", "attention_kernel", "attention", "transformer", "quantize", "accounting"),
    "tokenizer": (
        "backends",
        "patterns",
        "stress",
        "tokenizer",
        "bpe",
        "sentencepiece",
        "huggingface",
        "gguf",
        "published",
        "chat",
    ),
    "data": (
        *("conversations", "corpora", "shards", "data_directory", "processes", "parts", "prepare", "packing", "loader"),
    ),
    "training": (
        *(
            "optimizer",
            "state",
            "layer_norms",
            "update",
            "step",
            "evaluate",
            "metrics",
            "resume_guard",
            "run_directory",
        ),
        *("writers", "signals", "program", "flight_recorder", "profiler", "start", "loop", "diagnosis", "replay"),
    ),
    "plan": (
        *("topology", "hlo", "collectives", "compile", "estimate", "roofline", "advice", "training", "decoding"),
        *("search", "report"),
    ),
    "inference": ("sampling", "generate", "stream"),
    "interop": (
        "names",
        "streaming",
        "keys",
        "families",
        "huggingface_rope",
        "huggingface_config",
        "huggingface",
        "gguf_config",
        "gguf",
        "foreign",
    ),
}
RANK = {part: len(LAYERS) - row for row, parts in enumerate(LAYERS) for part in parts}

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


def imports_of(name: str) -> set[str]:
    """Modules of ours that a module imports, at its top or inside a function."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; write the full name"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                imported.add(module if module in SOURCES else str(node.module))
    return {module for module in imported if module.split(".")[0] == PACKAGE}


def part_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    parts = module.split(".")
    return parts[0] if parts[0] != PACKAGE else parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_downwards(name: str) -> None:
    part = part_of(name)
    assert part in RANK, f"{name} has no place yet; put '{part}' into LAYERS"
    for imported in imports_of(name):
        assert imported in SOURCES, f"{name} imports {imported}, which does not exist"
        if part_of(imported) != part:
            assert RANK[part_of(imported)] < RANK[part], f"{name} may not import {imported}"
            continue
        order = FOLDERS[part]
        file, imported_file = name.split(".")[2], imported.split(".")[2]
        assert file in order, f"{name} has no place yet; put '{file}' into FOLDERS"
        assert imported_file in order[: order.index(file)], f"{name} may not import {imported}"


def test_imports_have_no_cycle() -> None:
    order = graphlib.TopologicalSorter({name: imports_of(name) for name in SOURCES}).static_order()
    assert sorted(order) == sorted(SOURCES)  # a cycle raises CycleError, which names it


@pytest.mark.parametrize("name", SOURCES)
def test_files_are_short(name: str) -> None:
    assert len(SOURCES[name].read_text().splitlines()) <= LONGEST_FILE


def test_functions_are_short() -> None:
    too_long = {name: lines for name, lines in FUNCTIONS.items() if lines > LONGEST_FUNCTION}
    assert not too_long
    assert statistics.quantiles(FUNCTIONS.values(), n=10)[-1] < 45


def test_reading_a_config_does_not_import_jax() -> None:
    program = """
import sys
from pathlib import Path
from nextllm_jax.config_files import load_config_file
for file in sorted(Path("configs").glob("*.py")):
    load_config_file(str(file))
heavy = {"jax", "flax", "numpy", "torch"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
