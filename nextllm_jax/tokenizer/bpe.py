"""Byte-level BPE training."""

from collections.abc import Iterable, Iterator

import rustbpe

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.patterns import GPT4_PATTERN
from nextllm_jax.tokenizer.tokenizer import Tokenizer, trained_special_tokens

_LONGEST_TEXT = 100_000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` ids trained on the texts: 256 bytes, merges, and tokens for begin and end of text.

    Text is split by GPT-4's pattern before pairs are counted. The result depends only on the texts, not on the number
    of threads. If the texts have too few pairs, the vocabulary is smaller. Raises InputError if `vocab_size` is too
    small for the bytes and the special tokens.
    """
    num_special = len(trained_special_tokens(0))
    if vocab_size < 256 + num_special:
        raise InputError(f"data.vocab_size is {vocab_size}; it must be at least {256 + num_special}")
    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train_from_iterator(_split(texts), vocab_size - num_special, pattern=GPT4_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return Tokenizer(f"bpe-{vocab_size}", ByteBPE(ranks, GPT4_PATTERN, trained_special_tokens(len(ranks))))


def _split(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces that are short enough that whitespace cannot overflow the pattern engine's stack."""
    for text in texts:
        for start in range(0, len(text), _LONGEST_TEXT):
            yield text[start : start + _LONGEST_TEXT]
