"""Which files of a corpus are read, in which forms, and what is reported of the others."""

import bz2
import gzip
import io
import json
import lzma
import os

import pytest

from nextllm_jax.cli.text import read_text
from nextllm_jax.config import DataConfig
from nextllm_jax.data import files
from nextllm_jax.data.corpora import read_documents
from nextllm_jax.data.files import find_files, json_values
from nextllm_jax.data.prepare import prepare
from nextllm_jax.errors import InputError

ROWS = [{"text": f"row {number}"} for number in range(3)]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def texts(corpus, **settings):
    return [document.text for document in read_documents(DataConfig(corpus=str(corpus), **settings))]


def zst(content):
    """Two frames after a skippable one, as parallel compressors write them."""
    arrow = pytest.importorskip("pyarrow")
    sink = arrow.BufferOutputStream()
    for part in (content[:9], content[9:]):
        with arrow.CompressedOutputStream(frame := arrow.BufferOutputStream(), "zstd") as stream:
            stream.write(part)
        sink.write(frame.getvalue())
    return b"\x50\x2a\x4d\x18\x04\0\0\0skip" + sink.getvalue().to_pybytes()


def parquet(_):
    arrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table.write_table(arrow.Table.from_pylist(ROWS), sink := io.BytesIO())
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.JSONL", bytes), ("x.ndjson", bytes), ("x.NDJSON.gz", gzip.compress), ("x.jsonl.GZ", gzip.compress),
        ("x.jsonl.bz2", bz2.compress), ("x.jsonl.xz", lzma.compress), ("x.jsonl.zst", zst), ("x.PARQUET", parquet),
        ("x.json", bytes), ("x.Json.gz", lambda _: gzip.compress(json.dumps(ROWS, indent=1).encode())),
        ("x.json", lambda _: b"\xef\xbb\xbf [ " + LINES.strip().replace(b"\n", b"\n,") + b"] "),
        ("x.json", lambda _: b"".join(json.dumps(row, indent=2).encode() for row in ROWS)),
        ("x.jsonl", lambda content: content.decode().encode("utf-16")),
        ("x.jsonl", lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n\n")),
    ],
)  # fmt: skip
def test_rows_are_read_in_every_form_by_name_and_in_a_directory(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(LINES))
    assert texts(tmp_path / name) == TEXTS
    assert texts(tmp_path) == TEXTS
    assert not find_files(DataConfig(corpus=str(tmp_path))).skipped


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.TXT", "Zoë\r\n🎉".encode()), ("x.txt.gz", gzip.compress("Zoë\r\n🎉".encode(), mtime=0)),
        ("x.md.ZST", zst), ("x.txt", "Zoë\r\n🎉".encode("utf-16")),
        ("x.txt", b"\xfe\xff" + "Zoë\r\n🎉".encode("utf-16-be")),
        ("x.txt", "Zoë\r\n🎉".encode("utf-32")), ("x.txt.xz", lzma.compress("Zoë\r\n🎉".encode("utf-8-sig"))),
    ],
)  # fmt: skip
def test_text_is_read_in_every_form(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content("Zoë\r\n🎉".encode()))
    assert texts(tmp_path / name) == texts(tmp_path) == ["Zoë\r\n🎉"]
    assert read_text(str(tmp_path / name)) == "Zoë\r\n🎉", "as nextllm evaluate --text reads it"


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zst])
def test_a_truncated_file_is_named(tmp_path, pack):
    name = {gzip.compress: "x.gz", bz2.compress: "x.bz2", lzma.compress: "x.xz", zst: "x.zst"}[pack]
    (tmp_path / name).write_bytes(pack(os.urandom(300).hex().encode())[:-20])
    with pytest.raises(InputError, match=rf"{name} cannot be read"):
        texts(tmp_path / name)
    (tmp_path / name).write_bytes(b"no compressed file")
    with pytest.raises(InputError, match=rf"{name} cannot be read"):
        texts(tmp_path / name)


@pytest.mark.parametrize("content", ["plain text".encode("utf-16-le"), bytes(range(256)) + bytes(99)])
def test_binary_content_is_refused_instead_of_becoming_text(tmp_path, content):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"x.txt is not UTF-8 text: .*no byte order mark"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "pack"),
    [("x.txt", gzip.compress), ("x.jsonl", bz2.compress), ("x.json", lzma.compress), ("x.jsonl.zstd", zst)],
)
def test_compressed_text_without_its_suffix_is_not_text(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(b"".join(b'{"text": "%d"}\n' % (i**5) for i in range(2000))))
    with pytest.raises(InputError, match=rf"{name} is not text but .* data; name it "):
        texts(tmp_path / name)


