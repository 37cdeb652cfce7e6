"""Every kind of corpus gives its documents, and bad ones are named with file, line and field."""

import gzip
import json
import sys
import types

import pytest

from nextllm_jax.config import DataConfig
from nextllm_jax.data import corpora
from nextllm_jax.data.corpora import Document, document_hash, read_documents, validation_limit
from nextllm_jax.errors import InputError

ROWS = [{"text": "first\nrow", "id": 1}, {"text": "zweite Zeile ü", "id": 2}, {"text": "", "id": 3}]


def read(corpus, **settings):
    return list(read_documents(DataConfig(corpus=str(corpus), **settings)))


def texts(corpus, **settings):
    return [document.text for document in read(corpus, **settings)]


EXPECTED = [row["text"] for row in ROWS[:2]]


def test_the_standard_library_without_tests_and_empty_files():
    documents = read("stdlib")
    names = [str(document.group) for document in documents]
    assert len(names) > 300
    assert names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [
        name for name in names if {"test", "tests", "site-packages", "encodings", "pydoc_data"} & set(name.split("/"))
    ]
    assert all(document.text for document in documents)
    held_out = sum(document_hash(document) <= 0.05 * 2**64 for document in documents)
    assert 0.02 < held_out / len(documents) < 0.08


def test_a_directory_gives_its_files_by_relative_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "one.txt").write_text("one")
    (tmp_path / "a.md").write_bytes("\ufeffzwei\r\nü".encode())
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "rows.jsonl").write_text('{"text": "row"}\n')
    assert [(document.text, document.location) for document in read(tmp_path)] == [
        ("zwei\r\nü", f"{tmp_path}/a.md"),
        ("one", f"{tmp_path}/b/one.txt"),
        ("row", f"{tmp_path}/rows.jsonl line 1"),
    ]


def test_a_file_and_a_glob(tmp_path):
    for name in ("x1.txt", "x2.txt", "y.txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "y.txt") == ["y.txt"]
    assert texts(tmp_path / "x*.txt") == ["x1.txt", "x2.txt"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x3.txt").write_text("x3.txt")
    assert texts(f"{tmp_path}/**/x[123].txt") == ["x3.txt", "x1.txt", "x2.txt"]


def test_invalid_utf8_is_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ok \xff\xfe ok")
    assert read(tmp_path)[0].text == "ok \ufffd\ufffd ok"


@pytest.mark.parametrize("length", [1, 99, 100, 101, 200, 1000])
def test_a_long_file_is_cut_into_sections_at_line_ends(tmp_path, monkeypatch, length):
    monkeypatch.setattr(corpora, "SECTION_CHARACTERS", 100)
    text = "".join(f"line {number} é\n" for number in range(100))[:length]
    (tmp_path / "long.txt").write_text(text)
    sections = read(tmp_path)
    assert "".join(section.text for section in sections) == text
    assert all(len(section.text) <= 100 for section in sections)
    assert all(section.text.endswith("\n") for section in sections[:-1])
    file = str(tmp_path / "long.txt")
    assert [section.location for section in sections] == (
        [file] if length <= 100 else [f"{file} section {number}" for number in range(1, len(sections) + 1)]
    )


def test_a_file_without_line_ends_is_cut_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "SECTION_CHARACTERS", 100)
    (tmp_path / "long.txt").write_text("x" * 250)
    assert [len(section.text) for section in read(tmp_path)] == [100, 100, 50]


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl_rows(tmp_path, packed):
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    content = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n\n"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert texts(path) == EXPECTED


def test_lone_surrogates_of_json_are_replaced(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\ud800b \\ud83c\\udf89"}\n')
    assert read(tmp_path)[0].text == "a\ufffdb 🎉"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"rows.jsonl line 2 has no field 'text'; it has body; set data.text_field"),
        ('{"text": 5}', r"rows.jsonl line 2: field 'text' is int, not text"),
        ('{"text": "x"', r"rows.jsonl line 2 is not JSON"),
        (
            '{"messages": []}',
            r"it has messages; set data.messages_field messages to train on conversations, or data.text",
        ),
        ("[1]", r"rows.jsonl line 2 has no field 'text'"),
    ],
)
def test_bad_jsonl_names_file_line_and_field(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_a_truncated_gzip_is_refused(tmp_path):
    content = gzip.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "rows.jsonl.gz").write_bytes(content[:-20])
    with pytest.raises(InputError, match=r"rows.jsonl.gz cannot be read"):
        read(tmp_path)


def test_parquet_rows(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert texts(tmp_path) == EXPECTED
    with pytest.raises(InputError, match=r"rows.parquet has no field 'body'; it has text, id"):
        read(tmp_path, text_field="body")
    parquet.write_table(arrow.table({"text": ["a", None]}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows.parquet row 2: field 'text' is NoneType"):
        read(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"rows.parquet cannot be read as parquet"):
        read(tmp_path)


def test_a_missing_extra_names_the_pip_command(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'nextllm_jax\[parquet\]'"):
        read(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'nextllm_jax\[hf\]'"):
        read("hf:some/name")


def test_huggingface_rows_are_streamed_with_the_settings(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts("hf:some/name", hf_config="small", hf_split="test") == EXPECTED
    assert calls == [(("some/name", "small"), {"split": "test", "streaming": True})]
    with pytest.raises(InputError, match=r"row 1 has no field 'body'; it has text, id"):
        read("hf:some/name", text_field="body")


@pytest.mark.filterwarnings("ignore")  # of the datasets package and its own dependencies
def test_huggingface_directories_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the hf extra is not installed")
    arrow = pytest.importorskip("pyarrow")
    table = datasets.Dataset(arrow.Table.from_pylist(ROWS), fingerprint="0123456789abcdef")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "many")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    for name in ("one", "many", "files"):
        assert texts(f"hf:{tmp_path / name}") == EXPECTED


def test_huggingface_errors_become_one_sentence(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"hf:some/name .* cannot be read: ConnectionError no route$"):
        read("hf:some/name")


def test_missing_files_and_archives_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no text"):
        read(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no text"):
        read(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(InputError, match="is compressed"):
        read(tmp_path / "a.tar.gz")


def test_the_validation_limit_holds_out_at_least_one_document():
    documents = [Document(f"text {number}", "") for number in range(200)]
    limit = validation_limit(documents, 0.1)
    assert limit == int(0.1 * 2**64)
    assert 8 < sum(document_hash(document) <= limit for document in documents) < 35
    few = documents[:3]
    limit = validation_limit(few, 1e-9)
    assert sum(document_hash(document) <= limit for document in few) == 1
    with pytest.raises(InputError, match="one document"):
        validation_limit(few[:1], 0.5)
    with pytest.raises(InputError, match="no text"):
        validation_limit([], 0.5)


@pytest.mark.parametrize("name", ["", "./nowhere", "/nowhere/at/all", "~/texts", "a/b/c", "two words"])
def test_a_huggingface_name_that_is_no_name_and_no_directory_is_refused(name):
    with pytest.raises(InputError, match=rf"data.corpus hf:{name}: '{name}' is not a directory, NAME or OWNER/NAME"):
        read(f"hf:{name}")
