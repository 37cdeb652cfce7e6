"""The files of a corpus: which are read, which are skipped, and how their bytes become text."""

import bz2
import collections
import glob
import gzip
import importlib
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from nextllm_jax.config import DataConfig
from nextllm_jax.errors import InputError
from nextllm_jax.storage.open_storage import require_local

TEXT_SUFFIXES = frozenset(
    [
        *(".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".html", ".csv", ".tsv", ".yaml", ".toml"),
        *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".scala", ".kt", ".js"),
        *(".ts", ".jl", ".r", ".rb", ".php", ".sh", ".sql", ".swift", ".hs", ".ml", ".lua"),
    ]
)
"""Suffixes of the text files that are read from a directory, in addition to the files of rows."""

Kind = Literal["text", "lines", "json", "parquet"]
_ROW_KINDS: dict[str, Kind] = {".json": "json", ".parquet": "parquet"}
_ROW_KINDS |= dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "lines")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ARCHIVES = (
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".br", ".z", ".lzma"),
    *(kind + suffix for kind in (".tar", ".parquet") for suffix in _COMPRESSED),
)
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_BINARY = {
    rb"\x1f\x8b\x08": "gzip data; name it .gz",
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": "zstd data; name it .zst",
    rb"\xfd7zXZ\0": "xz data; name it .xz",
    rb"BZh\d1AY&SY": "bzip2 data; name it .bz2",
    rb"PK\x03\x04": "a zip archive; unpack it",
    rb"PAR1\x15": "parquet; name it .parquet",
    rb"ARROW1\0": "an Arrow file; name its dataset with hf:DIRECTORY",
    rb"%PDF-\d": "PDF; convert it to text",
}
"""What a file is, by a pattern of its first bytes, and what to do with it."""
_HEAD_BYTES = 65_536
_MAX_ZERO_SHARE = 0.1
"""Text without a byte order mark whose beginning has a larger share of zero bytes is not UTF-8."""
_JSON_CHARACTERS = 2**20
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a missing, truncated or damaged file raises."""


class CorpusFile(NamedTuple):
    """A file of a corpus. `name` is its path relative to the corpus."""

    name: str
    path: Path
    kind: Kind
    compression: str
    """The suffix of its compression, such as .gz, or an empty string."""


class Listing(NamedTuple):
    """The files of a corpus, sorted by name, and the number and the bytes of the skipped files by reason."""

    files: list[CorpusFile]
    skipped: dict[str, tuple[int, int]]

    @property
    def num_bytes(self) -> int:
        """Bytes of the files on disk."""
        return sum(file.path.stat().st_size for file in self.files)

    def describe_skipped(self) -> str | None:
        """A line about the skipped files, largest first; None if there are none."""
        if not self.skipped:
            return None
        kinds = sorted(self.skipped.items(), key=lambda item: (-item[1][1], item[0]))
        told = [
            f"{count:,} {reason}" + (f" ({_readable(size)})" if size else "") for reason, (count, size) in kinds[:8]
        ]
        told += [f"{len(kinds) - 8} more kinds"] if len(kinds) > 8 else []
        count, size = (sum(numbers) for numbers in zip(*self.skipped.values(), strict=True))
        read = f"read {len(self.files):,} files ({_readable(self.num_bytes)})"
        return f"{read} and skipped {count:,} ({_readable(size)}): {', '.join(told)}"


def has_files(config: DataConfig) -> bool:
    """Whether the corpus consists of files for `find_files`: it is neither stdlib nor hf:NAME."""
    return config.corpus != "stdlib" and not config.corpus.startswith("hf:")


def find_files(config: DataConfig) -> Listing:
    """The files of the corpus of a config. Names are relative to the directory.

    A directory is searched recursively, through links, for `TEXT_SUFFIXES` and files of rows, which may be
    compressed. Hidden entries are skipped, and so are .json files whose first row lacks the field. Explicit files and
    globs are not filtered. The case of suffixes does not matter. Raises InputError if nothing is found, if a file or a
    directory cannot be read, or if an explicit file is an archive.
    """
    require_local(config.corpus, "data.corpus")
    try:
        listing = _find_in_directory(config) if os.path.isdir(config.corpus) else _find_by_name(config.corpus)
    except OSError as error:
        raise InputError(f"data.corpus file {error.filename} cannot be read: {error.strerror}") from error
    if not listing.files:
        skipped = f" ({listing.describe_skipped()})" if listing.skipped else ""
        raise InputError(
            f"data.corpus {config.corpus} holds no text{skipped}; give stdlib, hf:NAME, or an existing file, "
            "directory or glob of text, .jsonl, .json or .parquet"
        )
    return listing


def _find_in_directory(config: DataConfig) -> Listing:
    root = Path(config.corpus)
    found: list[CorpusFile] = []
    counts, sizes = collections.Counter[str](), collections.Counter[str]()
    for path in walk(root, counts):
        file = _corpus_file(path, root)
        if reason := _reason_to_skip(file, config):
            counts[reason] += 1
            sizes[reason] += path.lstat().st_size
        else:
            found.append(file)
    return Listing(sorted(found), {reason: (count, sizes[reason]) for reason, count in counts.items()})


def _find_by_name(corpus: str) -> Listing:
    parts = itertools.takewhile(lambda part: not set("*?[") & set(part), Path(corpus).parts)
    is_file = os.path.isfile(corpus)
    root = Path(corpus).parent if is_file else Path(*parts)
    names = [corpus] if is_file else filter(os.path.isfile, glob.glob(corpus, recursive=True))
    found = [_corpus_file(Path(name), root) for name in names]
    for file in found:
        if file.name.lower().endswith(_ARCHIVES):
            raise InputError(
                f"data.corpus file {file.path} is compressed; unpack it first (only {', '.join(_COMPRESSED)} of text "
                "and JSON need not be)"
            )
    return Listing(sorted(found), {})


def walk(root: Path, skipped: collections.Counter[str]) -> Iterator[Path]:
    """The files below a directory, also below links to directories.

    Hidden entries, and links to a directory that contains them, are only counted.
    """
    yield from _walk(root, skipped, frozenset(map(str, Path(os.path.realpath(root)).parents)))


def _walk(directory: Path, skipped: collections.Counter[str], above: frozenset[str]) -> Iterator[Path]:
    """`above` holds the real paths of the directories on the way, since a link to one of them would never end."""
    real = os.path.realpath(directory)
    if real in above:
        skipped["links to a directory above"] += 1
        return
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif os.path.isdir(entry.path):
            yield from _walk(Path(entry.path), skipped, above | {real})
        else:
            yield Path(entry.path)


def _corpus_file(path: Path, root: Path) -> CorpusFile:
    name = path.name.lower()
    compression = next((suffix for suffix in _COMPRESSED if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(compression)).suffix
    return CorpusFile(path.relative_to(root).as_posix(), path, _ROW_KINDS.get(suffix, "text"), compression)


def _reason_to_skip(file: CorpusFile, config: DataConfig) -> str | None:
    """Why a file in a directory is not read; None if it is."""
    name = file.path.name.lower()
    suffix = Path(name.removesuffix(file.compression)).suffix
    if not file.path.is_file():
        return "links to nothing" if file.path.is_symlink() else "special files"
    if file.kind == "parquet" and file.compression:
        return f".parquet{file.compression}"
    if file.kind == "json":
        field = config.messages_field or config.text_field
        return None if _has_rows(file, field) else f".json without rows that have the field '{field}'"
    if file.kind == "text" and suffix not in TEXT_SUFFIXES:
        return (suffix + file.compression) or "without a suffix"
    if file.kind == "text" and config.messages_field:
        return "text files, which have no conversations"
    return None


def _has_rows(file: CorpusFile, field: str) -> bool:
    try:
        with open_text(file) as content:
            row = next(json_values(content), None)
    except (ValueError, RecursionError):
        return False
    except READ_ERRORS as error:
        raise InputError(f"{file.path} cannot be read: {error}") from error
    return isinstance(row, dict) and field in row


def _readable(size: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000  # pyright: ignore[reportAssignmentType]
    return f"{size:,.3g} TB"


def import_extra(module: str, extra: str, what: str) -> Any:
    """A module of an optional package. Raises InputError, which names the extra, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{what} needs an extra package: pip install 'nextllm_jax[{extra}]'") from error


