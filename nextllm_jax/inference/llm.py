"""`load(path)` -> LLM: a trained model with its tokenizer, to sample from, score with and look into."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nextllm_jax.config import MeshConfig, ModelConfig, SamplingConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.inference.generate import CHUNK_TOKENS, CachedRow, Generation, bucket
from nextllm_jax.inference.stream import Sample, TextStream
from nextllm_jax.model.objective import Batch, text_batch, token_scores
from nextllm_jax.model.quantize import abstract_quantized, regroup
from nextllm_jax.model.transformer import Transformer, abstract_params, resolve_dtype, set_matmul_precision
from nextllm_jax.model.weights import cast_matrices
from nextllm_jax.pretrained.open_model import open_model
from nextllm_jax.sharding import make_mesh, on_device, on_mesh, padded_size, placed
from nextllm_jax.tokenizer.tokenizer import Tokenizer

MAX_NEW_TOKENS = 128

MAX_UNROLLED_LAYERS = 32
"""Depth up to which `load` unrolls the layers. At 8 layers that halves a decode step of one row on a CPU and takes a
second longer to compile; at 32 it is 8 seconds instead of 2, at 64 over 20."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    nll: float
    """Mean negative log-likelihood of the scored tokens, in nats."""
    tokens: int
    """Scored tokens: those of the text, and the end of the document."""
    bits_per_byte: float | None
    """Summed negative log-likelihood in bits, over the UTF-8 bytes of the text; None if there are none."""

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class LLM:
    """A model to use: its config, parameters and tokenizer; matmuls run in `dtype`.

    The parameters are stacked over the layers as in training or, without `scan_layers`, come from `unstack_layers`
    and decode faster.
    """

    config: ModelConfig
    params: Any = dataclasses.field(repr=False)
    load_tokenizer: Callable[[], Tokenizer]
    dtype: np.dtype
    scan_layers: bool = True
    mesh: Mesh | None = None
    """Devices that hold the parameters; None: one device, or the mesh that the caller has set."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises InputError if the model has none."""
        return self.load_tokenizer()

    @functools.cached_property
    def model(self) -> Transformer:
        """The module that the parameters belong to."""
        return Transformer(self.config.without_remat(), self.dtype, self.scan_layers)

    def logits(self, tokens: Any) -> jax.Array:
        """Logits, float32 [B, T, V], of a causal forward pass without cache over tokens, int [B, T].

        V is `config.vocab_size`, which may exceed the tokenizer's.

        Raises InputError for another shape, ids outside of V, or more tokens than the context.
        """
        tokens_BT = np.asarray(tokens)
        if tokens_BT.ndim != 2 or tokens_BT.size == 0 or not np.issubdtype(tokens_BT.dtype, np.integer):
            raise InputError(f"tokens must be integers [B, T]; got {tokens_BT.dtype} {list(tokens_BT.shape)}")
        T, context_length = tokens_BT.shape[1], self.config.context_length
        if context_length < T:
            raise InputError(f"{T} tokens are over the model's context_length {context_length}")
        if tokens_BT.min() < 0 or tokens_BT.max() >= self.config.vocab_size:
            raise InputError(f"token ids must lie in 0 to {self.config.vocab_size - 1}, the model's vocab_size less 1")
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
        """`num_samples` continuations of each prompt, those of one prompt together. See SamplingConfig for the rest.

        A sample ends before a stop string, at one of the tokenizer's stop_ids, or after max_new_tokens. What is drawn
        depends on the seed, the prompt and the sample's index alone, not on the other prompts.

        Raises InputError for a prompt that does not fit the context with the new tokens, or a bad setting.
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
        """The pieces of text that `generate` would return at the end, as they are made, and how fast.

        A piece's row is prompt index * num_samples + sample index. Raises InputError as `generate` does.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        stop = [stop] if isinstance(stop, str) else list(stop)
        if not prompts:
            raise InputError("there are no prompts; give at least one, the empty text if need be")
        if num_samples < 1:
            raise InputError(f"num_samples is {num_samples}; it must be positive")
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
        stop: Sequence[str] = (),
        chunk_tokens: int = CHUNK_TOKENS,
        cached: CachedRow | None = None,
        least_cache_length: int = 0,
    ) -> TextStream:
        """As `stream`, but from ids; `texts` are what the samples name as their prompts, `samples` their indices.

        See Generation for `cached` and `least_cache_length`, and for what it raises.
        """
        if not all(stop):
            raise InputError("a stop string is empty; leave it out, or give the text to stop at")
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
        """How well the model predicts a document, in windows of `window` tokens (none: the context length).

        The document is BOS + text + EOS. Windows lie side by side, each target is scored once, and a window sees
        nothing of the one before; the result does not depend on batch_size. `progress` wraps the batches, of which
        there are `total`.

        Raises InputError for an empty text, a window over the context length or a batch size that is not positive.
        """
        window = self.config.context_length if window is None else window
        if not text:
            raise InputError("the text to score is empty; bits per byte need at least one byte")
        check_windows(window, batch_size, self.config.context_length)
        document = self.tokenizer.encode_document(text)
        if len(document) < 2:
            raise InputError(
                "the text to score is one token of this tokenizer, and nothing predicts it; give more text"
            )
        batch = _windows(document, window, batch_size)
        starts = range(0, len(batch.tokens_BT), batch_size)
        with on_mesh(self.mesh):
            nll_sum = math.fsum(
                float(_nll_sum(self.model, self.params, Batch(*(x[i : i + batch_size] for x in batch))))
                for i in progress(starts, len(starts))
            )
        count = len(document) - 1
        return Score(nll_sum / count, count, nll_sum / math.log(2) / len(text.encode("utf-8", errors="replace")))


