"""Reads the documents of a corpus one at a time.

A corpus is the source of Python's standard library, a text file, a directory, a glob, jsonl(.gz), parquet, or a
Hugging Face dataset. Empty documents are left out.
"""

import glob
import gzip
import hashlib
import importlib
import itertools
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nextllm_jax.config import DataConfig
from nextllm_jax.data.conversations import conversation_text
from nextllm_jax.errors import InputError

TEXT_SUFFIXES = frozenset(
    [
        *(".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".html", ".csv", ".tsv", ".yaml", ".toml"),
        *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".scala", ".kt", ".js"),
        *(".ts", ".jl", ".r", ".rb", ".php", ".sh", ".sql", ".swift", ".hs", ".ml", ".lua"),
    ]
)
"""Suffixes of the files that are read from a directory, in addition to .jsonl, .jsonl.gz and .parquet."""

SECTION_CHARACTERS = 131_072
"""A longer text file is split at line ends into sections of at most this length; each section is a document."""

_ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z")
_STDLIB_LEFT_OUT = frozenset(
    [
        *("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"),
        *("encodings", "pydoc_data"),  # generated tables and English text, not source code
    ]
)


class Document(NamedTuple):
    """A text, with the name of its file or section. Rows of a table have no name; conversations have a location.

    The text of a conversation is the JSON of its messages.
    """

    text: str
    name: str | None
    location: str = ""


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Every document of `config.corpus`, in an order that depends only on the corpus.

    Invalid UTF-8 becomes U+FFFD. Rows are streamed, and text files are read one section at a time.
    Raises InputError, which names file, line and field, for a corpus that is missing or cannot be read.
    """
    if config.messages_field and config.corpus == "stdlib":
        raise InputError("data.messages_field needs a corpus of rows with messages, not stdlib; set data.corpus")
    if config.corpus == "stdlib":
        documents = _stdlib_documents()
    elif config.corpus.startswith("hf:"):
        documents = _huggingface_documents(config)
    else:
        documents = _file_documents(config)
    return (document for document in documents if document.text)


def document_hash(document: Document) -> int:
    """A hash below 2^64 of the document's name, or of its text if it has none. It decides what is held out.

    Equal rows get equal hashes, so no text is in both the training and the validation split.
    """
    key = document.text if document.name is None else document.name
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def validation_limit(documents: Iterable[Document], fraction: float) -> int:
    """The highest document hash that is held out for validation.

    The limit is `fraction` of the range of hashes, or the smallest hash of all documents if that one is larger.
    Raises InputError for fewer than two documents.
    """
    limit = int(fraction * 2**64)
    smallest, count = 2**64, 0
    for count, document in enumerate(documents, 1):
        smallest = min(smallest, document_hash(document))
        if count > 1 and smallest <= limit:
            break
    if count < 2:
        raise InputError(
            f"data.corpus holds {'one document' if count else 'no text'}; give at least two documents, "
            "one for training and one for validation"
        )
    return max(limit, smallest)


def held_out_text(config: DataConfig, characters: int) -> str:
    """The first documents that are held out for validation, joined and truncated to `characters`."""
    limit = validation_limit(read_documents(config), config.validation_fraction)
    text = ""
    for document in read_documents(config):
        if len(text) < characters and document_hash(document) <= limit:
            text += document.text
    return text[:characters]


def text_bytes(config: DataConfig) -> int | None:
    """The size of the files of a corpus of plain text; None for rows, whose text is only a part of the files."""
    if config.corpus.startswith("hf:"):
        return None
    files = _stdlib_files() if config.corpus == "stdlib" else find_files(config.corpus)
    if any(name.endswith(_ROW_SUFFIXES) for name, _ in files):
        return None
    return sum(path.stat().st_size for _, path in files)


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata files are written at build time and differ between machines.
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _STDLIB_LEFT_OUT & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    if not files:
        raise InputError(f"data.corpus is stdlib, but {root} holds no Python source; name another corpus")
    return files


def _stdlib_documents() -> Iterator[Document]:
    for name, path in _stdlib_files():
        yield Document(path.read_text("utf-8", "replace"), name)


def _file_documents(config: DataConfig) -> Iterator[Document]:
    for name, path in find_files(config.corpus):
        try:
            if name.endswith(".parquet"):
                yield from _parquet_rows(path, config)
            elif name.endswith(_ROW_SUFFIXES):
                yield from _jsonl_rows(path, config)
            elif config.messages_field:
                raise InputError(f"{path} has no rows with data.messages_field; give .jsonl, .jsonl.gz or .parquet")
            else:
                yield from _text_sections(name, path)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} cannot be read: {error}") from error


def find_files(corpus: str) -> list[tuple[str, Path]]:
    """(name, path) of the files of a corpus, sorted by name, which is the path relative to the directory.

    A directory is searched recursively for `TEXT_SUFFIXES` and files of rows; hidden entries are left out. Explicit
    files and globs are not filtered by suffix. Raises InputError if nothing is found, or for a file that is compressed
    in another way than .jsonl.gz.
    """
    root = Path(corpus)
    if root.is_dir():
        found = [path for path in root.rglob("*") if _is_wanted(path, root)]
    elif root.is_file():
        root, found = root.parent, [root]
    else:
        found = [Path(name) for name in glob.glob(corpus, recursive=True) if os.path.isfile(name)]
        root = Path(*itertools.takewhile(lambda part: not set("*?[") & set(part), root.parts))
    if not found:
        raise InputError(
            f"data.corpus {corpus} holds no text; give stdlib, hf:NAME, or an existing file, directory or glob "
            "of text, .jsonl, .jsonl.gz or .parquet"
        )
    for path in found:
        if path.name.endswith(_PACKED_SUFFIXES) and not path.name.endswith(_ROW_SUFFIXES):
            raise InputError(f"data.corpus file {path} is compressed; unpack it first (only .jsonl.gz need not be)")
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def listing_hash(corpus: str) -> str | None:
    """A hash that changes when a file of a corpus is added, removed or written to; None for stdlib and hf:NAME.

    It covers names, sizes and modification times, but not the content. Raises InputError as `find_files` does.
    """
    if corpus == "stdlib" or corpus.startswith("hf:"):
        return None
    stats = ((name, path.stat()) for name, path in find_files(corpus))
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def _is_wanted(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    suffix_fits = path.suffix.lower() in TEXT_SUFFIXES or path.name.endswith(_ROW_SUFFIXES)
    return suffix_fits and not hidden and path.is_file()


def _text_sections(name: str, path: Path) -> Iterator[Document]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        text, number = "", 0
        while block := file.read(SECTION_CHARACTERS + 1 - len(text)):
            text += block
            if len(text) <= SECTION_CHARACTERS:
                continue
            number += 1
            end = text.rfind("\n", 0, SECTION_CHARACTERS) + 1 or SECTION_CHARACTERS
            yield Document(text[:end], f"{name}#{number}")
            text = text[end:]
        yield Document(text, f"{name}#{number + 1}" if number else name)


def _jsonl_rows(path: Path, config: DataConfig) -> Iterator[Document]:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig", "replace"))
            except ValueError as error:
                raise InputError(f"{path} line {number} is not JSON ({error}); fix or remove the line") from error
            yield _row_document(row, config, f"{path} line {number}")


def _parquet_rows(path: Path, config: DataConfig) -> Iterator[Document]:
    field, setting = _field(config)
    arrow = _import_extra("pyarrow", "parquet", f"data.corpus file {path}")
    parquet = _import_extra("pyarrow.parquet", "parquet", f"data.corpus file {path}")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise InputError(f"{path} has no field '{field}'; it has {', '.join(names)}; set {setting}")
            batches = file.iter_batches(batch_size=256, columns=[field])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, text in enumerate(texts, 1):
                yield _row_document({field: text}, config, f"{path} row {number}")
    except arrow.ArrowException as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error


def _huggingface_documents(config: DataConfig) -> Iterator[Document]:
    name = config.corpus.removeprefix("hf:")
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    if not is_name and not os.path.isdir(name):
        raise InputError(f"data.corpus {config.corpus}: '{name}' is not a directory, NAME or OWNER/NAME; check it")
    datasets = _import_extra("datasets", "hf", f"data.corpus {config.corpus}")
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
            rows = rows[config.hf_split] if (Path(name) / "dataset_dict.json").is_file() else rows
        else:
            rows = datasets.load_dataset(name, config.hf_config, split=config.hf_split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield _row_document(row, config, f"data.corpus {config.corpus} row {number}")
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise InputError(
            f"data.corpus {config.corpus} (configuration {config.hf_config}, split {config.hf_split}) cannot be read: "
            f"{type(error).__name__} {' '.join(reason)}"
        ) from error


def _field(config: DataConfig) -> tuple[str, str]:
    """The field that is read from each row, and the setting that names it."""
    if config.messages_field:
        return config.messages_field, "data.messages_field"
    return config.text_field, "data.text_field"


def _row_document(row: Any, config: DataConfig, where: str) -> Document:
    field, setting = _field(config)
    if not isinstance(row, dict) or field not in row:
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where} has no field '{field}'; it has {fields or 'none'}; set {setting}")
    text = row[field]
    if config.messages_field:
        return Document(conversation_text(text, where), None, where)
    if not isinstance(text, str):
        raise InputError(f"{where}: field '{field}' is {type(text).__name__}, not text; fix the row or the field name")
    # JSON can contain lone surrogates, which cannot be encoded in UTF-8.
    return Document(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), None)


def _import_extra(module: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{what} needs an extra package: pip install 'nextllm_jax[{extra}]'") from error