def test_one_line_reports_what_is_skipped(tmp_path, messages):
    corpus = tmp_path / "corpus"
    (corpus / "sub").mkdir(parents=True)
    for number in range(3):
        (corpus / f"{number}.txt").write_text(f"text {number}")
    (corpus / "a.png").write_bytes(b"\x89PNG")
    (corpus / "sub" / "b.PNG").write_bytes(b"\x89PNG")
    (corpus / "README").write_text("no suffix" * 1000)
    (corpus / "package.json").write_text('{"name": "x"}')
    (corpus / "broken.json").write_text('[{"text": "x"')
    (corpus / ".hidden").write_text("hidden")
    (corpus / "link.txt").symlink_to("nowhere.txt")
    (corpus / "all.tar.gz").write_bytes(gzip.compress(b"x", mtime=0))
    prepare(DataConfig(corpus=str(corpus), vocab_size=260, num_processes=1), tmp_path / "out")
    (line,) = [text for text in messages.messages if "skipped" in text]
    assert "\n" not in line
    assert "read 3 files (18 bytes) and skipped 8 (9.07 kB): " in line
    for kind in ("1 without a suffix (9 kB)", "2 .png (8 bytes)", "2 .json without rows that have the field 'text' (26",
                 "1 .tar.gz", ", 1 hidden", "1 links to nothing (11 bytes)"):  # fmt: skip
        assert kind in line
    for path in corpus.glob("*.txt"):
        path.unlink()
    with pytest.raises(InputError, match=r"holds no text \(read 0 files .* skipped 7 .* 1 without a suffix"):
        texts(corpus)


def test_directories_are_followed_through_links_without_going_in_circles(tmp_path):
    (tmp_path / "corpus" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("far")
    (tmp_path / "corpus" / "near.txt").write_text("near")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "a" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "corpus" / "a")
    (tmp_path / "corpus" / "a" / "over").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "itself.txt").symlink_to("itself.txt")
    assert set(texts(tmp_path / "corpus")) == {"near", "far"}
    assert find_files(DataConfig(corpus=str(tmp_path / "corpus"))).skipped["links to a directory above"][0] > 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every directory")
def test_a_directory_that_may_not_be_read_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match="closed cannot be read: Permission denied"):
        texts(tmp_path)


def test_text_files_beside_conversations_are_skipped_in_a_directory(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}))
    (tmp_path / "README.md").write_text("about the talks")
    assert len(texts(tmp_path, messages_field="messages")) == 1
    assert find_files(DataConfig(corpus=str(tmp_path), messages_field="messages")).skipped
    with pytest.raises(InputError, match=r"README.md has no rows"):
        texts(tmp_path / "README.md", messages_field="messages")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_json_is_read_as_a_stream(monkeypatch, size):
    monkeypatch.setattr(files, "_JSON_CHARACTERS", size)
    values = [{"text": "a ] [ , \\" + "x" * 30}, 12345, [1, [2]], "é\ud800", True, None, -1.5e-3]
    assert list(json_values(io.StringIO(json.dumps(values, indent=1)))) == values
    assert list(json_values(io.StringIO("\n".join(map(json.dumps, values))))) == values
    assert list(json_values(io.StringIO(" []\n"))) == list(json_values(io.StringIO(" "))) == []
    for bad in ('[{"a": 1}, {"b": ', "[1, 2", "[1] 2", '{"a": nope}' + " " * 50, "["):
        with pytest.raises(ValueError, match=r"."):
            list(json_values(io.StringIO(bad)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"}, {"body": "b"}]', "x.json row 2 has no field 'text'; it has body"),
        ('[{"text": "a"}, {"text": "b"', "x.json row 2 is not JSON"),
        ('{"data": [{"text": "a"}]}', "x.json line 1 has no field 'text'; it has data"),
        ('[{"text": "a"}, ' + "[" * 100_000 + "]" * 100_000 + "]", "x.json row 2 is nested too deeply"),
    ],
)
def test_bad_json_names_the_file_and_the_row(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=words):
        texts(tmp_path / "x.json")
