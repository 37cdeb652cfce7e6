"""The key-value cache as a value: created once, passed in, handed back.

Slot s of a row holds position s of that row, so visibility is a comparison of numbers and no mask is
stored: a query at position p sees the slots s <= p. The pads of a right-padded prompt leave rubbish in
slots beyond the prompt; each is overwritten by the token that reaches it before anything can see it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, [L, B, S, K, H]."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, *, batch_size: int, length: int, dtype: Any) -> "KVCache":
        """An empty cache for `batch_size` rows of at most `length` positions."""
        shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
        return cls(k_LBSKH=jnp.zeros(shape, dtype), v_LBSKH=jnp.zeros(shape, dtype))

    @property
    def length(self) -> int:
        """Positions that a row can hold."""
        return self.k_LBSKH.shape[2]

    def write(self, layer: jax.Array | int, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "KVCache":
        """The cache with a layer's new keys and values at their positions; positions past the end are dropped."""
        rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
        where = (jnp.full_like(positions_BT, layer), jnp.broadcast_to(rows_B1, positions_BT.shape), positions_BT)
        return KVCache(
            k_LBSKH=self.k_LBSKH.at[where].set(k_BTKH.astype(self.k_LBSKH.dtype), mode="drop"),
            v_LBSKH=self.v_LBSKH.at[where].set(v_BTKH.astype(self.v_LBSKH.dtype), mode="drop"),
        )

    def view(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """A layer's keys and values, each [B, S, K, H]."""
        k_BSKH = jax.lax.dynamic_index_in_dim(self.k_LBSKH, layer, keepdims=False)
        v_BSKH = jax.lax.dynamic_index_in_dim(self.v_LBSKH, layer, keepdims=False)
        return k_BSKH, v_BSKH
