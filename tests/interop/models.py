"""A small random model of ours with a tokenizer, and its files in other formats."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.interop import huggingface
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.sharding import on_device
from nextllm_jax.tokenizer.bpe import train_tokenizer
from nextllm_jax.tokenizer.huggingface import save_huggingface
from tests import parameters

TOKENIZER = train_tokenizer(["a cat sat on a mat, and 12 other cats sat on other mats.\n" * 20], 280)
CONFIG = ModelConfig(
    vocab_size=288,  # more than the tokenizer's
    num_layers=3,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=64,
    dtype="float32",
)


def on_one_device(config: ModelConfig, *, scan_layers: bool = True) -> Any:
    """Abstract parameters on the first device."""
    return on_device(abstract_params(config, scan_layers=scan_layers), jax.devices()[0])


def random_params(config: ModelConfig) -> Any:
    """Parameters with nothing zero or one."""
    return parameters.random_params(nn.meta.unbox(abstract_params(config)))


def write_huggingface(directory: Path, config: ModelConfig = CONFIG, **options: Any) -> Any:
    """Write a directory with weights and tokenizer; the parameters."""
    params = random_params(config)
    huggingface.export(config, params, directory, vocab_size=config.vocab_size, **options)
    save_huggingface(TOKENIZER, directory)
    return params


def assert_equal_trees(left: Any, right: Any) -> None:
    """Same structure, types and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for mine, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
