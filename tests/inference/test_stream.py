"""Text from scripted tokens: stop strings across borders, characters kept whole, reasons, order of the pieces."""

import codecs
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextllm_jax.config import SamplingConfig
from nextllm_jax.inference.request import Output, Request
from nextllm_jax.inference.stream import Sample, StopFinder, TextStream
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.tokenizer import Tokenizer

EOS = 256
TOKENIZER = Tokenizer(
    "bytes", ByteBPE({bytes([value]): value for value in range(256)}, r"[\s\S]", {"<|endoftext|>": EOS})
)


class Script:
    """Stands in for a Scheduler: the tokens of each request are known beforehand."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = dict(enumerate(rows))
        self._requests: list[Request] = []
        self.cancelled: set[int] = set()

    @property
    def done(self) -> bool:
        return not self._rows

    def submit(self, request: Request) -> int:
        self._requests.append(request)
        return len(self._requests) - 1

    def cancel(self, number: int) -> None:
        self.cancelled.add(number)
        self._rows.pop(number, None)

    def close(self) -> None:
        self._rows = {}

    def advance(self, limit: int) -> dict[int, Output]:
        new = {number: list(row[:limit]) for number, row in self._rows.items()}
        self._rows = {number: row[limit:] for number, row in self._rows.items() if len(row) > limit}
        reasons = {}
        for number, tokens in new.items():
            ends = EOS in tokens
            new[number] = tokens[: tokens.index(EOS) + 1] if ends else tokens
            reasons[number] = "stop" if ends else "length" if number not in self._rows else None
        return {number: Output(tokens, reasons[number], []) for number, tokens in new.items()}


def texts_of(script: Any, tokenizer: Tokenizer, prompts, *, stop, chunk: int) -> TextStream:
    one = Request(tokens=[0], max_new_tokens=40, sampling=SamplingConfig(), stop_ids=(EOS,))
    return TextStream(script, tokenizer, [one] * len(prompts), prompts, stop=stop, chunk_tokens=chunk)


def stream(rows: Sequence[str | Sequence[int]], *, stop: Sequence[str] = (), chunk: int = 3, length: int = 40):
    tokens = [list(row.encode()) if isinstance(row, str) else list(row) for row in rows]
    script: Any = Script([row[:length] for row in tokens])
    prompts = [f"prompt {i}" for i in range(len(rows))]
    return texts_of(script, TOKENIZER, prompts, stop=stop, chunk=chunk), script


def samples(texts: TextStream) -> dict[int, Sample]:
    return {piece.row: piece.sample for piece in texts if piece.sample is not None}


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string to be complete, found letter by letter."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abc", max_size=5), max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_across_any_borders(parts, stops):
    finder = StopFinder(stops)
    expected, found = cut("".join(parts), stops)
    emitted = ""
    for part in parts:
        emitted += finder.push(part)
        assert expected.startswith(emitted)
    assert emitted + finder.finish() == expected
    assert finder.found == found


CONTROL = Tokenizer(
    "control", ByteBPE({bytes([value]): value for value in range(256)}, r"[\s\S]", {"<|endoftext|>": EOS, "<|a|>": 257})
)


@pytest.mark.parametrize("chunk", [1, 40])
def test_stop_strings_neither_start_nor_end_inside_of_a_control_token(chunk):
    def text(stop):
        script: Any = Script([[*b"b\xe6", 257, *b"a|>c", EOS]])
        texts = texts_of(script, CONTROL, [""], stop=[stop], chunk=chunk)
        return samples(texts)[0].text

    whole = "b\ufffd<|a|>a|>c"
    for inside in ("<", "<|", "|a", "|>a", "\ufffd<"):
        assert text(inside) == whole
    for stop, end in {"a": 7, "|>": 8, "|>c": 8, "<|a|>": 2, "\ufffd<|a|>a": 1, "\ufffd": 1, "c": 10}.items():
        assert text(stop) == whole[:end]


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    finder = StopFinder(["\n\n", "END"])
    assert finder.push("a\n") == "a"
    assert finder.push("b E") == "\nb "
    assert finder.push("N") == ""
    assert finder.push("d") == "ENd"
    assert finder.finish() == ""


@pytest.mark.parametrize("chunk", [1, 2, 3, 64])
def test_rows_end_at_a_stop_string_a_stop_token_or_their_length(chunk):
    texts, script = stream(["one two STOP three", [*b"four", EOS, *b"five"], "six" * 20], stop=["STOP"], chunk=chunk)
    assert samples(texts) == {
        0: Sample("prompt 0", "one two ", list(b"one two STOP"), "stop"),
        1: Sample("prompt 1", "four", [*b"four", EOS], "stop"),
        2: Sample("prompt 2", "six" * 13 + "s", list(b"six" * 13 + b"s"), "length"),
    }
    assert script.cancelled == {0, 1, 2}


def test_pieces_join_to_the_text_and_keep_characters_whole():
    text = "naïve 😀 日本"
    texts, _ = stream([text], chunk=1)
    pieces = list(texts)
    assert "".join(piece.text for piece in pieces) == text or pieces[-1].sample is None
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_a_character_cut_short_by_the_length_becomes_a_replacement():
    texts, _ = stream(["a😀"], length=3)
    sample = samples(texts)[0]
    assert sample.text == codecs.decode("a😀".encode()[:3], "utf-8", "replace")
    assert sample.finish_reason == "length"


def test_stop_string_begun_but_not_finished_is_part_of_the_text():
    texts, _ = stream([[*b"text EN", EOS]], stop=["END"])
    assert samples(texts)[0].text == "text EN"


def test_in_order_gives_row_after_row():
    rows: list[list[int]] = [[*b"abcdefgh", EOS], [*b"ij", EOS], [*b"klmn", EOS]]
    texts, _ = stream(rows, chunk=2)
    pieces = list(texts.in_order())
    order = [piece.row for piece in pieces]
    assert order == sorted(order)
    assert len(order) > 3  # the first row comes in several
    joined = ["".join(piece.text for piece in pieces if piece.row == row) for row in range(3)]
    assert joined == ["abcdefgh", "ij", "klmn"]
    assert [piece.row for piece in pieces if piece.sample is not None] == [0, 1, 2]
