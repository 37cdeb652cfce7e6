"""Copies of models in buckets, in the user's cache directory: their readers need files on a disk."""

import hashlib
import json
import os

from etils import epath

from nextllm_jax.errors import InputError
from nextllm_jax.process import cache_directory
from nextllm_jax.progress import progress_bar
from nextllm_jax.storage.interface import BucketFiles
from nextllm_jax.storage.open_storage import as_path, is_address, open_bucket

_SINGLE = (".gguf", ".json", ".tiktoken")
"""Suffixes of an address that names one file and not a directory."""
_WEIGHTS = ".safetensors"
_FILES = (".json", ".jinja", ".model", ".txt")


def local_copy(path: str, *, weights: bool = True) -> str:
    """The path of a copy of the Hugging Face directory or the file at an address; any other path unchanged.

    What was copied before is copied again only if it has changed. Without `weights`, only the small files of a
    directory are copied. Raises InputError if a file is missing, or is replaced meanwhile.
    """
    if not is_address(path):
        return path
    parent, _, name = path.rstrip("/").rpartition("/")
    is_file = name.endswith(_SINGLE)
    bucket = open_bucket(parent if is_file else path)
    names = [name] if is_file else _names_of_model(bucket)
    if not names:
        return path
    found = {each: bucket.identity(each) for each in names}
    if missing := [each for each, identity in found.items() if identity is None]:
        raise InputError(f"{path} does not exist: there is no {missing[0]}; check the address")
    key = hashlib.sha256(json.dumps([path, found], sort_keys=True).encode()).hexdigest()[:16]
    directory = cache_directory() / "downloads" / key / ("" if is_file else name)
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [each for each in names if weights or not each.endswith(_WEIGHTS)]
    absent = [each for each in wanted if not (directory / each).exists()]
    for each in progress_bar(absent, desc=f"downloading {path}", unit=" files"):
        partial = directory / f".{each}.{os.getpid()}"
        try:
            bucket.download(each, partial)
            if bucket.identity(each) != found[each]:
                raise InputError(f"{each} in {path} was replaced while it was read; run the same command again")
            partial.replace(directory / each)
        finally:
            partial.unlink(missing_ok=True)
    return str(directory / name if is_file else directory)


def tokenizer_path(path: str) -> epath.Path:
    """The path of a tokenizer as `load_tokenizer` takes it, for a bucket too."""
    return as_path(local_copy(path, weights=False))


def _names_of_model(bucket: BucketFiles) -> list[str]:
    """The files of a Hugging Face directory; empty if it is something else, such as a run or prepared data."""
    names = bucket.names()
    if not {"tokenizer.json", "tokenizer.model"} & {*names} and b'"model_type"' not in bucket.read("config.json"):
        return []
    return [name for name in names if name.endswith((*_FILES, _WEIGHTS))]
