"""Rows that are odd but usable are read, and bad ones are named, or skipped and counted."""

import datetime
import decimal
import json

import pytest

pytest.importorskip("jinja2", reason="pip install '.[interop]'")

from nextllm_jax.config import DataConfig
from nextllm_jax.data import prepare as prepare_module
from nextllm_jax.data.conversations import encode_conversation
from nextllm_jax.data.corpora import read_documents
from nextllm_jax.data.prepare import prepare
from nextllm_jax.data.shards import SPLITS, Dataset
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.chat import ChatTemplate
from tests.tokenizer.test_chat import CHATML, tokenizer

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}


def read(corpus, **settings):
    return list(read_documents(DataConfig(corpus=str(corpus), **settings)))


def messages_of(corpus):
    return [json.loads(document.text) for document in read(corpus, messages_field="messages")]


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def write_parquet(path, columns):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path


def invalid_strings(values):
    """A column of strings, of which parquet does not check that they are UTF-8."""
    arrow = pytest.importorskip("pyarrow")
    return arrow.Array.from_buffers(arrow.string(), len(values), arrow.array(values, arrow.binary()).buffers())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.datetime(2024, 1, 2, 3), "2024-01-02 03:00:00.000000"),
        (datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), "2024-01-02 00:00:00.000000Z"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (datetime.time(3), "03:00:00.000000"),
        (decimal.Decimal("1.5"), "1.5"),
        (b"x\xff", "x\ufffd"),
        (datetime.timedelta(1), None),
        (float("inf"), float("inf")),
        ([("k", b"v")], [["k", "v"]]),
    ],
)
def test_members_that_json_cannot_hold_become_text_or_are_left_out(tmp_path, value, text):
    arrow = pytest.importorskip("pyarrow")
    kind = arrow.map_(arrow.string(), arrow.binary()) if isinstance(value, list) else arrow.array([value]).type
    message = arrow.struct([("role", arrow.string()), ("content", arrow.string()), ("extra", kind)])
    rows = arrow.array([[{**USER, "extra": value}, {**ASSISTANT, "extra": None}]], arrow.list_(message))
    extra = {} if text is None else {"extra": text}
    assert messages_of(write_parquet(tmp_path / "x.parquet", {"messages": rows})) == [[{**USER, **extra}, ASSISTANT]]


def test_parquet_gives_the_messages_of_json(tmp_path):
    """A column of structs has a null for each member that other messages have."""
    plain = {**CALL, "function": {"name": "f", "arguments": {"x": 1}}}
    rows = [[USER, {"role": "assistant", "content": None, "tool_calls": [plain]}], [USER, {**ASSISTANT, "name": "n"}]]
    expected = messages_of(write_rows(tmp_path / "x.jsonl", rows))
    assert expected[0][1] == {"role": "assistant", "content": "", "tool_calls": [plain]}
    assert messages_of(write_parquet(tmp_path / "x.parquet", {"messages": rows})) == expected


def test_invalid_utf8_in_parquet_is_replaced(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    texts = invalid_strings([b"ab\xff", "é".encode()])
    for column in (texts, texts.dictionary_encode(), texts.view(arrow.binary())):
        path = write_parquet(tmp_path / "x.parquet", {"text": column})
        assert [document.text for document in read(path)] == ["ab\ufffd", "é"]
    roles = arrow.array(["assistant", "assistant"])
    structs = arrow.StructArray.from_arrays([roles, texts], ["role", "content"])
    talks = arrow.ListArray.from_arrays([0, 2], structs)
    (found,) = messages_of(write_parquet(tmp_path / "x.parquet", {"messages": talks}))
    assert [message["content"] for message in found] == ["ab\ufffd", "é"]


def test_lone_surrogates_are_replaced_everywhere_in_messages(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"messages": [{"role": "assistant", "content": "a\\ud800 \\ud83c\\udf89", "\\udfff": ["\\udc00"]}]}\n'
    )
    assert messages_of(path) == [[{"role": "assistant", "content": "a\ufffd 🎉", "\ufffd": ["\ufffd"]}]]


