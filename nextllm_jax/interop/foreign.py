"""A model in another program's files: a Hugging Face directory or a GGUF file, behind one face."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a model's files hold; tokenizer and weights are read when they are asked for."""

    config: ModelConfig
    model_type: str
    """Its name among Hugging Face's, which an export takes up again."""
    load_tokenizer: Callable[[], Tokenizer]
    load_params: Callable[[Any], Any]
    """Abstract parameter tree (a shape, type and sharding at each leaf) -> the parameters."""


def is_foreign(path: Path) -> bool:
    """Whether a path is a GGUF file or a directory with a config.json of Hugging Face's kind."""
    if path.suffix == ".gguf" or path.is_file():
        return True
    try:
        values = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model_type" in values


def open_foreign(path: Path, step: str | int | None = None) -> Foreign:
    """The model at a path for which `is_foreign` is true.

    Raises InputError for files that are damaged, or say what this model cannot honour, and if a step is asked for.
    """
    require_no_step(path, step)
    try:
        return _open_huggingface(path) if path.is_dir() else _open_gguf(path)
    except ModuleNotFoundError as error:
        raise InputError(
            f"reading {path} needs the package {error.name}; install the extra with pip install '.[interop]'"
        ) from error


def require_no_step(path: Path, step: str | int | None) -> None:
    """Raise InputError if a step of foreign files is asked for."""
    if step is not None:
        raise InputError(f"{path} is no run directory and has no steps; leave the step out")


def _open_huggingface(path: Path) -> Foreign:
    from nextllm_jax.interop import huggingface
    from nextllm_jax.tokenizer.huggingface import load_huggingface

    config, model_type = huggingface.read_config(path)
    return Foreign(
        config,
        model_type,
        load_tokenizer=lambda: load_huggingface(path),
        load_params=lambda abstract: huggingface.load_params(path, config, model_type, abstract),
    )


def _open_gguf(path: Path) -> Foreign:
    from nextllm_jax.interop import gguf
    from nextllm_jax.tokenizer.gguf import from_gguf

    file = gguf.GGUFFile(path)
    return Foreign(
        file.config,
        file.model_type,
        load_tokenizer=lambda: from_gguf(file.metadata),
        load_params=file.load_params,
    )