def _open_zst(path: Path) -> Any:
    arrow = import_extra("pyarrow", "parquet", f"data.corpus file {path}")
    return arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


def open_text(file: CorpusFile, newline: str = "", errors: str = "replace") -> IO[str]:
    """The decompressed text of a file. Invalid characters become U+FFFD, unless `errors` says otherwise.

    A byte order mark says that the text is UTF-16 or UTF-32; otherwise it is UTF-8. Raises InputError for content that
    is not text, and one of READ_ERRORS if the file cannot be read.
    """
    content = io.BufferedReader(_OPENERS[file.compression](file.path), _HEAD_BYTES)
    try:
        head = content.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        if found := next((found for start, found in _BINARY.items() if re.match(start, head)), None):
            raise InputError(f"{file.path} is not text but {found}, or leave it out")
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8")
        if encoding == "utf-8" and head.count(0) > _MAX_ZERO_SHARE * len(head):
            raise InputError(
                f"{file.path} is not UTF-8 text: it has many zero bytes and no byte order mark; convert it to UTF-8, "
                "or leave it out"
            )
        return io.TextIOWrapper(content, encoding=encoding, errors=errors, newline=newline)
    except BaseException:
        content.close()
        raise


def read_text(path: str, *, errors: str = "replace") -> str:
    """The text of a file, decompressed and decoded as that of a corpus.

    Raises InputError if it cannot be read, and with `errors` "strict" for invalid characters.
    """
    try:
        with open_text(_corpus_file(Path(path), Path(path).parent), errors=errors) as content:
            return content.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid {error.encoding.upper()} ({error.reason}); convert it") from error
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{path} cannot be read ({reason}); give a text file") from error


_BETWEEN_VALUES = re.compile(r"[\s,]*")


def json_values(file: IO[str]) -> Iterator[Any]:
    """The elements of a JSON array, or the JSON values of a file that holds one after another, as a stream.

    Raises ValueError for text that is not JSON, and RecursionError for deep nesting.
    """
    decoder = json.JSONDecoder()
    text, start, ended, is_array = "", 0, False, None
    while True:
        start = _BETWEEN_VALUES.match(text, start).end()  # pyright: ignore[reportOptionalMemberAccess]
        if is_array is None and start < len(text):
            is_array = text[start] == "["
            start += is_array
            continue
        if is_array and text[start : start + 1] == "]":
            rest = text[start + 1 :]
            while rest.isspace() or not rest:
                if not (rest := file.read(_JSON_CHARACTERS)):
                    return
            raise ValueError("text follows the array")
        failure = None
        if start < len(text):
            try:
                value, stop = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                failure = error
                unfinished = error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
                if ended or not unfinished:
                    raise
            else:
                if ended or stop < len(text):  # a number at the end of the text may continue
                    start = stop
                    yield value
                    continue
        block = file.read(max(_JSON_CHARACTERS, len(text) - start))
        ended = not block
        text, start = text[start:] + block, 0
        if ended and not text:
            if is_array:
                raise failure or ValueError("the array has no end")
            return
