"""Reads rows from files of JSON, from parquet and from Hugging Face datasets, and counts what is skipped."""

import contextlib
import datetime
import decimal
import json
import os
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from nextllm_jax.config import DataConfig
from nextllm_jax.data.files import CorpusFile, import_extra, json_values, open_text
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.tokenizer import without_surrogates

Row = tuple[Any, str]
"""The value of a row, or an InputError if the row cannot be parsed, and its location."""

TOOLS_FIELD = "tools"
"""The field with the tools of a conversation, if a row has one."""

_MAX_DEPTH = 100


class Skipped:
    """What one pass over a corpus skips: duplicates, and at most `config.skip_bad_rows` bad rows."""

    def __init__(self, config: DataConfig) -> None:
        self._allowed = config.skip_bad_rows
        self.bad_rows: list[str] = []
        """The error of each bad row."""
        self.duplicates = 0

    def add_bad_rows(self, *errors: str) -> None:
        """Count bad rows. Raises InputError if they are too many."""
        self.bad_rows += errors
        if len(self.bad_rows) <= self._allowed:
            return
        if self._allowed:
            raise InputError(f"more than data.skip_bad_rows {self._allowed:,} rows are bad, such as {self._first()}")
        raise InputError(f"{self.bad_rows[0]}; data.skip_bad_rows N skips up to N such rows")

    def describe_bad_rows(self) -> str | None:
        """A line with the number and the first of the bad rows, if there are any."""
        return f"skipped {len(self.bad_rows):,} bad rows, such as {self._first()}" if self.bad_rows else None

    def _first(self) -> str:
        return "; ".join(f"({number}) {error}" for number, error in enumerate(self.bad_rows[:3], 1))


def field_of(config: DataConfig) -> tuple[str, str]:
    """The field that is read from each row, and the setting that names it."""
    if config.messages_field:
        return config.messages_field, "data.messages_field"
    return config.text_field, "data.text_field"


def missing_field(config: DataConfig, names: Sequence[str]) -> str:
    """What an error says of a row with the fields `names`, which lacks the field that is read."""
    field, setting = field_of(config)
    talks = [name for name in ("messages", "conversations") if name in names]
    if talks and not config.messages_field:
        setting = f"data.messages_field {talks[0]} to train on conversations, or {setting}"
    return f"no field '{field}'; it has {', '.join(names) or 'none'}; set {setting}"


def read_rows(file: CorpusFile, config: DataConfig) -> Generator[Row, None, None]:
    """The rows of a file of JSON lines, of a JSON array or of parquet, as a stream.

    Raises InputError for a damaged file, and one of READ_ERRORS if it cannot be read.
    """
    if file.kind == "parquet":
        return _parquet_rows(file.path, config)
    return _json_lines(file) if file.kind == "lines" or _holds_lines(file) else _json_values(file)


def _holds_lines(file: CorpusFile) -> bool:
    """Whether a .json file has a row in each line. Then a bad row does not make the others unreadable."""
    with open_text(file) as content:
        if content.read(4096).lstrip()[:1] in ("[", ""):
            return False
    with open_text(file) as content, contextlib.suppress(ValueError, RecursionError):
        json.loads(next(line for line in content if line.strip()))
        return True
    return False


def _json_lines(file: CorpusFile) -> Generator[Row, None, None]:
    with open_text(file, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file.path} line {number}"
            line = line.removeprefix("\ufeff")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                row = InputError(f"{where} is nested too deeply; fix or remove the line")
            except ValueError as error:
                row = InputError(f"{where} is not JSON ({error}); fix or remove the line")
            yield row, where


def _json_values(file: CorpusFile) -> Generator[Row, None, None]:
    number = 0
    try:
        with open_text(file) as content:
            for number, row in enumerate(json_values(content), 1):
                yield row, f"{file.path} row {number}"
    except RecursionError as error:
        raise InputError(f"{file.path} row {number + 1} is nested too deeply; fix or remove it") from error
    except ValueError as error:
        raise InputError(f"{file.path} row {number + 1} is not JSON ({error}); fix the file") from error


