"""Reads the documents of a corpus one at a time, and decides which are held out for validation.

A corpus is the source of Python's standard library, files of text or rows, or a Hugging Face dataset. Empty documents
are left out.
"""

import contextlib
import dataclasses
import functools
import hashlib
import sysconfig
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from nextllm_jax.config import DataConfig
from nextllm_jax.data.conversations import conversation_group, conversation_text
from nextllm_jax.data.files import READ_ERRORS, CorpusFile, Listing, find_files, open_text
from nextllm_jax.data.rows import (
    TOOLS_FIELD,
    Row,
    Skipped,
    field_of,
    huggingface_rows,
    missing_field,
    plain_value,
    read_rows,
)
from nextllm_jax.errors import InputError

SECTION_CHARACTERS = 131_072
"""A longer text file is split at line ends into sections of at most this length; each section is a document."""

_STDLIB_LEFT_OUT = frozenset(
    [
        *("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"),
        *("encodings", "pydoc_data"),  # generated tables and English text, not source code
    ]
)


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where it is. The text of a conversation is the JSON of its messages."""

    text: str
    location: str
    group: str | None = None
    """Documents of the same group are in the same split; None: documents of the same text."""

    @functools.cached_property
    def digest(self) -> bytes:
        """The SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).digest()


def read_documents(config: DataConfig, skipped: Skipped | None = None) -> Iterator[Document]:
    """Every document of `config.corpus`, in an order that depends only on the corpus.

    Invalid UTF-8 becomes U+FFFD. Rows are streamed, and text files are read one section at a time. What is skipped
    is added to `skipped`.
    Raises InputError, which names file, line and field, for a corpus that is missing or cannot be read.
    """
    skipped = skipped or Skipped(config)
    if config.messages_field and config.corpus == "stdlib":
        raise InputError("data.messages_field needs a corpus of rows with messages, not stdlib; set data.corpus")
    if config.corpus == "stdlib":
        documents = _stdlib_documents()
    elif config.corpus.startswith("hf:"):
        documents = _row_documents(huggingface_rows(config), config, skipped)
    else:
        documents = _file_documents(config, skipped)
    seen: set[bytes] = set()
    for document in documents:
        if not document.text:
            continue
        if config.deduplicate == "exact":
            if document.digest[:8] in seen:
                skipped.duplicates += 1
                continue
            seen.add(document.digest[:8])
        yield document


def document_hash(document: Document) -> int:
    """A hash below 2^64 of the document's group, or of its text if it has none. It decides what is held out.

    Equal texts get equal hashes, so no text is in both the training and the validation split.
    """
    digest = document.digest if document.group is None else hashlib.sha256(document.group.encode()).digest()
    return int.from_bytes(digest[:8], "big")


def validation_limit(documents: Iterable[Document], fraction: float) -> int:
    """The highest document hash that is held out for validation.

    The limit is `fraction` of the range of hashes, moved as little as necessary for both splits to have documents.
    Raises InputError unless there are two different documents.
    """
    limit = int(fraction * 2**64)
    smallest, greatest = 2**64, -1
    for document in documents:
        number = document_hash(document)
        smallest, greatest = min(smallest, number), max(greatest, number)
        if smallest <= limit < greatest:
            return limit
    if smallest >= greatest:
        raise InputError(
            f"data.corpus holds {'no text' if greatest < 0 else 'one document'}; give at least two different "
            "documents, one for training and one for validation"
        )
    return smallest if limit < smallest else greatest - 1


def held_out_text(config: DataConfig, characters: int) -> str:
    """The first documents that are held out for validation, joined and truncated to `characters`."""
    limit = validation_limit(read_documents(config), config.validation_fraction)
    text = ""
    for document in read_documents(config):
        if len(text) < characters and document_hash(document) <= limit:
            text += document.text
    return text[:characters]


def text_bytes(config: DataConfig, listing: Listing | None) -> int | None:
    """The size of the files of a corpus of plain text; None for others, whose text has another size.

    `listing` has the files of the corpus, if it has any.
    """
    if config.corpus == "stdlib":
        return sum(path.stat().st_size for _, path in _stdlib_files())
    if listing is None or not all(file.kind == "text" and not file.compression for file in listing.files):
        return None
    return listing.num_bytes


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
        yield Document(path.read_text("utf-8", "replace"), str(path), group=name)


def _file_documents(config: DataConfig, skipped: Skipped) -> Iterator[Document]:
    files = find_files(config).files
    # With fewer files, a whole one would be far more than the fraction.
    by_file = len(files) * config.validation_fraction >= 1
    for file in files:
        try:
            if file.kind != "text":
                yield from _row_documents(read_rows(file, config), config, skipped)
            elif config.messages_field:
                raise InputError(f"{file.path} has no rows with data.messages_field; give .jsonl, .json or .parquet")
            else:
                yield from _text_sections(file, by_file)
        except READ_ERRORS as error:
            raise InputError(f"{file.path} cannot be read: {error}") from error


def _text_sections(file: CorpusFile, by_file: bool) -> Iterator[Document]:
    """The sections of a text file. They form a group if `by_file`, which files of equal content share."""
    with open_text(file) as content:
        text, number, group = "", 0, None
        while block := content.read(SECTION_CHARACTERS + 1 - len(text)):
            text += block
            if len(text) <= SECTION_CHARACTERS:
                continue
            number += 1
            end = text.rfind("\n", 0, SECTION_CHARACTERS) + 1 or SECTION_CHARACTERS
            section = Document(text[:end], f"{file.path} section {number}", group)
            if by_file and group is None:
                group = section.digest.hex()
                section = dataclasses.replace(section, group=group)
            yield section
            text = text[end:]
        yield Document(text, f"{file.path} section {number + 1}" if number else str(file.path), group)


def _row_documents(rows: Generator[Row, None, None], config: DataConfig, skipped: Skipped) -> Iterator[Document]:
    with contextlib.closing(rows):
        for row, where in rows:
            try:
                if isinstance(row, InputError):
                    raise row
                document = _row_document(row, config, where)
            except InputError as error:
                skipped.add_bad_rows(str(error))
            else:
                yield document


def _row_document(row: object, config: DataConfig, where: str) -> Document:
    field, _ = field_of(config)
    if not isinstance(row, dict) or field not in row:
        names = list(map(str, row)) if isinstance(row, dict) else [type(row).__name__]
        raise InputError(f"{where} has {missing_field(config, names)}")
    value = row[field]
    if config.messages_field:
        text = conversation_text(plain_value(value, where), plain_value(row.get(TOOLS_FIELD), where), where)
        return Document(text, where, conversation_group(text))
    if not isinstance(value, str | bytes):
        raise InputError(f"{where}: field '{field}' is {type(value).__name__}, not text; fix the row or the field name")
    return Document(plain_value(value, where), where)
