"""Prepares a corpus as token shards, in parallel. It can be interrupted, and publishes its output atomically.

Documents are grouped into parts of a fixed amount of text. One process tokenizes each part into a file named after its
content. The parts are then joined in order, so the result does not depend on the number of processes. The files are
written to `<output>.partial`, which is renamed to the output at the end. An interrupted preparation continues from the
parts that are finished. Nothing here imports jax.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nextllm_jax.config import DataConfig
from nextllm_jax.data.conversations import contents_of
from nextllm_jax.data.corpora import Document, document_hash, listing_hash, read_documents, text_bytes, validation_limit
from nextllm_jax.data.data_directory import (
    check_replaceable,
    claimed,
    is_prepared,
    publish,
    read_settings,
    remove_replaced,
    start_or_continue,
    writing,
)
from nextllm_jax.data.parts import Part, is_intact, load_mask, load_part, split_into_parts, text_size, tokenize_part
from nextllm_jax.data.processes import map_in_processes
from nextllm_jax.data.shards import (
    FORMAT,
    SPLITS,
    Dataset,
    mounted_path,
    partial_path,
    write_index,
    write_masks,
    write_split,
)
from nextllm_jax.errors import InputError
from nextllm_jax.progress import progress_bar
from nextllm_jax.tokenizer.bpe import train_tokenizer
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.published import load_tokenizer
from nextllm_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

TOKENIZER_SAMPLE_CHARACTERS = 100_000_000
"""A tokenizer is trained on the first training documents, up to this many characters."""


def data_settings(config: DataConfig) -> dict[str, Any]:
    """The settings that change the prepared data, and for stdlib the Python version; the content of settings.json."""
    settings = dataclasses.asdict(config)
    for name in ("path", "verify", "sequence_length", "num_processes"):
        del settings[name]
    if config.tokenizer != "train":
        del settings["vocab_size"]
    if config.messages_field is None:
        del settings["messages_field"], settings["chat_template"]
    if config.corpus == "stdlib":
        settings["python"] = platform.python_version()
    return {"format": FORMAT, **settings}


def default_data_path(config: DataConfig) -> Path:
    """`config.path`, or `data/<corpus>-<tokenizer>-<hash of the settings that change the data>`."""
    if config.path:
        return Path(config.path)
    digest = hashlib.sha256(json.dumps(data_settings(config), sort_keys=True).encode()).hexdigest()[:8]
    trained = f"bpe{config.vocab_size}"
    names = [config.corpus.removeprefix("hf:"), trained if config.tokenizer == "train" else config.tokenizer]
    corpus, tokenizer = (re.sub(r"[^A-Za-z0-9_.]+", "_", Path(name).name).strip("_.") for name in names)
    return Path("data") / f"{corpus}-{tokenizer}-{digest}"


def find_prepared(config: DataConfig) -> Path | None:
    """The directory of the data that a config trains on; None if the data must be prepared first.

    Raises InputError if `config.path` is set but holds no prepared data.
    """
    path = mounted_path(default_data_path(config))
    if is_prepared(path):
        return path
    if config.path:
        raise InputError(
            f"data.path {path} holds no prepared data that is readable; check the path, or prepare the data: "
            f"nextllm prepare --output {path}"
        )
    return None


def remark(config: DataConfig, path: Path) -> str | None:
    """A message if the prepared data differs from the config, or if the corpus has changed since; else None."""
    found, wanted = read_settings(path), data_settings(config)
    del wanted["format"], wanted["tokens_per_shard"]
    differing = [f"{name} {value}" for name, value in wanted.items() if found.get(name) != value]
    if differing:
        return f"{_describe(path, found)}; the config says {', '.join(differing)}"
    if _files_changed(config, found):
        return (
            f"the files of data.corpus {config.corpus} have changed since {path} was prepared; using the "
            "prepared data unchanged (nextllm prepare --overwrite prepares it again)"
        )
    return None


def ensure_prepared(config: DataConfig) -> Path:
    """The directory of the data that a config trains on. If `config.path` is None, the data is prepared first.

    Existing data is used unchanged. If it differs from the config, or if the files of the corpus have changed since, a
    warning says so. Raises InputError if `config.path` is set but holds no prepared data.
    If another process is preparing the data, this waits for it, and takes over if that process dies.
    """
    path = find_prepared(config)
    if path is None:
        path = default_data_path(config)
        _log.info("preparing %s in %s", config.corpus, path)
        prepare(config, path, wait=True)
    elif difference := remark(config, path):
        _log.warning(difference)
    return path


def _describe(path: Path, settings: dict[str, Any]) -> str:
    dataset = Dataset.open(path, verify="sizes")
    corpus, tokenizer = (settings.get(name, "unknown") for name in ("corpus", "tokenizer"))
    return (
        f"using {path} unchanged: corpus {corpus}, tokenizer {tokenizer} with {dataset.vocab_size:,} tokens, "
        f"{dataset.split('train').num_tokens:,} training tokens"
    )


def _files_changed(config: DataConfig, settings: dict[str, Any]) -> bool:
    """Whether the files of the corpus have changed since data with these settings was prepared; False if missing."""
    try:
        return listing_hash(config.corpus) != settings.get("files")
    except InputError:
        return False


def prepare(config: DataConfig, output: Path, *, overwrite: bool = False, wait: bool = False) -> None:
    """Write the corpus as token shards into `output`, which is published atomically once it is complete.

    Does nothing if `output` was already prepared with these settings. An interrupted preparation continues when it is
    run again. The output is byte-identical for any number of interruptions and processes. Logs the throughput of each
    process.

    A script that calls this needs `if __name__ == "__main__":`, since worker processes are spawned.
    Raises InputError
    - if `output` holds something else, or was prepared from files that have changed; `overwrite` allows to replace it,
      but only prepared data;
    - if another process is preparing it; with `wait`, this waits for that process instead;
    - if the corpus or the tokenizer cannot be read, or if `output` cannot be written.
    """
    output = mounted_path(output)
    if os.path.islink(output):
        output = output.resolve()
    if not overwrite and _is_prepared_already(config, output):
        return
    if not output.name or os.path.ismount(output):
        raise InputError(f"{output} cannot be replaced by prepared data; name a new directory inside it")
    partial = partial_path(output)
    settings = data_settings(config) | {"files": listing_hash(config.corpus)}
    with writing(output), claimed(partial, output, wait=wait):
        if not overwrite and _is_prepared_already(config, output):  # by another process, meanwhile
            return
        check_replaceable(output, overwrite)
        start_or_continue(partial, settings)
        if not is_prepared(partial):
            _write_dataset(config, lambda: read_documents(config), partial, text_bytes(config))
        if (partial / "parts").exists():
            shutil.rmtree(partial / "parts")
        check_replaceable(output, overwrite)
        publish(partial, output)
    _log_counts(output)


def _is_prepared_already(config: DataConfig, output: Path) -> bool:
    """Whether `output` was prepared with these settings. Raises InputError if the corpus files have changed since."""
    if not is_prepared(output) or not data_settings(config).items() <= (found := read_settings(output)).items():
        return False
    if _files_changed(config, found):
        raise InputError(
            f"the files of data.corpus {config.corpus} have changed since {output} was prepared; "
            "pass --overwrite to prepare it again, or name another directory"
        )
    remove_replaced(output)
    _log.info("%s is already prepared", output)
    return True


def prepare_sample(config: DataConfig, output: Path, characters: int) -> bool:
    """Prepare the first documents of the corpus, about `characters` of text, in an empty directory.

    Returns whether these are all documents of the corpus. Raises InputError as `prepare` does.
    """
    documents: list[Document] = []
    is_all = True
    for document in read_documents(config):
        if characters <= 0 and len(documents) > 1:
            is_all = False
            break
        documents.append(document)
        characters -= len(document.text)
    _write_dataset(dataclasses.replace(config, num_processes=1), lambda: documents, output, None)
    return is_all


Documents = Callable[[], Iterable[Document]]
"""Reads a corpus from its beginning."""


def _write_dataset(config: DataConfig, read: Documents, partial: Path, num_bytes: int | None) -> None:
    """Write the documents as token shards. `num_bytes` is the size of their text for an ETA, None if unknown."""
    limit = validation_limit(read(), config.validation_fraction)
    tokenizer = _make_tokenizer(config, read, limit, partial / "tokenizer")
    part_paths = _tokenize_corpus(config, read, limit, partial, tokenizer.hash, num_bytes)
    splits = {
        name: write_split(
            partial,
            name,
            (load_part(path, name) for path in part_paths),
            vocab_size=tokenizer.vocab_size,
            tokens_per_shard=config.tokens_per_shard,
        )
        for name in SPLITS
    }
    for name in SPLITS if config.messages_field else ():
        masks = (load_mask(path, name) for path in part_paths)
        splits[name]["masks"] = write_masks(partial, name, masks, tokens_per_shard=config.tokens_per_shard)
    write_index(partial, tokenizer, splits)


def _make_tokenizer(config: DataConfig, read: Documents, limit: int, directory: Path) -> Tokenizer:
    """The tokenizer of the config, saved in `directory`. One that an interrupted preparation saved there is reused."""
    if (directory / "encoding.json").is_file():
        return Tokenizer.load(directory)
    if config.tokenizer == "train":
        _log.info(f"training a tokenizer of {config.vocab_size:,} tokens on the corpus")
        texts = _sample_training_texts(read(), limit)
        tokenizer = train_tokenizer(map(contents_of, texts) if config.messages_field else texts, config.vocab_size)
        if tokenizer.vocab_size < config.vocab_size:
            _log.warning(f"the corpus has enough pairs for only {tokenizer.vocab_size:,} tokens")
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    if config.messages_field:
        tokenizer = _with_template(tokenizer, config.chat_template)
    tokenizer.save(directory)
    return tokenizer


def _with_template(tokenizer: Tokenizer, file: str | None) -> Tokenizer:
    """The tokenizer with the chat template in `file`, or else its own. Raises InputError if it has none."""
    if file is not None:
        try:
            template = Path(file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data.chat_template {file} cannot be read ({error}); give a Jinja file") from error
        tokenizer = Tokenizer(
            tokenizer.name, tokenizer.backend, dataclasses.replace(tokenizer.roles, chat_template=template)
        )
    if tokenizer.chat_template is None:
        raise InputError(
            f"data.messages_field needs a chat template, but the tokenizer {tokenizer.name} has none; set "
            "data.chat_template to a Jinja file"
        )
    if not ChatTemplate(tokenizer).writes_end():
        _log.warning(
            f"the chat template of {tokenizer.name} ends the assistant's turns without an end token of the tokenizer; "
            "the model will not learn to stop, so add one to the template"
        )
    return tokenizer


def _sample_training_texts(documents: Iterable[Document], limit: int) -> Iterator[str]:
    left = TOKENIZER_SAMPLE_CHARACTERS
    for document in documents:
        if left <= 0:
            return
        if document_hash(document) > limit:
            yield document.text[:left]
            left -= len(document.text)


def _tokenize_corpus(
    config: DataConfig, read: Documents, limit: int, partial: Path, tokenizer_hash: str, num_bytes: int | None
) -> list[Path]:
    """Tokenize every part whose file is missing or damaged; returns the paths of all parts, in order."""
    (partial / "parts").mkdir(exist_ok=True)
    paths: list[Path] = []

    def missing_parts() -> Iterator[Part]:
        for part in split_into_parts(read(), limit, partial / "parts", bool(config.messages_field)):
            paths.append(part.path)
            if is_intact(part.path):
                bar.update(text_size(part))
            else:
                yield part

    work = functools.partial(tokenize_part, tokenizer_directory=partial / "tokenizer", tokenizer_hash=tokenizer_hash)
    tokens: collections.Counter[int] = collections.Counter()
    seconds: collections.defaultdict[int, float] = collections.defaultdict(float)
    with progress_bar(desc="tokenizing", total=num_bytes, unit="B", unit_scale=True) as bar:
        for report in map_in_processes(work, missing_parts(), config.num_processes or os.cpu_count() or 1):
            tokens[report.process] += report.num_tokens
            seconds[report.process] += report.seconds
            bar.update(report.num_bytes)
    for number, process in enumerate(tokens, 1):
        _log.info(f"process {number}: {tokens[process]:,} tokens, {tokens[process] / seconds[process]:,.0f} tokens/s")
    return paths


def _log_counts(output: Path) -> None:
    dataset = Dataset.open(output, verify="sizes")
    counts = ", ".join(
        f"{dataset.split(name).num_tokens:,} {name} tokens in {dataset.split(name).num_documents:,} documents"
        for name in SPLITS
    )
    _log.info("prepared %s: %s", output, counts)
