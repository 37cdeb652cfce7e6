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
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from etils import epath

from nextllm_jax.config import DataConfig
from nextllm_jax.data.bucket_output import check_bucket, publish_in_bucket
from nextllm_jax.data.census import Census
from nextllm_jax.data.conversations import contents_of, ignored_by
from nextllm_jax.data.corpora import Document, document_hash, read_documents, text_bytes, validation_limit
from nextllm_jax.data.data_directory import (
    check_replaceable,
    claimed,
    is_prepared,
    publish,
    remove_replaced,
    start_or_continue,
    writing,
)
from nextllm_jax.data.files import find_files, has_files
from nextllm_jax.data.parts import (
    Part,
    is_intact,
    load_bad_rows,
    load_mask,
    load_part,
    split_into_parts,
    text_size,
    tokenize_part,
)
from nextllm_jax.data.processes import map_in_processes
from nextllm_jax.data.rows import Skipped
from nextllm_jax.data.settings import (
    check_unchanged,
    data_of_same_paths,
    data_settings,
    differences,
    find_data,
    is_content_recorded,
    listing_hash,
    read_template,
)
from nextllm_jax.data.shards import (
    SPLITS,
    DataPath,
    Dataset,
    data_path,
    partial_path,
    write_index,
    write_masks,
    write_split,
)
from nextllm_jax.errors import InputError
from nextllm_jax.process import cache_directory
from nextllm_jax.progress import phase, progress_bar
from nextllm_jax.storage.downloads import tokenizer_path
from nextllm_jax.tokenizer.bpe import train_tokenizer
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.published import load_tokenizer
from nextllm_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

TOKENIZER_SAMPLE_CHARACTERS = 100_000_000
"""A tokenizer is trained on the first training documents, up to this many characters."""


def ensure_prepared(config: DataConfig, *, allow_change: Collection[str] = ()) -> DataPath:
    """The directory of the data that a config trains on. If `config.path` is None, the data is prepared first.

    Data in `config.path` is used unchanged. If it differs from the config, a warning says so. Raises InputError if
    `config.path` is set but holds no prepared data, or if a path in the config has other content than when the data was
    prepared and `allow_change` does not name its field, such as data.corpus.
    If another process is preparing the data, this waits for it, and takes over if that process dies.
    """
    with phase("looking for prepared data"):  # hashes the corpus and loads the tokenizer
        path, is_ready = find_data(config)
    if not is_ready:
        if earlier := data_of_same_paths(config):
            _log.info("%s has other content than %s was prepared from", config.corpus, earlier[0])
        _log.info("preparing %s in %s", config.corpus, path)
        prepare(config, path, wait=True)
    elif config.path and (difference := check_unchanged(config, path, allow_change)):
        _log.warning(difference)
    return path