def _parquet_rows(path: Path, config: DataConfig) -> Generator[Row, None, None]:
    field, _ = field_of(config)
    arrow = import_extra("pyarrow", "parquet", f"data.corpus file {path}")
    parquet = import_extra("pyarrow.parquet", "parquet", f"data.corpus file {path}")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise InputError(f"{path} has {missing_field(config, names)}")
            number, chosen = 0, [field]
            if config.messages_field and TOOLS_FIELD in names:
                chosen.append(TOOLS_FIELD)
            for batch in file.iter_batches(batch_size=256, columns=chosen):
                columns = [_to_plain(arrow, batch.column(name)).to_pylist() for name in chosen]
                for values in zip(*columns, strict=True):
                    number += 1
                    row = dict(zip(chosen, values, strict=True))
                    yield _without_nulls(row) if config.messages_field else row, f"{path} row {number}"
    except (arrow.ArrowException, ValueError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error


def _to_plain(arrow: Any, column: Any) -> Any:
    """A column whose values Python and JSON can hold: strings as bytes, since they may be invalid; dates as text."""
    types = arrow.types

    def plain(kind: Any) -> Any:
        if types.is_string(kind) or types.is_string_view(kind):
            return arrow.binary()
        if types.is_large_string(kind):
            return arrow.large_binary()
        if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind) or types.is_decimal(kind):
            return arrow.string()
        if types.is_dictionary(kind):
            return plain(kind.value_type)
        if types.is_map(kind):
            return arrow.map_(plain(kind.key_type), plain(kind.item_type))
        if types.is_struct(kind):
            return arrow.struct([field.with_type(plain(field.type)) for field in kind])
        if types.is_list(kind):
            return arrow.list_(kind.value_field.with_type(plain(kind.value_type)))
        if types.is_large_list(kind):
            return arrow.large_list(kind.value_field.with_type(plain(kind.value_type)))
        return kind

    try:
        return column.cast(plain(column.type))
    except (arrow.ArrowNotImplementedError, arrow.ArrowInvalid):
        return column


def _without_nulls(value: Any) -> Any:
    """The value without null members: a column of structs has them for each member that any other row has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def huggingface_rows(config: DataConfig) -> Generator[Row, None, None]:
    """The rows of the dataset that `config.corpus` names as hf:NAME. Raises InputError."""
    name = config.corpus.removeprefix("hf:")
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    if not is_name and not os.path.isdir(name):
        raise InputError(f"data.corpus {config.corpus}: '{name}' is not a directory, NAME or OWNER/NAME; check it")
    datasets = import_extra("datasets", "hf", f"data.corpus {config.corpus}")
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
            rows = rows[config.hf_split] if (Path(name) / "dataset_dict.json").is_file() else rows
        else:
            rows = datasets.load_dataset(name, config.hf_config, split=config.hf_split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield (
                _without_nulls(row) if config.messages_field else row,
                f"data.corpus {config.corpus} row {number}",
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise InputError(
            f"data.corpus {config.corpus} (configuration {config.hf_config}, split {config.hf_split}) cannot be read: "
            f"{type(error).__name__} {' '.join(reason)}"
        ) from error


def plain_value(value: Any, where: str, depth: int = 0) -> Any:
    """A value with only what JSON can hold: bytes as UTF-8, dates and decimal numbers as text, others as null.

    Lone surrogates and invalid UTF-8 become U+FFFD. Raises InputError for deep nesting.
    """
    if depth > _MAX_DEPTH:
        raise InputError(f"{where} is nested more than {_MAX_DEPTH} levels deep; fix or remove the row")
    if isinstance(value, str):
        return without_surrogates(value)  # which JSON can contain
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {plain_value(str(key), where): plain_value(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item, where, depth + 1) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return value if isinstance(value, int | float) else None