@pytest.mark.parametrize("depth", [101, 900, 100_000])
def test_deep_nesting_is_named(tmp_path, depth):
    (tmp_path / "x.jsonl").write_text(
        '{"messages": [{"role": "assistant", "content": "a", "x": ' + "[" * depth + "]" * depth + "}]}\n"
    )
    with pytest.raises(InputError, match=r"x.jsonl line 1 is nested"):
        messages_of(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None, "tool_calls": [CALL]}, {"content": "", "tool_calls": [CALL]}),
        ({"tool_calls": [CALL]}, {"content": "", "tool_calls": [CALL]}),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"content": "a\nb"}),
        ({"content": None, "function_call": CALL["function"]}, {"content": "", "tool_calls": [CALL]}),
        ({"content": ["a"], "name": None}, {"content": "a"}),
    ],
)
def test_forms_of_content(tmp_path, message, expected):
    tool = {"role": "tool", "content": "42", "tool_call_id": "1"}
    rows = [[USER, {"role": "assistant", **message}, tool]]
    assert messages_of(write_rows(tmp_path / "x.jsonl", rows)) == [[USER, {"role": "assistant", **expected}, tool]]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": None}, "message 1: the content is NoneType"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "message 1: the content is NoneType"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}, "message 1: part 1 .* no text"),
        ({"from": "robot", "value": "x"}, "message 1 has the role 'robot'"),
        ({"from": "gpt"}, "message 1: the content is NoneType"),
        ({"role": ["assistant"], "content": "a"}, "message 1 has the role"),
    ],
)
def test_messages_without_a_meaning_are_named(tmp_path, message, words):
    with pytest.raises(InputError, match=rf"x.jsonl line 1: {words}"):
        messages_of(write_rows(tmp_path / "x.jsonl", [[message]]))


def test_sharegpt_messages_and_columns_of_messages(tmp_path):
    rows = [
        {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1},
        {"from": "observation", "value": "o"}, {"from": "assistant", "value": "b"},
    ]  # fmt: skip
    expected = [("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "o"), ("assistant", "b")]
    (found,) = messages_of(write_rows(tmp_path / "x.jsonl", [rows]))
    assert [(message["role"], message["content"]) for message in found] == expected
    assert found[2]["weight"] == 1
    columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    assert messages_of(write_rows(tmp_path / "x.jsonl", [columns])) == [[USER, ASSISTANT]]
    with pytest.raises(InputError, match=r"x.jsonl line 1: the lists of the messages' members differ in length"):
        messages_of(write_rows(tmp_path / "x.jsonl", [{**columns, "content": ["q", "a", "lost"]}]))


def test_other_names_of_roles(tmp_path):
    rows = [[{"role": "human", "content": "q"}, {"role": name, "value": "a"}] for name in ("gpt", "chatgpt", "model")]
    assert messages_of(write_rows(tmp_path / "x.jsonl", rows)) == [[USER, ASSISTANT]] * 3


SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "default": False}}}


def test_tools_of_a_row_are_a_list_or_its_json(tmp_path):
    forms = [[SCHEMA], json.dumps([SCHEMA]), [], "", "[]", None]
    rows = [{"messages": [USER, ASSISTANT], "tools": tools} for tools in forms]
    with_tools = {"messages": [USER, ASSISTANT], "tools": [SCHEMA]}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert messages_of(tmp_path / "x.jsonl") == [with_tools] * 2 + [[USER, ASSISTANT]] * 4
    for column in ([[SCHEMA], None], [json.dumps([SCHEMA]), None]):
        columns = {"tools": column, "id": [1, 2], "messages": [[USER, ASSISTANT]] * 2}
        assert messages_of(write_parquet(tmp_path / "x.parquet", columns)) == [with_tools, [USER, ASSISTANT]]
    for wrong in ("search", ["search"], {"name": "f"}, 3):
        (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [USER, ASSISTANT], "tools": wrong}))
        with pytest.raises(InputError, match=r"x.jsonl line 1: tools is not a list of JSON schemas"):
            messages_of(tmp_path / "x.jsonl")


