"""`open_model`: the one way to open a model."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.model.quantize import Observer, ignore, is_quantized
from nextllm_jax.model.weights import by_name
from nextllm_jax.pretrained.import_cache import imported_run
from nextllm_jax.pretrained.source import Source, open_path
from nextllm_jax.published_models import is_published, resolve

_log = logging.getLogger(__name__)


def open_model(path: str, *, step: str | int | None = None) -> Source:
    """The model of a run directory, a Hugging Face directory, a GGUF file, or a published name.

    `step` of a run is a number, "best" or "latest"; None is the best checkpoint, or the latest while no checkpoint has
    a validation loss. A published model is imported into the user's cache directory when it is first used.

    Raises InputError if the path is none of these, if its files are damaged, or if there is no such step.
    """
    if not is_published(path):
        return open_path(resolve(path), step=step)
    if step is not None:
        raise InputError(f"{path} is a published model, so it has no steps; leave the step out")
    return _open_published(path, Path(resolve(path)))


def _open_published(name: str, file: Path) -> Source:
    """A published model, from its cached import or, if that cannot be used, from its file."""

    def read_file(error: Exception) -> Source:
        _log.warning("%s is read from %s, since its cached import cannot be used: %s", name, file, error)
        return open_path(str(file))

    try:
        source = open_path(str(imported_run(name, file)))
    except (OSError, RunFailed, InputError) as error:
        return read_file(error)

    def load(what: Callable[[Source], Any]) -> Any:
        try:
            return what(source)
        except InputError as error:  # damage is found only when the import is read
            return what(read_file(error))

    def load_params(abstract: Any, observe: Observer = ignore) -> Any:
        if any(map(is_quantized, by_name(abstract).values())):  # the file may have the same quantization
            return open_path(str(file)).load_params(abstract, observe)
        return load(lambda source: source.load_params(abstract))

    return dataclasses.replace(
        source,
        load_tokenizer=lambda: load(lambda source: source.load_tokenizer()),
        load_params=load_params,
    )
