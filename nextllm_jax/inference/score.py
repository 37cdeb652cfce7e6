"""How well a model predicts texts: log probabilities of their tokens, in windows."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nextllm_jax.config.checks import require, require_integer, require_text
from nextllm_jax.config.sampling import MAX_TOP_LOGPROBS
from nextllm_jax.errors import InputError
from nextllm_jax.inference.buckets import bucket
from nextllm_jax.inference.request import TokenLogprob, token_logprobs
from nextllm_jax.model.objective import LOGITS_AT_ONCE, Batch, perplexity, text_batch, token_scores
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.progress import progress_bar
from nextllm_jax.sharding import padded_size, to_host
from nextllm_jax.tokenizer.tokenizer import Tokenizer, without_surrogates


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    nll: float
    """Mean negative log-likelihood of the scored tokens, in nats."""
    tokens: int
    """Number of scored tokens: those of the text, and the EOS token that ends the document."""
    bits_per_byte: float | None
    """Summed negative log-likelihood in bits, divided by the UTF-8 bytes of the text; None if there are none."""
    token_ids: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    """The scored tokens; the last is EOS. Empty for prepared data."""
    logprobs: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    """Log probability of each of them in nats."""

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return perplexity(self.nll)


class Document(NamedTuple):
    """A text to score, as ids."""

    ids: list[int]
    start: int
    """Index of the first scored id, at least 1."""
    num_bytes: int
    """UTF-8 bytes of the scored text."""


def encode(tokenizer: Tokenizer, text: str, prefix: str) -> Document:
    """BOS + text + EOS, or the ids of the prompt `prefix` + text + EOS.

    Raises InputError for an empty text, and if a token is scored that no other token precedes.
    """
    require_text("the text to score", text)
    require_text("prefix", prefix)
    require(text != "", "the text to score is empty; bits per byte need at least one byte")
    document = tokenizer.encode_document(text)
    if prefix:
        before = tokenizer.encode_prompt(prefix)
        document = [*before, *document[1:]]
    else:
        before = document[:1]
    if len(document) < 2:
        raise InputError("the text is a single token, which no other token predicts; give a longer text")
    return Document(document, len(before), len(without_surrogates(text).encode()))


def check_windows(window: int, batch_size: int, context_length: int) -> None:
    """Raise InputError if the window is not in 1 to the context length, or if the batch size is not positive."""
    require_integer("window", window)
    if window > context_length:
        raise InputError(f"window is {window}; it must be in 1 to the model's context_length {context_length}")
    require_integer("batch_size", batch_size)


def score_documents(
    model: Transformer,
    params: Any,
    documents: Sequence[Document],
    *,
    opening: Sequence[int],
    window: int,
    batch_size: int,
    progress: bool,
) -> list[Score]:
    """The score of each document, in windows of `window` tokens. All windows but the first begin with `opening`.

    Raises InputError if a document with a prefix does not fit one window, or if a window has no room for text.
    """
    for document in documents:
        if document.start > 1 and len(document.ids) - 1 > window:
            raise InputError(
                f"the prefix and the text have {len(document.ids)} tokens with EOS, so they do not fit a window of "
                f"{window}; shorten the prefix, or score the text without it"
            )
    T = min(bucket(max(len(document.ids) for document in documents) - 1, 16), window)
    windows = [_windows(document.ids, T, opening) for document in documents]
    batch = Batch(*map(np.concatenate, zip(*windows, strict=True)))
    num_rows = len(batch.tokens_BT)
    batch_size = padded_size(min(batch_size, num_rows), "batch")
    batch = Batch(*(np.pad(x, ((0, -num_rows % batch_size), (0, 0))) for x in batch))
    starts = range(0, len(batch.tokens_BT), batch_size)
    logprobs_RT = np.concatenate(
        [
            to_host(_logprobs(model, params, Batch(*(x[i : i + batch_size] for x in batch))))
            for i in progress_bar(starts, desc="scoring", unit=" batches", disable=not progress)
        ]
    )
    bounds = np.cumsum([0, *(len(each.tokens_BT) for each in windows)])
    return [
        _score(document, logprobs_RT[first:last][batch.loss_mask_BT[first:last]])
        for document, first, last in zip(documents, bounds[:-1], bounds[1:], strict=True)
    ]


def _windows(ids: Sequence[int], T: int, opening: Sequence[int]) -> Batch:
    """The windows of a document. All but the first begin with `opening`, and the last is padded.

    Raises InputError if a window has no room for text.
    """
    count = len(ids) - 1
    size = T if count <= T else T - len(opening)
    if size < 1:
        raise InputError(f"window is {T}, which leaves no room for text after BOS; use 2 or more")
    num_rows = -(-count // size)
    tokens, loss_mask_BT = np.zeros((num_rows, T + 1), np.int32), np.zeros((num_rows, T), bool)
    for row, start in enumerate(range(0, count, size)):
        before = opening if start else []
        part = ids[start : start + size + 1]
        tokens[row, : len(before) + len(part)] = [*before, *part]
        loss_mask_BT[row, len(before) : len(before) + len(part) - 1] = True
    return text_batch(tokens)._replace(loss_mask_BT=loss_mask_BT)


def _score(document: Document, logprobs: np.ndarray) -> Score:
    """The score of a document from the log probabilities of all its ids but the first."""
    scored = logprobs[document.start - 1 :].tolist()
    nll = -math.fsum(scored)
    bits = nll / math.log(2) / document.num_bytes
    return Score(nll / len(scored), len(scored), bits, tuple(document.ids[document.start :]), tuple(scored))


@functools.partial(jax.jit, static_argnames=("model",))
def _logprobs(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    return token_scores(model, params, batch)[0]


def prompt_scores(
    model: Transformer, params: Any, tokens: Sequence[int], *, top: int, vocab_size: int
) -> list[TokenLogprob]:
    """The log probability of each token but the first, and the `top` most likely of the first `vocab_size` tokens.

    The log probabilities are those of `token_scores`: normalized over all of the model's vocabulary.
    """
    count = len(tokens) - 1
    if count < 1:
        return []
    B, T = padded_size(1, "batch"), min(bucket(count, 16), model.config.context_length)
    tokens_BS = np.zeros((B, T + 1), np.int32)
    tokens_BS[0, : len(tokens)] = tokens
    scores = _prompt_scores(model, params, text_batch(tokens_BS), vocab_size=vocab_size)
    return token_logprobs(tokens[1:], top, *(to_host(x) for x in scores))


@functools.partial(jax.jit, static_argnames=("model", "vocab_size"))
def _prompt_scores(
    model: Transformer, params: Any, batch: Batch, *, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[T], [T, K] and [T, K] of the first row; K is MAX_TOP_LOGPROBS or `vocab_size`."""
    hidden_BTD, _ = model.apply({"params": params}, batch.tokens_BT, batch.positions_BT)
    K = min(MAX_TOP_LOGPROBS, vocab_size)

    def score(column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden_D, target = column
        logits_11V: Any = model.apply({"params": params}, hidden_D[None, None], method="logits")
        logprobs_V = jax.nn.log_softmax(logits_11V[0, 0])
        return logprobs_V[target], *jax.lax.top_k(logprobs_V[:vocab_size], K)

    at_once = max(1, min(hidden_BTD.shape[1], LOGITS_AT_ONCE // model.config.vocab_size))
    return jax.lax.map(score, (hidden_BTD[0], batch.targets_BT[0]), batch_size=at_once)