def test_the_developer_is_the_system_unless_the_template_knows_the_role():
    talk = [{"role": "developer", "content": "rules"}, USER, ASSISTANT]
    dropping = "{% if messages[0].role == 'system' %}<s>{{ messages[0].content }}{% endif %}" + CHATML
    for template, expected in [
        (dropping, "<s>rules"),
        (dropping.replace("'system'", "'developer'"), "<s>rules"),
        (CHATML, "<|im_start|>system\nrules"),
    ]:
        made = tokenizer(template)
        (encoded,) = encode_conversation(made, ChatTemplate(made), json.dumps(talk), "here")
        assert made.decode(encoded.ids).startswith(expected)


BAD = ['{"messages": 1}', "no json", '{"messages": [{"role": "assistant", "content": "refused"}]}', "[" * 100_000]


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """Twenty good rows and four bad ones, of which one is refused only by the template."""
    monkeypatch.chdir(tmp_path)
    template = "{% if 'refused' in messages[0].content %}{{ raise_exception('no thanks') }}{% endif %}" + CHATML
    tokenizer(template).save(tmp_path / "tokenizer")
    talks = [[{**USER, "content": f"q{number}"}, ASSISTANT] for number in range(20)]
    lines = [json.dumps({"messages": talk}) for talk in talks]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines[:10], *BAD, *lines[10:]]))
    return {"corpus": "x.jsonl", "messages_field": "messages", "tokenizer": "tokenizer", "num_processes": 1}


def num_documents(path):
    return sum(Dataset.open(path).split(name).num_documents for name in SPLITS)


def test_bad_rows_are_skipped_up_to_a_number_and_reported(mixed, tmp_path, messages, monkeypatch):
    with pytest.raises(InputError, match=r"x.jsonl line 11: .*; data.skip_bad_rows N skips"):
        prepare(DataConfig(**mixed), tmp_path / "none")
    with pytest.raises(
        InputError, match=r"more than data.skip_bad_rows 2 rows are bad, such as \(1\) x.jsonl line 11: "
    ):
        prepare(DataConfig(**mixed, skip_bad_rows=2), tmp_path / "few")
    with pytest.raises(InputError, match=r"more than data.skip_bad_rows 3 rows are bad"):
        prepare(DataConfig(**mixed, skip_bad_rows=3), tmp_path / "few")
    messages.clear()
    prepare(DataConfig(**mixed, skip_bad_rows=4), tmp_path / "data")
    (line,) = [text for text in messages.messages if "bad rows" in text]
    assert line.startswith("skipped 4 bad rows, such as (1) x.jsonl line 11: ")
    assert "(3)" in line
    assert num_documents(tmp_path / "data") == 20
    # An interrupted preparation still knows what the finished parts left out.
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", lambda *args: (_ for _ in ()).throw(RuntimeError("stopped")))
        patch.setattr(prepare_module, "write_index", lambda *args: None)
        with pytest.raises(RuntimeError, match="stopped"):
            prepare(DataConfig(**mixed, skip_bad_rows=4), tmp_path / "again")
    messages.clear()
    prepare(DataConfig(**mixed, skip_bad_rows=4), tmp_path / "again")
    assert "skipped 4 bad rows" in messages.text


def test_bad_rows_of_parquet_and_of_arrays_are_skipped(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
    write_parquet(tmp_path / "x.parquet", {"text": [row["text"] for row in rows]})
    (tmp_path / "x.json").write_text(json.dumps([*rows, "text", {"body": "c"}]))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)) + '\n{"text": \n')
    for name in ("x.parquet", "x.json", "lines.json"):
        assert [document.text for document in read(tmp_path / name, skip_bad_rows=3)] == ["a", "b"]
