"""A Llama-style language model trainer and sampler in JAX and Flax, from a laptop to an accelerator host."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextllm_jax.config import Config as Config
    from nextllm_jax.inference.llm import LLM as LLM
    from nextllm_jax.inference.load import load as load
    from nextllm_jax.training.launch import train as train

__version__ = "0.1.0"
__all__ = ["LLM", "Config", "load", "train"]

_HOMES = {
    "Config": "nextllm_jax.config",
    "LLM": "nextllm_jax.inference.llm",
    "load": "nextllm_jax.inference.load",
    "train": "nextllm_jax.training.launch",
}


def __getattr__(name: str) -> Any:
    # Lazy: reading a config does not import jax.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
