"""The settings of prepared data, with hashes of what its paths hold, and the directory that belongs to them.

Data is looked up by the content of the corpus, the tokenizer and the chat template, so a changed file is noticed and
equal copies of a corpus share their data.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nextllm_jax.config import DataConfig
from nextllm_jax.data.data_directory import is_prepared, read_settings
from nextllm_jax.data.files import find_files, has_files, walk
from nextllm_jax.data.shards import FORMAT, DataPath, Dataset, data_path
from nextllm_jax.errors import InputError
from nextllm_jax.process import cache_directory
from nextllm_jax.progress import progress_bar
from nextllm_jax.storage.downloads import tokenizer_path
from nextllm_jax.tokenizer.backends import HuggingFaceBPE
from nextllm_jax.tokenizer.published import KNOWN_ENCODINGS, load_tokenizer

_FIELDS = tuple(field.name for field in dataclasses.fields(DataConfig))

_LOCATIONS_AND_READING = (
    *("path", "mixture", "mixture_paths", "verify", "cache_dir", "cache_bytes", "sequence_length", "num_processes"),
)
_FAST_BYTES = 2**26
"""A corpus of up to this size is hashed at every start; the hash of a larger one is cached."""
_SETTLED_SECONDS = 2.0
"""A corpus that was written to more recently could change again without a new time stamp, so it is not cached."""


def named_settings(config: DataConfig) -> dict[str, Any]:
    """The settings that change the prepared data, with paths as they are, and for stdlib the Python version.

    A setting that was added later is absent at its default, so the directories of earlier data keep their names.
    """
    settings = dataclasses.asdict(config)
    for name in _LOCATIONS_AND_READING:
        del settings[name]
    for name in ("deduplicate", "skip_bad_rows"):
        if settings[name] == getattr(DataConfig, name):
            del settings[name]
    if config.tokenizer != "train":
        del settings["vocab_size"]
    if config.messages_field is None:
        del settings["messages_field"], settings["chat_template"]
    if config.corpus == "stdlib":
        settings["python"] = platform.python_version()
    return {"format": FORMAT, **settings}


class _Content(NamedTuple):
    """How the content of a path in the config is recorded."""

    name: str
    hash_of: Callable[[DataConfig], str | None]
    """Its hash; None if the setting is not a path. Raises InputError if it cannot be read."""


def content_settings(config: DataConfig) -> dict[str, str]:
    """The hashes of what the paths in the config hold, and how conversations are read.

    Raises InputError if one cannot be read.
    """
    hashes = {content.name: content.hash_of(config) for content in _CONTENTS.values()}
    return _rules(config) | {name: value for name, value in hashes.items() if value is not None}


def _rules(config: DataConfig) -> dict[str, str]:
    """What earlier versions did differently with the content: they did not read the tools of conversations."""
    return {"tools": "passed to the chat template"} if config.messages_field else {}


def data_settings(config: DataConfig) -> dict[str, Any]:
    """The content of settings.json. Raises InputError if a file that the config names cannot be read."""
    return named_settings(config) | content_settings(config)


def default_data_path(config: DataConfig) -> DataPath:
    """`config.path`, or `data/<corpus>-<tokenizer>-<hash of the settings and of the content of their paths>`.

    Raises InputError if `config.path` is None and a file that the config names cannot be read.
    """
    if config.path:
        return data_path(config.path)
    settings = data_settings(config)
    for field, content in _CONTENTS.items():
        if content.name in settings:
            settings.pop(field, None)
    return _path_of(config, settings)


def _path_of(config: DataConfig, settings: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path("data") / f"{_name_of(config)}-{digest}"


def _name_of(config: DataConfig) -> str:
    trained = f"bpe{config.vocab_size}"
    names = [config.corpus.removeprefix("hf:"), trained if config.tokenizer == "train" else config.tokenizer]
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", Path(name).name).strip("_.") for name in names)


def data_of_same_paths(config: DataConfig) -> list[Path]:
    """Prepared data in data/ whose settings have the paths of this config; their content may have been another one."""
    wanted = named_settings(config).items()
    found = sorted(Path("data").glob(f"{glob.escape(_name_of(config))}-*"))
    return [path for path in found if is_prepared(path) and wanted <= read_settings(path).items()]


def continued(config: DataConfig, recorded: DataConfig) -> DataConfig:
    """`config` with the path of the data that a run with the config `recorded` was trained on.

    The config stays as it is if it names a path or other settings, or if that data is gone. Earlier versions did not
    record the path; their data is named after the settings without the content.
    """
    if config.path is not None or named_settings(config) != named_settings(recorded):
        return config
    path = recorded.path or str(_path_of(recorded, named_settings(recorded)))
    return dataclasses.replace(config, path=path) if is_prepared(data_path(path)) else config


def find_data(config: DataConfig) -> tuple[DataPath, bool]:
    """The directory of the data that a config trains on, and whether the data is prepared there.

    Raises InputError if `config.path` is set but holds no prepared data.
    """
    try:
        path = default_data_path(config)
    except InputError as error:
        if earlier := data_of_same_paths(config):
            raise InputError(f"{error}; to train on the data that was prepared, set data.path {earlier[0]}") from error
        raise
    if config.path and not is_prepared(path):
        raise InputError(
            f"data.path {path} holds no prepared data that is readable; check the path, or prepare the data: "
            f"nextllm prepare --output {path}"
        )
    return path, is_prepared(path)


def open_dataset(config: DataConfig, path: DataPath | None = None) -> Dataset:
    """The prepared data of a config, or in `path`, checked and cached as the config says. Raises InputError."""
    return Dataset.open(
        path or default_data_path(config),
        verify=config.verify,
        cache_dir=config.cache_dir,
        cache_bytes=config.cache_bytes,
    )


class Difference(NamedTuple):
    """A field whose value differs between a config and prepared data, or whose path has other content now."""

    field: str
    value: Any
    """The value in the config."""
    is_changed: bool
    """Whether the path is the same, but its content has changed since the data was prepared."""

    def describe_change(self) -> str:
        """That the content has changed."""
        if self.value is None:  # only for a template, which then comes with the tokenizer
            return "the tokenizer's chat template has changed"
        if self.field == "tokenizer":
            return f"the encoding of data.tokenizer {self.value} has changed"
        return f"the content of data.{self.field} {self.value} has changed"


def differences(config: DataConfig, path: DataPath) -> list[Difference]:
    """How a config differs from the settings of the prepared data in `path`.

    What is recorded by content is compared by content, unless the config's file is gone or an earlier version prepared
    the data.
    """
    found, wanted = read_settings(path), named_settings(config)
    differing = []
    for field in (*_FIELDS, "python"):
        if field not in wanted and field not in found:
            continue
        value = wanted.get(field, getattr(config, field, None))
        is_same = found.get(field, getattr(DataConfig, field, None)) == value
        content = _CONTENTS.get(field)
        now = None
        if content and content.name in found:
            with contextlib.suppress(InputError):
                now = content.hash_of(config)
        if content and now and now != found[content.name]:
            differing.append(Difference(field, value, is_same))
        elif not now and not is_same:
            differing.append(Difference(field, value, False))
    return differing


def is_content_recorded(config: DataConfig, path: DataPath) -> bool:
    """Whether the settings of prepared data have the rules, and hashes of all that exists of what the paths hold."""
    found = read_settings(path)
    if not _rules(config).keys() <= found.keys():
        return False
    with contextlib.suppress(InputError):  # data that is prepared does not need its corpus any more
        return all(content.name in found or content.hash_of(config) is None for content in _CONTENTS.values())
    return True


def check_unchanged(config: DataConfig, path: DataPath, allow_change: Collection[str] = ()) -> str | None:
    """A message about how the prepared data in `path` differs from what the config states, if it does.

    See `differences`. A setting that has its default is not stated. Raises InputError if a path in the config holds
    something else than when the data was prepared, unless `allow_change` has its field, such as data.corpus.
    """
    unstated = {**{name: getattr(DataConfig, name) for name in _FIELDS}, "python": platform.python_version()}
    differing = [
        each
        for each in differences(config, path)
        if each.field != "tokens_per_shard" and (each.is_changed or each.value != unstated[each.field])
    ]
    for each in differing:
        if each.is_changed and f"data.{each.field}" not in allow_change:
            raise InputError(
                f"{each.describe_change()} since {path} was prepared; prepare it again (nextllm prepare --overwrite "
                f"--output {path}), or use the data as it is: --allow-change data.{each.field}"
            )
    if not differing:
        return None
    dataset, settings = Dataset.open(path, verify="sizes"), read_settings(path)
    # Data with the tokenizer of other data records no vocab_size of its own.
    differing = [each for each in differing if (each.field, each.value) != ("vocab_size", dataset.vocab_size)]
    if not differing:
        return None
    corpus, tokenizer = (settings.get(name, "unknown") for name in ("corpus", "tokenizer"))
    others = ", ".join(f"{each.field} {each.value}" for each in differing if not each.is_changed)
    told = [f"the config says {others}"] if others else []
    told += [f"{each.describe_change()} since it was prepared" for each in differing if each.is_changed]
    return (
        f"using {path} unchanged: corpus {corpus}, tokenizer {tokenizer} with {dataset.vocab_size:,} tokens, "
        f"{dataset.split('train').num_tokens:,} training tokens; {'; '.join(told)}"
    )


def listing_hash(config: DataConfig) -> str | None:
    """A hash of the paths, sizes and times of the files of a corpus on this machine; None for stdlib and hf:NAME.

    A file that was written to or replaced has another change time, which programs cannot set. Raises InputError.
    """
    with _reading_corpus():
        files = _corpus_files(config)
        return None if files is None else _listing(files)[0]


def _corpus_sha256(config: DataConfig) -> str | None:
    """A hash of the names and the content of the files of a corpus; None for stdlib and hf:NAME.

    The hash of a large corpus is kept in the cache directory, under its `listing_hash`.
    """
    with _reading_corpus():
        files = _corpus_files(config)
        if files is None:
            return None
        listing, size, newest = _listing(files)
        cached = cache_directory() / "corpora" / listing
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if size > _FAST_BYTES and re.fullmatch("[0-9a-f]{64}", known := cached.read_text()):
                return known
        found = _hash_files(files, size)
    if size > _FAST_BYTES and newest < time.time() - _SETTLED_SECONDS:
        with contextlib.suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            temporary = cached.with_suffix(f".{os.getpid()}")
            temporary.write_text(found)
            temporary.replace(cached)
    return found


@contextlib.contextmanager
def _reading_corpus() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"data.corpus file {error.filename} cannot be read: {error.strerror}") from error


def _corpus_files(config: DataConfig) -> list[tuple[str, Path]] | None:
    """(name, path) of the files of a corpus, sorted by name; None for stdlib and datasets on the Hub."""
    if has_files(config):
        return [(file.name, file.path) for file in find_files(config).files]
    root = Path(config.corpus.removeprefix("hf:"))
    if config.corpus == "stdlib" or not root.is_dir():
        return None
    return sorted((path.relative_to(root).as_posix(), path) for path in walk(root, collections.Counter()))


def _listing(files: Iterable[tuple[str, Path]]) -> tuple[str, int, float]:
    """The hash of a listing, the total size in bytes, and the time of the last change in seconds."""
    entries, size, newest = [], 0, 0.0
    for name, path in files:
        stat = path.stat()
        entries.append([name, os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
        size, newest = size + stat.st_size, max(newest, stat.st_mtime, stat.st_ctime)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest(), size, newest


def _hash_files(files: list[tuple[str, Path]], size: int) -> str:
    def hash_of(file: tuple[str, Path]) -> tuple[str, int, str]:
        with open(file[1], "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            return file[0], content.tell(), digest

    whole = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads, contextlib.ExitStack() as stack:
        bar = None
        if size > _FAST_BYTES:
            bar = stack.enter_context(progress_bar(desc="hashing the corpus", total=size, unit="B", unit_scale=True))
        for name, length, digest in threads.map(hash_of, files):
            whole.update(json.dumps([name, length, digest]).encode())
            if bar is not None:
                bar.update(length)
    return whole.hexdigest()


def _tokenizer_hash(config: DataConfig) -> str | None:
    """The hash of the tokenizer in a file or directory; None for one that is trained or published by name."""
    if config.tokenizer == "train" or config.tokenizer in KNOWN_ENCODINGS:
        return None
    tokenizer = load_tokenizer(tokenizer_path(config.tokenizer))
    # Earlier versions encoded the spellings of special tokens in text as these tokens if the model does.
    is_changed = isinstance(tokenizer.backend, HuggingFaceBPE) and tokenizer.backend.produces_spellings
    return f"{tokenizer.hash}, spelled tokens are text" if is_changed else tokenizer.hash


def _template_sha256(config: DataConfig) -> str | None:
    """The hash of the chat template that conversations are formatted with; None for text."""
    if config.messages_field is None:
        return None
    template = read_template(config.chat_template) if config.chat_template else None
    if template is None and config.tokenizer != "train" and config.tokenizer not in KNOWN_ENCODINGS:
        template = load_tokenizer(tokenizer_path(config.tokenizer)).chat_template
    return hashlib.sha256(template.encode()).hexdigest() if template else None


def read_template(file: str) -> str:
    """The chat template in a file. Raises InputError if it cannot be read."""
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.chat_template {file} cannot be read ({error}); give a Jinja file") from error


_CONTENTS = {
    "corpus": _Content("corpus_sha256", _corpus_sha256),
    "tokenizer": _Content("tokenizer_hash", _tokenizer_hash),
    "chat_template": _Content("chat_template_sha256", _template_sha256),
}
CONTENT_FIELDS = tuple(f"data.{field}" for field in _CONTENTS)
"""The fields whose content is part of the settings."""
