"""Documents of a corpus, one at a time.

Corpora are Python's own standard library, text files, directories, globs, jsonl(.gz), parquet, and Hugging
Face datasets. Empty documents are left out.
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
"""What a directory is searched for, beside .jsonl, .jsonl.gz and .parquet."""

SECTION_CHARACTERS = 131_072
"""A longer text file is cut at line ends into sections of at most this length, each a document of its own."""

_ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z")
_STDLIB_LEFT_OUT = frozenset(
    [
        *("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"),
        *("encodings", "pydoc_data"),  # tables and English text that a program wrote, not source
    ]
)


class Document(NamedTuple):
    """A text, and the name of a file or section; rows of a table have no name but a place.

    The text of a conversation is the JSON of its messages.
    """

    text: str
    name: str | None
    place: str = ""


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Every document of `config.corpus`, in an order that depends on the corpus alone.

    Invalid UTF-8 becomes U+FFFD. Rows are streamed; a file is held one section at a time.
    Raises InputError for a corpus that is missing or cannot be read, naming file, line and field.
    """
    if config.messages_field and config.corpus == "stdlib":
        raise InputError("data.messages_field needs a corpus of rows with messages; set data.corpus")
    if config.corpus == "stdlib":
        documents = _stdlib_documents()
    elif config.corpus.startswith("hf:"):
        documents = _huggingface_documents(config)
    else:
        documents = _file_documents(config)
    return (document for document in documents if document.text)


def document_hash(document: Document) -> int:
    """A number below 2^64 by which documents are held out: of the name, or of the text where there is none.

    Equal rows get equal numbers, so that a text met in training is not met again in validation.
    """
    key = document.text if document.name is None else document.name
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def validation_limit(documents: Iterable[Document], fraction: float) -> int:
    """The document hash up to which documents are held out for validation.

    It is `fraction` of the range of hashes; where no document lies there, the smallest hash of them all.
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
            f"data.corpus holds {'one document' if count else 'no text'}; at least two documents are needed, "
            "one to train on and one to validate"
        )
    return max(limit, smallest)


def held_out_text(config: DataConfig, characters: int) -> str:
    """The first documents of the corpus that are held out for validation, joined and cut to so many characters."""
    limit = validation_limit(read_documents(config), config.validation_fraction)
    text = ""
    for document in read_documents(config):
        if len(text) < characters and document_hash(document) <= limit:
            text += document.text
    return text[:characters]


def _stdlib_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata files are written at build time and differ between machines.
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _STDLIB_LEFT_OUT & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    if not files:
        raise InputError(f"data.corpus stdlib finds no Python source in {root}; name another corpus")
    for name, path in files:
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
    """(name, path) of the files of a corpus, sorted by name, which is the path below the directory.

    A directory is searched in depth for `TEXT_SUFFIXES` and rows; hidden entries are passed over. A file or glob
    is taken at its word. Raises InputError if nothing is found or a file is packed in a way that is not read.
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
            raise InputError(f"data.corpus file {path} is packed; unpack it first (only .jsonl.gz is read packed)")
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def listing_hash(corpus: str) -> str | None:
    """Changes when a file of a corpus is added, removed or written to; None for stdlib and hf:NAME.

    It looks at names, sizes and times, not at the content. Raises InputError like `find_files`.
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
                raise InputError(f"{path} has no field '{field}' but {', '.join(names)}; set {setting}")
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
        raise InputError(f"data.corpus {config.corpus}: '{name}' is no directory, nor NAME or OWNER/NAME; check it")
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
    """The field of rows that is read, and the setting that names it."""
    if config.messages_field:
        return config.messages_field, "data.messages_field"
    return config.text_field, "data.text_field"


def _row_document(row: Any, config: DataConfig, where: str) -> Document:
    field, setting = _field(config)
    if not isinstance(row, dict) or field not in row:
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where} has no field '{field}' but {fields or 'none'}; set {setting}")
    text = row[field]
    if config.messages_field:
        return Document(conversation_text(text, where), None, where)
    if not isinstance(text, str):
        raise InputError(f"{where}: field '{field}' is {type(text).__name__}, not text; fix the row or the field name")
    # JSON can spell lone surrogates, which no UTF-8 file can hold.
    return Document(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), None)


def _import_extra(module: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{what} needs an extra package: pip install 'nextllm_jax[{extra}]'") from error
