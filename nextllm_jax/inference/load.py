"""`load(path)` -> LLM: loads a trained model for inference."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nextllm_jax.config import MeshConfig, ModelConfig
from nextllm_jax.config.checks import require, require_text
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.inference.llm import LLM
from nextllm_jax.model.quantize import abstract_quantized, regroup
from nextllm_jax.model.transformer import Transformer, abstract_params, resolve_dtype, set_matmul_precision
from nextllm_jax.model.weights import cast_matrices
from nextllm_jax.pretrained.open_model import open_model
from nextllm_jax.pretrained.source import Source
from nextllm_jax.progress import phase
from nextllm_jax.sharding import make_mesh, on_device, placed

MAX_UNROLLED_LAYERS = 32
"""Number of layers up to which `load` unrolls them. Unrolling 8 layers halves the time of a decode step of one row on a
CPU, and compiling takes a second longer. With 32 layers, compiling takes 8 s instead of 2 s; with 64, over 20 s."""


def load(
    path: str | os.PathLike[str],
    *,
    step: str | int | None = None,
    dtype: str | None = None,
    quantize: str | Quantization = "none",
    quantize_cache: bool = False,
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
    - `quantize_cache` keeps the keys and values of a text in int8 with a scale for each position and head, which takes
      about half of the memory of bfloat16.
    - `mesh` shards the model over all devices. None: one device.

    The tokenizer is loaded when it is first used. A model without one has `logits`, and the methods that need text
    raise InputError.

    Raises InputError as `open_model` does, if the mesh does not fit the devices or the model, or if the weights to
    quantize are quantized already.
    """
    path = os.fspath(path) if isinstance(path, os.PathLike) else path
    require_text("path", path)
    require(mesh is None or isinstance(mesh, MeshConfig), f"mesh is {mesh!r:.80}; it must be a MeshConfig")
    return load_source(
        open_model(path, step=step), path, dtype=dtype, quantize=quantize, quantize_cache=quantize_cache, mesh=mesh
    )


def load_source(
    source: Source,
    path: str,
    *,
    dtype: str | None = None,
    quantize: str | Quantization = "none",
    quantize_cache: bool = False,
    mesh: MeshConfig | None = None,
) -> LLM:
    """As `load`, for the opened model of `path`."""
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
    with phase(f"loading {path}"):
        if quantization is not None and quantization != quantization.by_channel and jax.default_backend() == "cpu":
            _, by_channel = decoding_model(config, compute_dtype, place, quantization.by_channel)
            params = regroup(source.load_params(abstract), by_channel)
        else:
            params = source.load_params(abstract)
    return LLM(config, params, source.load_tokenizer, compute_dtype, model.scan_layers, devices, quantize_cache)


def decoding_model(
    config: ModelConfig, dtype: np.dtype, place: Callable[[Any], Any], quantization: Quantization | None = None
) -> tuple[Transformer, Any]:
    """The module for decoding, and its abstract parameters, sharded as `place` shards boxed arrays."""
    model = Transformer(config.for_inference(), dtype, config.num_layers > MAX_UNROLLED_LAYERS)
    boxed = abstract_params(config, scan_layers=model.scan_layers)
    return model, abstract_quantized(boxed, cast_matrices(boxed, place(boxed), dtype), quantization)