def check_windows(window: int, batch_size: int, context_length: int) -> None:
    """Raise InputError if a model cannot score windows of this many tokens, or so many of them together."""
    if not 0 < window <= context_length:
        raise InputError(f"window is {window}; it must lie in 1 to the model's context_length {context_length}")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be positive")


def _windows(document: Sequence[int], window: int, batch_size: int) -> Batch:
    """All windows of a document, at stride T and padded to whole ones and to whole batches."""
    count = len(document) - 1
    T = min(bucket(count, 16), window)
    num_windows = -(-count // T)
    num_windows = num_windows if num_windows <= batch_size else -(-num_windows // batch_size) * batch_size
    padded = np.zeros(num_windows * T + 1, np.int32)
    padded[: count + 1] = document
    rows = np.stack([padded[i : i + T + 1] for i in range(0, num_windows * T, T)])
    return text_batch(rows)._replace(loss_mask_BT=(np.arange(num_windows * T) < count).reshape(num_windows, T))


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
    path: str,
    *,
    step: str | int | None = None,
    dtype: str | None = None,
    quantize: str | Quantization = "none",
    mesh: MeshConfig | None = None,
) -> LLM:
    """The model of a run directory, a Hugging Face directory, a GGUF file or a published name.

    `path` and `step` are those of `open_model`. `dtype` is the type of the matmuls: "float32", "bfloat16", "auto" for
    what suits the platform, None for what the model's config says. Matrices are cast to it once, here, norms stay as
    they were trained. float32 asks jax for full matmul precision, for the whole process. `quantize` is "int8", "int4"
    or a Quantization: matrices are quantized as they are read, so the float model is never whole in memory. "none":
    they stay as the files have them. On a CPU, weights that share scales in groups of inputs, as int4 does, are rounded
    once more to int8 by output channel, which a CPU multiplies several times faster. `mesh` shards the model over all
    devices; None: one device.

    Raises InputError as `open_model` does, if the mesh does not fit the devices or the model, and if a model is to be
    quantized that is already. The tokenizer is loaded on first use, so a model without one has logits, and what needs
    text raises InputError.
    """
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
    if quantization is not None and quantization.inputs_per_scale and jax.default_backend() == "cpu":
        by_channel = Quantization(scheme="int8", embeddings=quantization.embeddings)
        params = regroup(source.load_params(abstract), decoding_model(config, compute_dtype, place, by_channel)[1])
    else:
        params = source.load_params(abstract)
    return LLM(config, params, source.load_tokenizer, compute_dtype, model.scan_layers, devices)


def decoding_model(
    config: ModelConfig, dtype: np.dtype, place: Callable[[Any], Any], quantization: Quantization | None = None
) -> tuple[Transformer, Any]:
    """The model that decodes, and its abstract parameters with the shardings that `place` gives to boxed ones."""
    model = Transformer(config.without_remat(), dtype, config.num_layers > MAX_UNROLLED_LAYERS)
    boxed = abstract_params(config, scan_layers=model.scan_layers)
    return model, abstract_quantized(boxed, cast_matrices(boxed, place(boxed), dtype), quantization)
