"""Grammars that new text must follow: JSON schemas, regular expressions and Lark grammars, through llguidance."""

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from nextllm_jax.config import SamplingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.inference.request import Constraint
from nextllm_jax.tokenizer.tokenizer import Tokenizer


class Grammars:
    """Creates the constraints of texts with the ids of a tokenizer. Raises InputError if llguidance is missing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise InputError("a grammar needs llguidance: pip install 'nextllm_jax[grammar]'") from error
        self._llguidance = llguidance
        self._vocabulary = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer)),
            n_vocab=tokenizer.vocab_size,
            eos_token=list(tokenizer.stop_ids) or [tokenizer.eos_id],
        )

    def constraint(self, sampling: SamplingConfig) -> Callable[[], Constraint]:
        """Creates the constraint of a text. Raises InputError if the grammar of `sampling` is not valid."""
        matcher = self._llguidance.LLMatcher
        kinds = {
            "json_schema": matcher.grammar_from_json_schema,
            "regex": matcher.grammar_from_regex,
            "grammar": matcher.grammar_from_lark,
        }
        name = next(name for name in kinds if getattr(sampling, name) is not None)
        if sampling.json_schema is not None:
            _require_json(sampling.json_schema)
        try:
            grammar = kinds[name](getattr(sampling, name))
        except ValueError as error:
            raise InputError(f"{name} is not valid: {_in_one_line(error)}") from error
        is_error, messages = matcher.validate_grammar_with_warnings(grammar, self._vocabulary)
        if is_error:
            raise InputError(f"{name} is not valid: {_in_one_line(messages[0])}")
        return functools.partial(_Matcher, matcher, self._vocabulary, grammar)


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.backend.bytes_of.get(id, b"") for id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(set(tokenizer.special_tokens.values()))
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, recognize="none")


class _Matcher:
    """The state of a text within a grammar, as a `Constraint`."""

    def __init__(self, matcher: Any, vocabulary: Any, grammar: str) -> None:
        self._matcher = matcher(vocabulary, grammar)

    def fill(self, allowed_W: np.ndarray) -> None:
        if not self._matcher.is_error():
            bits_W = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(allowed_W)]
            allowed_W[: len(bits_W)] = bits_W

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


def _require_json(schema: str) -> None:
    """Raise InputError unless a schema is JSON. llguidance's own error counts columns of a longer text."""
    try:
        json.loads(schema)
    except (ValueError, RecursionError) as error:
        hint = "give the text of a schema, such as that of `cat FILE`, not a path"
        raise InputError(f"json_schema is not valid JSON ({_in_one_line(error)}); {hint}") from error


def _in_one_line(error: object) -> str:
    return " ".join(str(error).split())
