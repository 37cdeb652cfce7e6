"""A Llama-style language model trainer and sampler in JAX and Flax, from a laptop to an accelerator host."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextllm_jax.inference.llm import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that reading a config does not import jax.
    if name == "load":
        from nextllm_jax.inference.llm import load

        return load
    raise AttributeError(f"module {__name__} has no attribute {name}")