def prepare(config: DataConfig, output: DataPath, *, overwrite: bool = False, wait: bool = False) -> None:
    """Write the corpus as token shards into `output`, which is published atomically once it is complete.

    Data for a bucket is prepared in `cache_dir`, or else in the user's cache directory, and then uploaded.

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
    output = data_path(output)
    if not overwrite and _is_prepared_already(config, output):
        return
    if isinstance(output, Path):
        _prepare_on_disk(config, output.resolve() if os.path.islink(output) else output, overwrite, wait)
    else:
        _prepare_in_bucket(config, output, overwrite)


def _prepare_in_bucket(config: DataConfig, output: epath.Path, overwrite: bool) -> None:
    settings = data_settings(config)
    name = hashlib.sha256(json.dumps([str(output), settings], sort_keys=True).encode()).hexdigest()[:16]
    top = Path(config.cache_dir or cache_directory()) / "uploads" / name
    local, uploaded = top / "data", top / "uploaded"
    with writing(top), claimed(top, output):
        if not overwrite and _is_prepared_already(config, output):  # by another process, meanwhile
            return
        check_bucket(output, settings, overwrite)
        if uploaded.exists():
            shutil.rmtree(uploaded)
        if not is_prepared(local):
            _log.info("preparing %s in %s", output, local)
            _prepare_on_disk(config, local, overwrite=False, wait=False)
        publish_in_bucket(local, output, overwrite=overwrite)
        local.rename(uploaded)  # if this process is killed while it deletes, the rest is not uploaded again
        shutil.rmtree(uploaded)
    _log_counts(output)


def _prepare_on_disk(config: DataConfig, output: Path, overwrite: bool, wait: bool) -> None:
    if not output.name or os.path.ismount(output):
        raise InputError(f"{output} cannot be replaced by prepared data; name a new directory inside it")
    partial = partial_path(output)
    listing = listing_hash(config)
    settings = data_settings(config)
    with writing(output), claimed(partial, output, wait=wait):
        if not overwrite and _is_prepared_already(config, output):  # by another process, meanwhile
            return
        check_replaceable(output, overwrite)
        start_or_continue(partial, settings)
        if not is_prepared(partial):
            files = find_files(config) if has_files(config) else None
            if files and (skipped := files.describe_skipped()):
                _log.warning("data.corpus %s: %s", config.corpus, skipped)
            _write_dataset(config, functools.partial(read_documents, config), partial, text_bytes(config, files))
            if listing_hash(config) != listing:
                (partial / "index.json").unlink()
                raise InputError(f"the files of data.corpus {config.corpus} changed while they were read; run again")
        if (partial / "parts").exists():
            shutil.rmtree(partial / "parts")
        check_replaceable(output, overwrite)
        publish(partial, output)
    _log_counts(output)


def _is_prepared_already(config: DataConfig, output: DataPath) -> bool:
    """Whether `output` was prepared with these settings.

    Raises InputError if a path in the config has other content now, or if an earlier version did not record it or
    prepared it by other rules.
    """
    if not is_prepared(output):
        return False
    differing = differences(config, output)
    if any(not each.is_changed for each in differing):
        return False
    for each in differing:
        raise InputError(
            f"{each.describe_change()} since {output} was prepared; pass --overwrite to prepare it again, or name "
            "another directory"
        )
    if not is_content_recorded(config, output):
        raise InputError(
            f"an earlier version prepared {output} by other rules, or did not record the content; train on it with "
            f"--data.path {output}, or pass --overwrite to prepare it again"
        )
    if isinstance(output, Path):
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
    _write_dataset(dataclasses.replace(config, num_processes=1), lambda _: documents, output, None)
    return is_all


Documents = Callable[[Skipped], Iterable[Document]]
"""Reads a corpus from its beginning, and adds what is skipped."""


def _write_dataset(config: DataConfig, read: Documents, partial: Path, num_bytes: int | None) -> None:
    """Write the documents as token shards. `num_bytes` is the size of their text for an ETA, None if unknown."""
    limit = validation_limit(read(Skipped(config)), config.validation_fraction)
    tokenizer = _make_tokenizer(config, read, limit, partial / "tokenizer")
    part_paths = _tokenize_corpus(config, read, limit, partial, tokenizer, num_bytes)
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
        texts = _sample_training_texts(read(Skipped(config)), limit)
        tokenizer = train_tokenizer(map(contents_of, texts) if config.messages_field else texts, config.vocab_size)
        if tokenizer.vocab_size < config.vocab_size:
            _log.warning(f"the corpus has enough pairs for only {tokenizer.vocab_size:,} tokens")
    else:
        tokenizer = load_tokenizer(tokenizer_path(config.tokenizer))
    if config.messages_field:
        tokenizer = _with_template(tokenizer, config.chat_template)
    tokenizer.save(directory)
    return tokenizer


def _with_template(tokenizer: Tokenizer, file: str | None) -> Tokenizer:
    """The tokenizer with the chat template in `file`, or else its own. Raises InputError if it has none."""
    if file is not None:
        roles = dataclasses.replace(tokenizer.roles, chat_template=read_template(file))
        tokenizer = Tokenizer(tokenizer.name, tokenizer.backend, roles)
    if tokenizer.chat_template is None:
        raise InputError(
            f"data.messages_field needs a chat template, but the tokenizer {tokenizer.name} has none; set "
            "data.chat_template to a Jinja file, such as the one in docs/models.md"
        )
    if not ChatTemplate(tokenizer).writes_end():
        _log.warning(
            f"the chat template of {tokenizer.name} ends the assistant's turns without an end token of the tokenizer; "
            "the model will not learn to stop; write {{ eos_token }} after their content"
        )
    return tokenizer


def _warn_of_ignored(documents: Iterable[Document], template: ChatTemplate) -> Iterator[Document]:
    """The documents. A warning names each part of conversations that the template does not write, once."""
    warned: set[str] = set()
    for document in documents:
        for name in ignored_by(template, document.text):
            if name not in warned:
                warned.add(name)
                _log.warning(
                    f"the chat template does not write the {name} of conversations, first in {document.location}, so "
                    "the model is trained without them; set data.chat_template to a template that does"
                )
        yield document


def _sample_training_texts(documents: Iterable[Document], limit: int) -> Iterator[str]:
    left = TOKENIZER_SAMPLE_CHARACTERS
    for document in documents:
        if left <= 0:
            return
        if document_hash(document) > limit:
            yield document.text[:left]
            left -= len(document.text)


def _tokenize_corpus(
    config: DataConfig, read: Documents, limit: int, partial: Path, tokenizer: Tokenizer, num_bytes: int | None
) -> list[Path]:
    """Tokenize every part whose file is missing or damaged; returns the paths of all parts, in order."""
    (partial / "parts").mkdir(exist_ok=True)
    paths: list[Path] = []
    census, skipped, is_chat = Census(), Skipped(config), bool(config.messages_field)

    def missing_parts() -> Iterator[Part]:
        documents = census.count(read(skipped), limit)
        documents = _warn_of_ignored(documents, ChatTemplate(tokenizer)) if is_chat else documents
        for part in split_into_parts(documents, limit, partial / "parts", is_chat):
            paths.append(part.path)
            if not is_intact(part.path):
                yield part
                continue
            bar.update(text_size(part))
            if is_chat:
                skipped.add_bad_rows(*load_bad_rows(part.path))

    work = functools.partial(
        tokenize_part,
        tokenizer_directory=partial / "tokenizer",
        tokenizer_hash=tokenizer.hash,
        chat_template=tokenizer.chat_template,
        skip_bad_rows=config.skip_bad_rows > 0,
    )
    tokens: collections.Counter[int] = collections.Counter()
    seconds: collections.defaultdict[int, float] = collections.defaultdict(float)
    with progress_bar(desc="tokenizing", total=num_bytes, unit="B", unit_scale=True) as bar:
        for report in map_in_processes(work, missing_parts(), config.num_processes or os.cpu_count() or 1):
            tokens[report.process] += report.num_tokens
            seconds[report.process] += report.seconds
            bar.update(report.num_bytes)
            skipped.add_bad_rows(*report.bad_rows)
    for number, process in enumerate(tokens, 1):
        _log.info(f"process {number}: {tokens[process]:,} tokens, {tokens[process] / seconds[process]:,.0f} tokens/s")
    for problem in filter(None, (skipped.describe_bad_rows(), census.describe_replaced())):
        _log.warning(problem)
    if skipped.duplicates:
        _log.info("skipped %s duplicate documents", f"{skipped.duplicates:,}")
    elif repeated := census.describe_duplicates():
        _log.info(repeated)
    return paths


def _log_counts(output: DataPath) -> None:
    dataset = Dataset.open(output, verify="sizes")
    counts = ", ".join(
        f"{dataset.split(name).num_tokens:,} {name} tokens in {dataset.split(name).num_documents:,} documents"
        for name in SPLITS
    )
    _log.info("prepared %s: %s", output, counts)
    training, held_out = (dataset.split(name).num_tokens for name in SPLITS)
    if held_out > training:
        _log.warning(
            "the validation split is larger than the training split; lower data.validation_fraction, or give "
            "more and smaller files"
        )
