"""The compiled programs of the engine that prepare slots and read prompts; `inference.decode` generates tokens.

N is the number of slots, B the number of rows that a program processes. The state is donated, so it is updated in
place. A program works on a part of the cache: B of the slots and the first `length` positions. It copies this part out
before its loop and back after it, unless it is the whole cache.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from nextllm_jax.model.kv_cache import KVCache
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.sharding import constrain


@flax.struct.dataclass
class Network:
    """A model with its parameters."""

    model: Transformer = flax.struct.field(pytree_node=False)
    params: Any

    def apply(self, tokens_BT: Any, positions_BT: Any, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """The hidden states [B, T, D], and the cache with the keys and values of the tokens."""
        return self.model.apply({"params": self.params}, tokens_BT, positions_BT, cache=cache)  # pyright: ignore[reportReturnType]

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """The logits, float32 [B, T, V]."""
        return self.model.apply({"params": self.params}, hidden_BTD, method="logits")  # pyright: ignore[reportReturnType]


@flax.struct.dataclass
class State:
    """What the engine keeps on the devices for its slots."""

    cache: KVCache
    draft_cache: KVCache | None
    """The cache of the draft model, if there is one."""
    counts_NV: jax.Array
    """2 x the number of times that a token is in the new text, + 1 if it is in the prompt; if `Rows.adjusts_B`."""
    bias_NV: jax.Array
    """Added to the logits if `Rows.adjusts_B`."""

    def taken(self, slot_B: jax.Array, length: int) -> "State":
        """The state with the first `length` positions of the slots in its caches; see `KVCache.taken`."""
        return self._with_caches(lambda cache, _: cache.taken(slot_B, length), self)

    def put(self, slot_B: jax.Array, part: "State") -> "State":
        """`part`, which `taken` returned, within the caches of this state."""
        return part._with_caches(lambda cache, whole: whole.put(slot_B, cache), self)

    def _with_caches(self, change: Any, other: "State") -> "State":
        draft_cache = None if self.draft_cache is None else change(self.draft_cache, other.draft_cache)
        return dataclasses.replace(self, cache=change(self.cache, other.cache), draft_cache=draft_cache)

    def copied(self, source: jax.Array, target: jax.Array) -> "State":
        """The state with the cache of slot `source` in slot `target` too."""
        return self._with_caches(lambda cache, _: cache.copied(source, target), self)

    def grown(self, length: int) -> "State":
        """The state with slots of at least `length` positions."""
        return self._with_caches(lambda cache, _: cache.grown(length), self)


@functools.partial(jax.jit, static_argnames=("model", "draft_model", "num_slots", "length", "quantize_cache"))
def create(
    model: Transformer, draft_model: Transformer | None, *, num_slots: int, length: int, quantize_cache: bool = False
) -> State:
    """The state of `num_slots` empty slots of `length` positions, with an int8 cache if `quantize_cache` is set."""

    def cache_of(model: Transformer) -> KVCache:
        dtype = jnp.int8 if quantize_cache else model.dtype
        return KVCache.create(
            model.config, batch_size=num_slots, length=length, dtype=dtype, scan_layers=model.scan_layers
        )

    zeros_NV = constrain(jnp.zeros((num_slots, model.config.vocab_size)), "batch", "vocab")
    draft_cache = None if draft_model is None else cache_of(draft_model)
    return State(cache_of(model), draft_cache, zeros_NV.astype(jnp.int32), zeros_NV)


@functools.partial(jax.jit, donate_argnames=("state",))
def place(state: State, slot: jax.Array, source: jax.Array, counts_V: jax.Array, bias_V: jax.Array) -> State:
    """The state after the cache of slot `source` is copied to `slot`, whose counts and biases are set."""
    return dataclasses.replace(
        state.copied(source, slot),
        counts_NV=state.counts_NV.at[slot].set(counts_V),
        bias_NV=state.bias_NV.at[slot].set(bias_V),
    )


@functools.partial(jax.jit, static_argnames=("length",), donate_argnames=("state",))
def prefill(
    network: Network,
    draft: Network | None,
    state: State,
    slot_B: jax.Array,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    *,
    length: int,
) -> State:
    """The state after the tokens, padded on the right, are written to the cache from position `start` on.

    Padding is written too. Nothing attends to it, since each position is written again before a query reaches it.
    """
    positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    part = state.taken(slot_B, length)
    _, cache = network.apply(tokens_BT, positions_BT, part.cache)
    draft_cache = part.draft_cache
    if draft is not None and draft_cache is not None:
        _, draft_cache = draft.apply(tokens_BT, positions_BT, draft_cache)
    return state.put(slot_B, dataclasses.replace(part, cache=cache, draft_cache=draft_cache))
