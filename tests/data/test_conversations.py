"""Conversations: ids and masks against transformers, windows against a plain loop, bad rows, and damage."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jinja2", reason="pip install '.[interop]'")

import itertools

from nextllm_jax.config import DataConfig
from nextllm_jax.data.packing import count_windows, describe_windows, read_batch
from nextllm_jax.data.prepare import prepare
from nextllm_jax.data.settings import default_data_path
from nextllm_jax.data.shards import SPLITS, Dataset
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.huggingface import save_huggingface
from nextllm_jax.training.samples import held_out_prompts
from tests.data.test_packing import make_split
from tests.tokenizer.test_chat import CHATML, FORGETFUL, GENERATION, TALK, tokenizer


def talk(number):
    """A conversation of its own, of one to three turns, with a system message in some."""
    system = [{"role": "system", "content": f"Be {number}."}] if number % 3 == 0 else []
    turns = [(f"question {number} {i}?", f"Ñoño {number * i}.") for i in range(number % 3 + 1)]
    return system + [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


TALKS = [talk(number) for number in range(20)]


def prepared(directory, talks=TALKS, *, template=GENERATION, field="messages", **options):
    """The data of these conversations, prepared with a tokenizer that has a chat template."""
    tokenizer(template).save(directory / "tokenizer")
    (directory / "talks.jsonl").write_text("".join(json.dumps({field: talk}) + "\n" for talk in talks))
    config = DataConfig(
        corpus=str(directory / "talks.jsonl"), messages_field=field, tokenizer=str(directory / "tokenizer"),
        num_processes=1, validation_fraction=0.3, **options,
    )  # fmt: skip
    prepare(config, directory / "data")
    return Dataset.open(directory / "data", verify="full")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("talks"), tokens_per_shard=1024)


def test_samples_answer_the_first_turns_of_held_out_conversations(tmp_path):
    """The prompts of samples.txt: the shortest, as the template writes them before an answer."""
    dataset = prepared(tmp_path, template=CHATML)
    theirs, split = tokenizer(CHATML), dataset.split("validation")
    held_out = [tuple(split.tokens(*ends).tolist()) for ends in itertools.pairwise(split.document_starts.tolist())]
    expected = []
    for each in TALKS:
        first = next(index for index, message in enumerate(each) if message["role"] == "assistant")
        ids = ChatTemplate(theirs).encode(each[:first])
        if any(document[: len(ids)] == tuple(ids) for document in held_out):
            expected.append(ids)
    found = held_out_prompts(split, dataset.tokenizer(), context_length=512)
    assert sorted(map(len, (prompt.ids for prompt in found))) == sorted(map(len, expected))[:3]
    assert all(prompt.ids in expected and prompt.text == theirs.decode(prompt.ids) for prompt in found)
    assert held_out_prompts(split, dataset.tokenizer(), context_length=4) == []


def documents(split):
    """(ids, in_loss) of each document of a split."""
    starts = split.document_starts.tolist()
    return [(split.tokens(a, b).tolist(), split.loss_mask(a, b).tolist()) for a, b in itertools.pairwise(starts)]


def test_ids_and_masks_are_those_of_transformers(dataset, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
    save_huggingface(dataset.tokenizer(), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = []
    for messages in TALKS:
        made = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        expected.append((made["input_ids"], [bool(said) for said in made["assistant_masks"]]))
    found = [document for name in SPLITS for document in documents(dataset.split(name))]
    assert sorted(found) == sorted(expected)
    assert 0 < dataset.split("validation").num_documents < len(TALKS)


def test_bytes_are_those_of_what_the_assistant_says(dataset):
    said = sum(len(m["content"].encode()) for talk in TALKS for m in talk if m["role"] == "assistant")
    assert sum(dataset.split(name).num_bytes for name in SPLITS) == said


def test_without_generation_blocks_the_assistant_s_turns_and_their_end_are_learnt(tmp_path):
    data = prepared(tmp_path, [TALK, TALK[:2], *TALKS], template=CHATML)
    decode = data.tokenizer().decode
    said = [
        decode([token for token, is_said in zip(*document, strict=True) if is_said])
        for document in documents(data.split("train"))
    ]
    for text in said:
        assert text.endswith("<|im_end|>")
        assert "question" not in text
        assert "Be " not in text


def test_turns_that_a_template_rewrites_are_documents_as_they_were_written(tmp_path, caplog):
    ours = tokenizer(FORGETFUL)
    data = prepared(tmp_path, TALKS, template=FORGETFUL)
    found = [document for name in SPLITS for document in documents(data.split(name))]
    expected = [([*ids], [*mask]) for talk in TALKS for ids, mask in ChatTemplate(ours).encode_with_mask(talk)]
    assert sorted(found) == sorted(expected)
    assert len(found) == sum(message["role"] == "assistant" for talk in TALKS for message in talk) > len(TALKS)
    assert "will not learn to stop" not in caplog.text


def test_a_template_without_an_end_token_gives_a_warning(tmp_path, caplog):
    prepared(tmp_path, TALKS[:4], template=CHATML.replace("<|im_end|>", "<|end|>"))
    assert caplog.text.count("the model will not learn to stop") == 1


def test_tools_reach_the_template_and_one_that_ignores_them_gives_a_warning(tmp_path, caplog):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    schema = {"type": "function", "function": {"name": "f"}}
    rows = [
        {"messages": [*talk, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [schema]}
        for talk in TALKS[:4]
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calling = "{{ message.tool_calls | tojson if message.tool_calls }}{{ message.content }}"
    whole = "{{ tools | tojson }}" + GENERATION.replace("{{ message.content }}{{", calling + "{{")
    for template, warnings in ((whole, 0), (GENERATION, 2)):
        caplog.clear()
        tokenizer(template).save(tmp_path / "tokenizer")
        config = DataConfig(
            corpus=str(tmp_path / "x.jsonl"), messages_field="messages", tokenizer=str(tmp_path / "tokenizer"),
            num_processes=1, validation_fraction=0.5,
        )  # fmt: skip
        prepare(config, tmp_path / "data", overwrite=True)
        data = Dataset.open(tmp_path / "data")
        texts = [data.tokenizer().decode(ids) for name in SPLITS for ids, _ in documents(data.split(name))]
        assert all(text.startswith(json.dumps([schema])) for text in texts) == (not warnings)
        assert all(json.dumps([call]) in text for text in texts) == (not warnings)
        assert caplog.text.count("the chat template does not write the tool") == warnings


def plain_windows(lengths, sequence_length):
    """The tokens of each window, written out: whole documents while they fit, long ones in pieces."""
    windows, row, first = [], [], 0
    for length in lengths:
        document = list(range(first, first + length))
        first += length
        if row and len(row) + length > sequence_length + 1:
            windows.append(row)
            row = []
        row = row + document
        while len(row) > sequence_length + 1:
            windows.append(row[: sequence_length + 1])
            row = row[sequence_length:]
    return [*windows, row]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 9), st.randoms())
def test_windows_hold_whole_conversations_and_each_target_once(lengths, sequence_length, rng):
    in_loss = np.array([rng.random() < 0.5 for _ in range(sum(lengths))])
    split = make_split(lengths, in_loss=in_loss)
    windows = count_windows(split, sequence_length, partial=True)
    expected = plain_windows(lengths, sequence_length)
    batch = read_batch(split, np.arange(windows + 1), sequence_length)
    assert windows == len(expected) == count_windows(split, sequence_length, partial=False)
    for row, tokens in enumerate(expected):
        assert batch.tokens_BT[row, : len(tokens) - 1].tolist() == [token + 1 for token in tokens[:-1]]
        assert (batch.segment_ids_BT[row] > 0).sum() == len(tokens) - 1
    assert not batch.segment_ids_BT[windows].any()
    firsts = set(split.document_starts[:-1].tolist())
    wanted = [i + 1 for i in range(len(in_loss)) if in_loss[i] and i not in firsts]
    assert sorted(batch.targets_BT[batch.loss_mask_BT].tolist()) == wanted
    cut = sum(length > sequence_length + 1 for length in lengths)
    assert f"{cut} are longer" in str(describe_windows(split, sequence_length))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "a"}', ["line 21", "no field 'messages'", "data.messages_field"]),
        ('{"messages": "a"}', ["line 21", "not a list"]),
        ('{"messages": [{"role": "robot", "content": "a"}]}', ["line 21", "message 1", "'robot'", "assistant"]),
        ('{"messages": [{"role": "user", "content": null}]}', ["line 21", "message 1", "NoneType"]),
        ('{"messages": [{"role": "user", "content": "a"}]}', ["line 21", "the loss mask is empty"]),
        ('{"messages": [{"role": "assistant", "content": "refused"}]}', ["line 21", "refuses", "no thanks"]),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path, row, words):
    template = "{% if 'refused' in messages[0].content %}{{ raise_exception('no thanks') }}{% endif %}" + GENERATION
    tokenizer(template).save(tmp_path / "tokenizer")
    rows = [json.dumps({"messages": talk}) for talk in TALKS]
    (tmp_path / "talks.jsonl").write_text("\n".join([*rows, row]) + "\n")
    config = DataConfig(
        corpus=str(tmp_path / "talks.jsonl"), messages_field="messages", tokenizer=str(tmp_path / "tokenizer"),
        num_processes=1,
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        prepare(config, tmp_path / "data")
    for word in [*words, "talks.jsonl"]:
        assert word in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"corpus": "stdlib"}, "rows with messages"),
        ({"tokenizer": "train", "vocab_size": 300}, "needs a chat template"),
        ({"chat_template": "nowhere.jinja"}, "nowhere.jinja"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(tmp_path, options, words):
    tokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    config = {"corpus": str(tmp_path / "talks.jsonl"), "tokenizer": str(tmp_path / "tokenizer"), "num_processes": 1}
    with pytest.raises(InputError, match=words):
        prepare(DataConfig(**{**config, "messages_field": "messages", **options}), tmp_path / "data")


def test_a_template_of_one_s_own_is_kept_with_a_trained_tokenizer(tmp_path):
    (tmp_path / "mine.jinja").write_text(GENERATION)
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"turns": talk}) + "\n" for talk in TALKS))
    config = DataConfig(
        corpus=str(tmp_path / "talks.jsonl"), messages_field="turns", chat_template=str(tmp_path / "mine.jinja"),
        vocab_size=270, num_processes=1,
    )  # fmt: skip
    prepare(config, tmp_path / "data")
    assert Dataset.open(tmp_path / "data").tokenizer().chat_template == GENERATION


def test_a_flipped_bit_in_a_mask_is_found_and_masks_are_part_of_the_data(dataset, tmp_path):
    other = prepared(
        tmp_path,
        template=GENERATION.replace("{% generation %}{{ m", "{{ m").replace("{{ eos", "{% generation %}{{ eos"),
    )
    assert documents(other.split("train"))[0][0] == documents(dataset.split("train"))[0][0]
    assert other.data_id != dataset.data_id
    file = tmp_path / "data" / "train-mask-00000.bits"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"train-mask-00000\.bits is damaged"):
        Dataset.open(tmp_path / "data")


def test_data_of_texts_is_where_it_was():
    """The names of directories of prepared data must not change with settings that are for conversations alone."""
    named = DataConfig(corpus="hf:org/some-set", tokenizer="gpt2")
    assert default_data_path(dataclasses.replace(named, chat_template="x")) == default_data_path(named)
