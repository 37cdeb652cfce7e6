"""Generates the text in samples.txt."""

from collections.abc import Sequence
from typing import Any

import jax

from nextllm_jax.config import ModelConfig
from nextllm_jax.inference.llm import LLM
from nextllm_jax.model.transformer import abstract_params, resolve_dtype
from nextllm_jax.model.weights import cast_matrices
from nextllm_jax.tokenizer.tokenizer import Tokenizer


def sample_text(
    config: ModelConfig, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> list[tuple[str, str]]:
    """(prompt, continuation) for each prompt. Every process must call it, since it computes on the mesh."""
    dtype = resolve_dtype(config.dtype, jax.default_backend())
    llm = LLM(config, cast_matrices(abstract_params(config), params, dtype), lambda: tokenizer, dtype)
    return [(sample.prompt, sample.text) for sample in llm.generate(prompts, max_new_tokens=max_new_tokens)]
