"""`LLM`: a trained model with its tokenizer, for logits, sampling and scoring."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nextllm_jax.config import ModelConfig, SamplingConfig
from nextllm_jax.config.checks import require, require_integer, require_text, stop_strings
from nextllm_jax.config.sampling import bias_texts
from nextllm_jax.errors import InputError
from nextllm_jax.inference.buckets import bucket
from nextllm_jax.inference.decode import CHUNK_TOKENS
from nextllm_jax.inference.engine import Engine, require_length
from nextllm_jax.inference.grammar import Grammars
from nextllm_jax.inference.programs import Network
from nextllm_jax.inference.request import NextToken, Request
from nextllm_jax.inference.scheduler import Scheduler
from nextllm_jax.inference.score import Score, check_windows, encode, score_documents
from nextllm_jax.inference.stream import Sample, TextStream
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.progress import progress_bar
from nextllm_jax.sharding import on_mesh, padded_size
from nextllm_jax.tokenizer.tokenizer import Tokenizer

MAX_NEW_TOKENS = 128
"""Default number of new tokens."""

DRAFT_TOKENS = 4
"""Default number of guesses of a draft model."""

MAX_DRAFT_TOKENS = 32

PROGRESS_TOKENS = 8
"""Tokens per row between two pieces of a stream, and two moves of a progress bar."""


@dataclasses.dataclass(frozen=True, eq=False)
class LLM:
    """A model for inference: its config, parameters and tokenizer; matmuls run in `dtype`.

    With `scan_layers`, the parameters are stacked over the layers as in training. Otherwise they are unstacked by
    `unstack_layers`, which decodes faster.
    """

    config: ModelConfig
    params: Any = dataclasses.field(repr=False)
    load_tokenizer: Callable[[], Tokenizer]
    dtype: np.dtype
    scan_layers: bool = True
    mesh: Mesh | None = None
    """Mesh over which the parameters are sharded; None: one device, or the mesh that the caller has set."""
    quantize_cache: bool = False
    """Keep keys and values in int8."""
    draft_tokens: int = 0
    """Number of guesses that each decoding step verifies; see `with_drafts`."""
    draft: "LLM | None" = None
    """The model that the guesses are from; None: they are from the text so far."""

    def with_drafts(self, tokens: int, draft: "LLM | None" = None) -> "LLM":
        """The model with speculative decoding: it verifies `tokens` guesses of what follows in one step.

        The guesses are from `draft`, a smaller model with the same ids, or without one from what followed the last
        tokens earlier in the text. The text stays the same. It is generated faster if reading 1 + `tokens` tokens takes
        little longer than one, and many guesses are right; `Sample.accepted_drafts` says how many were.

        Raises InputError if the models do not have the same tokens.
        """
        require_integer("draft_tokens", tokens)
        require(tokens <= MAX_DRAFT_TOKENS, f"draft_tokens is {tokens}; it must be at most {MAX_DRAFT_TOKENS}")
        if draft is not None:
            require(
                draft.tokenizer.backend.bytes_of == self.tokenizer.backend.bytes_of,
                f"the draft model has other tokens ({draft.tokenizer.name}) than the model ({self.tokenizer.name}); "
                "use a smaller model of the same family",
            )
        return dataclasses.replace(self, draft_tokens=tokens, draft=draft)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises InputError if the model has none."""
        return self.load_tokenizer()

    @functools.cached_property
    def model(self) -> Transformer:
        """The Flax module of the parameters."""
        return Transformer(self.config.for_inference(), self.dtype, self.scan_layers)

    def logits(self, tokens: Any) -> jax.Array:
        """Logits, float32 [B, T, V], for tokens, int [B, T]: a causal forward pass without a cache.

        V is `config.vocab_size`, which may exceed the tokenizer's vocabulary.

        Raises InputError for another shape, for ids that are not in 0 to V - 1, or if T exceeds the context.
        """
        try:
            tokens_BT = np.asarray(tokens)
        except ValueError as error:  # rows of several lengths
            raise InputError(f"tokens must be integers of shape [B, T] ({error})") from error
        if tokens_BT.ndim != 2 or tokens_BT.size == 0 or not np.issubdtype(tokens_BT.dtype, np.integer):
            raise InputError(f"tokens must be integers of shape [B, T]; got {tokens_BT.dtype} {list(tokens_BT.shape)}")
        T, context_length = tokens_BT.shape[1], self.config.context_length
        if context_length < T:
            raise InputError(f"{T} tokens exceed the model's context_length {context_length}; pass fewer")
        if tokens_BT.min() < 0 or tokens_BT.max() >= self.config.vocab_size:
            raise InputError(f"token ids must be in 0 to {self.config.vocab_size - 1}, the model's vocab_size less 1")
        with on_mesh(self.mesh):
            rows, columns = padded_size(len(tokens_BT), "batch"), min(bucket(T, 16), context_length)
            padded_BT = np.zeros((rows, columns), np.int32)
            padded_BT[: len(tokens_BT), :T] = tokens_BT
            return _logits(self.model, self.params, padded_BT)[: len(tokens_BT), :T]

    def next_token(self, prompt: str, *, top: int = 10) -> list[NextToken]:
        """The `top` most likely tokens after the prompt, the most likely first, with their probabilities.

        The probabilities are those of temperature 1 without top_k, top_p, min_p and repetition_penalty.

        Raises InputError if the prompt exceeds the context, or if `top` is not positive.
        """
        require_text("the prompt", prompt)
        require_integer("top", top)
        logits_V = self.logits([self.tokenizer.encode_prompt(prompt)])[0, -1, : self.tokenizer.vocab_size]
        probabilities, ids = jax.lax.top_k(jax.nn.softmax(logits_V), min(top, len(logits_V)))
        return [
            NextToken(int(id), self.tokenizer.decode([id]), float(probability))
            for id, probability in zip(np.asarray(ids), np.asarray(probabilities), strict=True)
        ]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        num_samples: int = 1,
        stop: str | Sequence[str] = (),
        slide: bool = False,
        top_logprobs: int | None = None,
        num_slots: int | None = None,
        progress: bool = False,
        **sampling: Any,
    ) -> list[Sample]:
        """`num_samples` samples for each prompt; those of one prompt are next to each other.

        A sample ends before a stop string, at one of the tokenizer's stop_ids, or after max_new_tokens. It depends only
        on the seed, the prompt and its sample index, not on the other prompts. `sampling` are the fields of
        SamplingConfig, such as temperature=0 and top_k=20; json_schema and logit_bias may be dicts.

        With `slide`, a sample may be longer than the context: whenever its tokens, with those of the prompt, exceed the
        context, only the last context_length // 2 are kept, and the model continues them as if they were a prompt. So
        it forgets what was before, including BOS.

        With `top_logprobs`, samples have the log probabilities of their tokens, and of that many most likely tokens at
        each position. `num_slots` is the number of samples that are generated at a time; None: all.

        `progress` shows a bar with the estimated time that remains, which is less if all samples end earlier.

        Raises InputError if a prompt and the new tokens exceed the context without `slide`, or for an invalid setting.
        """
        names = {field.name for field in dataclasses.fields(SamplingConfig)}
        if unknown := sampling.keys() - names:
            raise TypeError(f"generate() has no argument {sorted(unknown)[0]!r}; sampling settings: {sorted(names)}")
        if isinstance(schema := sampling.get("json_schema"), dict):
            sampling["json_schema"] = json.dumps(schema)
        if isinstance(biases := sampling.get("logit_bias"), dict):
            sampling["logit_bias"] = bias_texts(biases)
        texts = self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=SamplingConfig(**sampling),
            seed=seed,
            num_samples=num_samples,
            stop=stop,
            chunk_tokens=PROGRESS_TOKENS if progress else CHUNK_TOKENS,
            slide=slide,
            top_logprobs=top_logprobs,
            num_slots=num_slots,
        )
        finished: dict[int, Sample] = {}
        with progress_bar(desc="sampling", total=texts.max_new, unit=" tokens", disable=not progress) as bar:
            for piece in texts:
                bar.update(texts.num_new - bar.n)
                if piece.sample is not None:
                    finished[piece.row] = piece.sample
        return [finished[row] for row in sorted(finished)]

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        num_samples: int = 1,
        stop: str | Sequence[str] = (),
        chunk_tokens: int = PROGRESS_TOKENS,
        slide: bool = False,
        top_logprobs: int | None = None,
        num_slots: int | None = None,
    ) -> TextStream:
        """The text that `generate` returns, in pieces as it is generated; `speeds` of the result has the throughput.

        The row of a piece is prompt index * num_samples + sample index. Every `chunk_tokens` tokens, the rows yield
        their pieces. Raises InputError as `generate` does.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        require(
            isinstance(prompts, list | tuple), f"prompts is {prompts!r:.80}; it must be a string or a list of strings"
        )
        if not prompts:
            raise InputError("there are no prompts; give at least one, which may be empty")
        for prompt in prompts:
            require_text("a prompt", prompt)
        require_integer("num_samples", num_samples)
        rows = [prompt for prompt in prompts for _ in range(num_samples)]
        encoded = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        return self.stream_tokens(
            [tokens for tokens in encoded for _ in range(num_samples)],
            texts=rows,
            samples=[*range(num_samples)] * len(prompts),
            max_new_tokens=max_new_tokens,
            sampling=sampling or SamplingConfig(),
            seed=seed,
            stop=stop,
            chunk_tokens=chunk_tokens,
            slide=slide,
            top_logprobs=top_logprobs,
            num_slots=num_slots,
        )

    def stream_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        texts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingConfig,
        samples: Sequence[int] | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chunk_tokens: int = CHUNK_TOKENS,
        slide: bool = False,
        top_logprobs: int | None = None,
        num_slots: int | None = None,
        engine: Engine | None = None,
    ) -> TextStream:
        """Like `stream`, for prompts as token ids, one per row.

        `texts` are the prompts in the returned samples. `samples` are the sample indices of the rows; None: all 0. An
        `engine` of this model may be used again and again; without it, one with `num_slots` slots is created. Raises
        InputError as `generate` does.
        """
        stop = stop_strings(stop)
        require_integer("chunk_tokens", chunk_tokens)
        requests = self.requests(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            samples=samples,
            seed=seed,
            top_logprobs=top_logprobs,
            slide=slide,
        )
        if engine is None:
            longest, context = max(map(len, prompts)), self.config.context_length
            if not slide:
                require_length("the prompt", longest, max_new_tokens, context)
            engine = self.engine(num_slots, bucket(longest + max_new_tokens, 16), num_rows=len(prompts))
        return TextStream(Scheduler(engine), self.tokenizer, requests, texts, stop=stop, chunk_tokens=chunk_tokens)

    def requests(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        samples: Sequence[int] | None = None,
        seed: int = 0,
        top_logprobs: int | None = None,
        slide: bool = False,
    ) -> list[Request]:
        """A request for each prompt, which ends at the tokenizer's stop_ids and follows the grammar of `sampling`.

        Raises InputError for an invalid setting.
        """
        require(isinstance(sampling, SamplingConfig), f"sampling is {sampling!r:.80}; it must be a SamplingConfig")
        constraint = self._grammars.constraint(sampling) if sampling.is_constrained else None
        return [
            Request(
                tokens=tokens,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                sample=sample,
                stop_ids=tuple(self.tokenizer.stop_ids),
                top_logprobs=top_logprobs,
                slide=slide,
                constraint=constraint,
            )
            for tokens, sample in zip(prompts, samples or [0] * len(prompts), strict=True)
        ]

    @functools.cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer)

    def engine(self, num_slots: int | None, max_length: int, *, num_rows: int = 1) -> Engine:
        """An engine for this model whose slots hold `max_length` tokens, or the context if that is less.

        Without `num_slots`, all of `num_rows` rows fit, and they are always decoded together.
        """
        if num_slots is not None:
            require_integer("num_slots", num_slots)
        slots = num_slots or bucket(num_rows, 1)
        return Engine(
            self.model,
            self.params,
            num_slots=slots,
            max_length=max_length,
            vocab_size=self.tokenizer.vocab_size,
            row_buckets=None if num_slots else (slots,),
            quantize_cache=self.quantize_cache,
            draft_tokens=self.draft_tokens,
            draft=None if self.draft is None else Network(self.draft.model, self.draft.params),
            mesh=self.mesh,
        )

    @overload
    def score(
        self, text: str, *, prefix: str = "", window: int | None = None, batch_size: int = 8, progress: bool = False
    ) -> Score: ...

    @overload
    def score(
        self,
        text: Sequence[str],
        *,
        prefix: str = "",
        window: int | None = None,
        batch_size: int = 8,
        progress: bool = False,
    ) -> list[Score]: ...

    def score(
        self,
        text: str | Sequence[str],
        *,
        prefix: str = "",
        window: int | None = None,
        batch_size: int = 8,
        progress: bool = False,
    ) -> Score | list[Score]:
        """How well the model predicts a text, or each of several, in windows of `window` tokens; None: the context.

        A document is BOS + text + EOS. It is split into windows that do not attend to each other, and each token except
        BOS is scored once. Each window begins with BOS if the model's prompts do. `nll` is the mean over these tokens,
        including EOS; `logprobs` has the value of each. The result does not depend on batch_size.

        With a `prefix`, the document is the ids of the prompt `prefix`, as `generate` reads it, + text + EOS. The
        tokens of the prefix are not scored, and all tokens must fit one window. Prefix and text are tokenized
        separately, so a space between them belongs to the text.

        `progress` shows a bar. Raises InputError if a text is empty, if the window exceeds the context length or has no
        room for BOS, or if batch_size is not positive.
        """
        window = self.config.context_length if window is None else window
        check_windows(window, batch_size, self.config.context_length)
        texts = [text] if isinstance(text, str) else text
        require(isinstance(texts, list | tuple), f"text is {text!r:.80}; it must be a string or a list of strings")
        require(len(texts) > 0, "there are no texts; give at least one")
        documents = [encode(self.tokenizer, each, prefix) for each in texts]
        with on_mesh(self.mesh):
            scores = score_documents(
                self.model,
                self.params,
                documents,
                opening=[self.tokenizer.bos_id] if self.tokenizer.add_bos else [],
                window=window,
                batch_size=batch_size,
                progress=progress,
            )
        return scores[0] if isinstance(text, str) else scores


@functools.partial(jax.jit, static_argnames=("model",))
def _logits(model: Transformer, params: Any, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    hidden_BTD, _ = model.apply({"params": params}, tokens_BT, positions_BT)
    return model.apply({"params": params}, hidden_BTD, method="logits")  # pyright: ignore[reportReturnType]
