"""`load(path)` -> LLM: a trained model with its tokenizer, for logits, sampling and scoring."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nextllm_jax.config import MeshConfig, ModelConfig, SamplingConfig
from nextllm_jax.config.checks import require, require_integer, require_text, stop_strings
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.inference.generate import CHUNK_TOKENS, CachedRow, Generation, bucket
from nextllm_jax.inference.stream import Sample, TextStream
from nextllm_jax.model.objective import Batch, perplexity, text_batch, token_scores
from nextllm_jax.model.quantize import abstract_quantized, regroup
from nextllm_jax.model.transformer import Transformer, abstract_params, resolve_dtype, set_matmul_precision
from nextllm_jax.model.weights import cast_matrices
from nextllm_jax.pretrained.open_model import open_model
from nextllm_jax.sharding import make_mesh, on_device, on_mesh, padded_size, placed
from nextllm_jax.tokenizer.tokenizer import Tokenizer, without_surrogates

MAX_NEW_TOKENS = 128
"""Default number of new tokens."""

MAX_UNROLLED_LAYERS = 32
"""Number of layers up to which `load` unrolls them. Unrolling 8 layers halves the time of a decode step of one row on a
CPU, and compiling takes a second longer. With 32 layers, compiling takes 8 s instead of 2 s; with 64, over 20 s."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    nll: float
    """Mean negative log-likelihood of the scored tokens, in nats."""
    tokens: int
    """Scored tokens: those of the text, and the EOS token."""
    bits_per_byte: float | None
    """Summed negative log-likelihood in bits, divided by the UTF-8 bytes of the text; None if there are none."""

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return perplexity(self.nll)


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

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises InputError if the model has none."""
        return self.load_tokenizer()

    @functools.cached_property
    def model(self) -> Transformer:
        """The Flax module of the parameters."""
        return Transformer(self.config.without_remat(), self.dtype, self.scan_layers)

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

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = SamplingConfig.temperature,
        top_k: int = SamplingConfig.top_k,
        top_p: float = SamplingConfig.top_p,
        min_p: float = SamplingConfig.min_p,
        repetition_penalty: float = SamplingConfig.repetition_penalty,
        seed: int = 0,
        num_samples: int = 1,
        stop: str | Sequence[str] = (),
    ) -> list[Sample]:
        """`num_samples` samples for each prompt; those of one prompt are next to each other.

        A sample ends before a stop string, at one of the tokenizer's stop_ids, or after max_new_tokens. It depends only
        on the seed, the prompt and its sample index, not on the other prompts. See SamplingConfig for temperature,
        top_k, top_p, min_p and repetition_penalty.

        Raises InputError if a prompt and the new tokens exceed the context, or for an invalid setting.
        """
        sampling = SamplingConfig(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        texts = self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            num_samples=num_samples,
            stop=stop,
            chunk_tokens=CHUNK_TOKENS,
        )
        finished = {piece.row: piece.sample for piece in texts if piece.sample is not None}
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
        chunk_tokens: int = 8,
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
        cached: CachedRow | None = None,
        least_cache_length: int = 0,
    ) -> TextStream:
        """Like `stream`, for prompts as token ids, one per row.

        `texts` are the prompts in the returned samples. `samples` are the sample indices of the rows; None: all 0.
        See Generation for `cached`, `least_cache_length` and the errors.
        """
        stop = stop_strings(stop)
        require(isinstance(sampling, SamplingConfig), f"sampling is {sampling!r:.80}; it must be a SamplingConfig")
        require_integer("chunk_tokens", chunk_tokens)
        ends = {"max_new_tokens": max_new_tokens, "stop_ids": self.tokenizer.stop_ids}
        generation = Generation(
            self.model,
            self.params,
            prompts,
            samples=[0] * len(prompts) if samples is None else samples,
            sampling=sampling,
            seed=seed,
            vocab_size=self.tokenizer.vocab_size,
            cached=cached,
            least_cache_length=least_cache_length,
            mesh=self.mesh,
            **ends,
        )
        return TextStream(generation, self.tokenizer, texts, stop=stop, chunk_tokens=chunk_tokens, **ends)

    def score(
        self,
        text: str,
        *,
        window: int | None = None,
        batch_size: int = 8,
        progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, total: batches,
    ) -> Score:
        """How well the model predicts a text, in windows of `window` tokens; None: the context length.

        The document is BOS + text + EOS. It is split into windows that do not attend to each other, and each target is
        scored once. Each window begins with BOS if the model's prompts do. The result does not depend on batch_size.
        `progress` is called with the batches and their number, and returns them.

        Raises InputError if the text is empty, if the window exceeds the context length or has no room for BOS, or if
        batch_size is not positive.
        """
        require_text("the text to score", text)
        window = self.config.context_length if window is None else window
        if not text:
            raise InputError("the text to score is empty; bits per byte need at least one byte")
        check_windows(window, batch_size, self.config.context_length)
        document = self.tokenizer.encode_document(text)
        if len(document) < 2:
            raise InputError("the text is a single token, which no other token predicts; give a longer text")
        opening = [self.tokenizer.bos_id] if self.tokenizer.add_bos else []
        batch = _windows(document, window, batch_size, opening)
        starts = range(0, len(batch.tokens_BT), batch_size)
        with on_mesh(self.mesh):
            nll_sum = math.fsum(
                float(_nll_sum(self.model, self.params, Batch(*(x[i : i + batch_size] for x in batch))))
                for i in progress(starts, len(starts))
            )
        count = len(document) - 1
        return Score(nll_sum / count, count, nll_sum / math.log(2) / len(without_surrogates(text).encode()))


def check_windows(window: int, batch_size: int, context_length: int) -> None:
    """Raise InputError if the window is not in 1 to the context length, or if the batch size is not positive."""
    require_integer("window", window)
    if window > context_length:
        raise InputError(f"window is {window}; it must be in 1 to the model's context_length {context_length}")
    require_integer("batch_size", batch_size)


def _windows(document: Sequence[int], window: int, batch_size: int, opening: Sequence[int]) -> Batch:
    """All windows of a document; each after the first begins with `opening`.

    The last window and the last of several batches are padded. Raises InputError if a window has no room.
    """
    count = len(document) - 1
    T = min(bucket(count, 16), window)
    size = T if count <= T else T - len(opening)
    if size < 1:
        raise InputError(f"window is {window}, which leaves no room for text after BOS; use 2 or more")
    num_windows = -(-count // size)
    num_rows = num_windows if num_windows <= batch_size else -(-num_windows // batch_size) * batch_size
    tokens, loss_mask_BT = np.zeros((num_rows, T + 1), np.int32), np.zeros((num_rows, T), bool)
    for row, start in enumerate(range(0, count, size)):
        before = opening if start else []
        part = document[start : start + size + 1]
        tokens[row, : len(before) + len(part)] = [*before, *part]
        loss_mask_BT[row, len(before) : len(before) + len(part) - 1] = True
    return text_batch(tokens)._replace(loss_mask_BT=loss_mask_BT)


@functools.partial(jax.jit, static_argnames=("model",))
def _logits(model: Transformer, params: Any, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    hidden_BTD, _ = model.apply({"params": params}, tokens_BT, positions_BT)
    return model.apply({"params": params}, hidden_BTD, method="logits")  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnames=("model",))
def _nll_sum(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    logprobs_BT, _ = token_scores(model, params, batch)
    return -jnp.sum(jnp.where(batch.loss_mask_BT, logprobs_BT, 0))


def load(
    path: str | os.PathLike[str],
    *,
    step: str | int | None = None,
    dtype: str | None = None,
    quantize: str | Quantization = "none",
    mesh: MeshConfig | None = None,
) -> LLM:
    """The model of a run directory, a Hugging Face directory, a GGUF file or a published name.

    - `step` selects a checkpoint of a run; see `open_model`.
    - `dtype` is the type of the matmuls: "float32", "bfloat16", or "auto" for the best type of the platform. None: that
      of the model's config. Matrices are cast to it while loading; norms keep their type. float32 sets jax's matmul
      precision to full for the whole process.
    - `quantize` is "int8", "int4" or a Quantization. Matrices are quantized one at a time while loading, so the float
      model is never whole in memory. "none": they stay as they are in the files. On a CPU, weights with a scale per
      group of inputs, such as int4, are rounded once more to int8 with a scale per output channel, which a CPU
      multiplies several times faster.
    - `mesh` shards the model over all devices. None: one device.

    The tokenizer is loaded when it is first used. A model without one has `logits`, and the methods that need text
    raise InputError.

    Raises InputError as `open_model` does, if the mesh does not fit the devices or the model, or if the weights to
    quantize are quantized already.
    """
    path = os.fspath(path) if isinstance(path, os.PathLike) else path
    require_text("path", path)
    require(mesh is None or isinstance(mesh, MeshConfig), f"mesh is {mesh!r:.80}; it must be a MeshConfig")
    source = open_model(path, step=step)
    config, quantization = source.config, source.quantization
    if quantize != "none":
        source.require_floats(path)
        scheme: Any = quantize
        quantization = quantize if isinstance(quantize, Quantization) else Quantization(scheme=scheme)
    compute_dtype = resolve_dtype(dtype or config.dtype, jax.default_backend())
    set_matmul_precision(compute_dtype)
    if mesh is None:
        devices, place = None, functools.partial(on_device, device=jax.local_devices()[0])
    else:
        devices = make_mesh(mesh)
        place = functools.partial(placed, devices)
    model, abstract = decoding_model(config, compute_dtype, place, quantization)
    if quantization is not None and quantization != quantization.by_channel and jax.default_backend() == "cpu":
        _, by_channel = decoding_model(config, compute_dtype, place, quantization.by_channel)
        params = regroup(source.load_params(abstract), by_channel)
    else:
        params = source.load_params(abstract)
    return LLM(config, params, source.load_tokenizer, compute_dtype, model.scan_layers, devices)


def decoding_model(
    config: ModelConfig, dtype: np.dtype, place: Callable[[Any], Any], quantization: Quantization | None = None
) -> tuple[Transformer, Any]:
    """The module for decoding, and its abstract parameters, sharded as `place` shards boxed arrays."""
    model = Transformer(config.without_remat(), dtype, config.num_layers > MAX_UNROLLED_LAYERS)
    boxed = abstract_params(config, scan_layers=model.scan_layers)
    return model, abstract_quantized(boxed, cast_matrices(boxed, place(boxed), dtype), quantization)
