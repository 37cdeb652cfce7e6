"""Perplexity with keys and values in int8 against the type of the model.

    python benchmarks/int8_cache.py [--checkpoint smollm2] [--window 512] [--num-windows 8] [TEXT_FILE ...]

The texts (default: the documentation of Python's pydoc topics) are read through the cache of the decoder, one window at
a time, so each token attends to keys and values as a generated token does.
"""

import argparse
import functools
import math
import pydoc_data.topics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nextllm_jax
from nextllm_jax.inference.llm import LLM
from nextllm_jax.model.kv_cache import KVCache
from nextllm_jax.model.transformer import Transformer


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def mean_nll(model: Transformer, params: Any, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """The mean negative log-likelihood of the tokens after the first of each row, in nats."""
    B, T = tokens_BT.shape
    cache = KVCache.create(model.config, batch_size=B, length=T, dtype=dtype, scan_layers=model.scan_layers)
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    hidden_BTD, _ = model.apply({"params": params}, tokens_BT, positions_BT, cache=cache)
    logits_BTV = model.apply({"params": params}, hidden_BTD[:, :-1], method="logits")
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)  # pyright: ignore[reportArgumentType]
    return -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1).mean()


def perplexity(llm: LLM, tokens: np.ndarray, dtype: str) -> float:
    """The perplexity of windows [N, T] with a cache of `dtype`."""
    return math.exp(np.mean([mean_nll(llm.model, llm.params, row[None], dtype) for row in tokens]))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="*", metavar="TEXT_FILE")
    parser.add_argument("--checkpoint", default="smollm2")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--num-windows", type=int, default=8)
    arguments = parser.parse_args()
    texts = [path.read_text() for path in arguments.texts] or list(pydoc_data.topics.topics.values())
    llm = nextllm_jax.load(arguments.checkpoint, dtype=arguments.dtype)
    ids = llm.tokenizer.encode("\n".join(texts))[: arguments.num_windows * arguments.window]
    tokens = np.asarray(ids[: len(ids) // arguments.window * arguments.window], np.int32).reshape(-1, arguments.window)
    print(f"{tokens.size:,} tokens in windows of {arguments.window}\n\n| keys and values | perplexity |\n|---|---|")
    for dtype in (arguments.dtype, "int8"):
        print(f"| {dtype} | {perplexity(llm, tokens, dtype):.4f} |")


if __name__ == "__main__":
    main()
