"""Constrained text: the allowed tokens against an enumeration, valid output, and other rows in the batch."""

import json
import re

import numpy as np
import pytest

from nextllm_jax.config import SamplingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.inference.grammar import Grammars
from nextllm_jax.inference.scheduler import Scheduler
from nextllm_jax.inference.stream import TextStream
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.tokenizer import BOS, EOS, Tokenizer
from tests.inference.test_llm import llm  # noqa: F401  a fixture

pytest.importorskip("llguidance")
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
)


def allowed(constraint, size: int) -> set[int]:
    words_W = np.zeros(-(-size // 32), np.uint32)
    constraint.fill(words_W)
    return set(np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")[:size]).tolist())


def test_allowed_tokens_are_those_of_an_enumeration():
    """A regular expression over merged tokens: after each prefix, those whose text can still become a match."""
    ranks = {bytes([value]): value for value in range(256)} | {b"ab": 256, b"ba": 257, b"abab": 258, b"bc": 259}
    tokenizer = Tokenizer("merged", ByteBPE(ranks, r"[\s\S]+", {BOS: 260, EOS: 261}))
    make = Grammars(tokenizer).constraint(SamplingConfig(regex="(ab){1,3}c?"))
    assert make is not None
    matches = ["ab" * count + end for count in (1, 2, 3) for end in ("", "c")]
    for tokens in ([], [256], [97, 98], [97], [258], [258, 256], [97, 257], [258, 97, 259]):
        constraint = make()
        for token in tokens:
            constraint.accept(token)
        text = tokenizer.decode(tokens)
        expected = {
            token
            for token in range(260)
            if any(match.startswith(text + tokenizer.decode([token])) for match in matches)
        }
        assert allowed(constraint, 262) == expected | ({261} if text in matches else set())


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_text_follows_its_grammar(llm, temperature):  # noqa: F811
    settings = {"temperature": temperature, "top_p": 1.0, "max_new_tokens": 40, "num_samples": 3}
    for sample in llm.generate("", json_schema=json.loads(SCHEMA), **settings):
        assert sample.finish_reason == "stop"
        value = json.loads(sample.text)
        assert 0 <= value["a"] <= 99
        assert value["b"] in ("x", "yy")
    for sample in llm.generate("ab", regex="[0-9]{2}-(yes|no)", **settings):
        assert re.fullmatch("[0-9]{2}-(yes|no)", sample.text)
    for sample in llm.generate("ab", grammar='start: "(" start ")" | "x"', **settings):
        assert re.fullmatch(r"\(*x?\)*", sample.text)


def test_constrained_and_other_rows_share_a_batch(llm):  # noqa: F811
    """Each row gets the tokens that it gets alone, with and without drafts."""
    warm = {"temperature": 1.0, "top_k": 0, "repetition_penalty": 1.2}
    kinds = [SamplingConfig(**warm), SamplingConfig(regex="[ab]{4}c+", **warm), SamplingConfig(json_schema=SCHEMA)]

    def texts(model, kinds) -> list[str]:
        engine = model.engine(2, 48)
        one = [
            model.stream_tokens([[1, 2]], texts=[""], max_new_tokens=24, sampling=kind, engine=engine) for kind in kinds
        ]
        return [piece.sample.text for stream in one for piece in stream if piece.sample]

    alone = texts(llm, kinds)
    for model in (llm, llm.with_drafts(2)):
        engine = model.engine(3, 48)
        requests = [request for kind in kinds for request in model.requests([[1, 2]], max_new_tokens=24, sampling=kind)]
        stream = TextStream(Scheduler(engine), model.tokenizer, requests, [""] * 3, stop=())
        found = {piece.row: piece.sample.text for piece in stream if piece.sample}
        assert [found[row] for row in range(3)] == alone


def test_a_text_ends_where_no_token_may_follow(llm):  # noqa: F811
    (sample,) = llm.generate("", regex="[ab]{3}z", logit_bias={ord("z"): -np.inf}, max_new_tokens=9)
    assert re.fullmatch("[ab]{3}", sample.text)
    assert sample.finish_reason == "length"
    (sample,) = llm.generate("", regex="[ab]{3}", min_new_tokens=9, max_new_tokens=9)
    assert re.fullmatch("[ab]{3}", sample.text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "(a"}, "regex is not valid: .*unclosed group"),
        ({"json_schema": "{"}, r"json_schema is not valid JSON \(.*line 1 column 2 "),
        ({"json_schema": "person.json"}, "not a path"),
        ({"json_schema": '{"a":' * 9999 + "1" + "}" * 9999}, "json_schema is not valid JSON .*recursion"),
        ({"json_schema": '{"type": "objectx"}'}, "json_schema is not valid: Invalid type: objectx"),
        ({"regex": "\ud800"}, "regex is not valid"),
        ({"grammar": "start: foo"}, 'grammar is not valid: .*unknown name: "foo"'),
        ({"grammar": "", "regex": "a"}, "there are regex and grammar; give only one of them"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_invalid_grammar_is_refused(llm, settings, message):  # noqa: F811
    with pytest.raises(InputError, match=message):
        llm.generate("", **settings)
