"""The key-value cache as a value: created once, passed in, handed back.

Slot s of a row holds position s of that row, so visibility is a comparison of numbers and no mask is
stored: a query at position p sees the slots s <= p. The pads of a right-padded prompt leave rubbish in
slots beyond the prompt; each is overwritten by the token that reaches it before anything can see it.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig
from nextllm_jax.sharding import constrain


@flax.struct.dataclass
class KVCache:
    """Keys and values: one array [L, B, K, S, H] of all layers, or one [1, B, K, S, H] a layer.

    A scan over layers needs the one; without a scan the many are read in place, where the one would be copied
    layer by layer. Slots lie next to each other (S after K), so that attention's products take them as they lie.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @classmethod
    def create(
        cls, config: ModelConfig, *, batch_size: int, length: int, dtype: Any, scan_layers: bool = True
    ) -> "KVCache":
        """An empty cache for `batch_size` rows of at most `length` positions; `scan_layers` as the Transformer's."""
        parts, layers = (1, config.num_layers) if scan_layers else (config.num_layers, 1)
        shape = (layers, batch_size, config.num_kv_heads, length, config.head_dim)
        keys, values = (tuple(_laid_out(jnp.zeros(shape, dtype)) for _ in range(parts)) for _ in range(2))
        return cls(keys, values)

    @property
    def length(self) -> int:
        """Positions that a row can hold."""
        return self.keys[0].shape[3]

    def split(self) -> list["KVCache"]:
        """A cache of one layer for each of the many arrays."""
        return [KVCache((keys,), (values,)) for keys, values in zip(self.keys, self.values, strict=True)]

    @classmethod
    def joined(cls, parts: Sequence["KVCache"]) -> "KVCache":
        """The cache that was split."""
        return cls(tuple(part.keys[0] for part in parts), tuple(part.values[0] for part in parts))

    def grown(self, length: int) -> "KVCache":
        """The cache with slots for `length` positions or, if it has them, as it is."""
        if length <= self.length:
            return self
        padding = ((0, 0), (0, 0), (0, 0), (0, length - self.length), (0, 0))
        return jax.tree.map(lambda x: jnp.pad(x, padding), self)

    def write(self, layer: jax.Array | int, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "KVCache":
        """The cache with a layer's new keys and values at their positions; positions past the end are dropped."""
        part, index = self._place(layer)
        rows_BT = jnp.broadcast_to(jnp.arange(k_BTKH.shape[0])[:, None], positions_BT.shape)

        def written(arrays: tuple[jax.Array, ...], new_BTKH: jax.Array) -> tuple[jax.Array, ...]:
            old_LBKSH = arrays[part]
            place = old_LBKSH.at[jnp.full_like(positions_BT, index), rows_BT, :, positions_BT]
            new_LBKSH = _laid_out(place.set(new_BTKH.astype(old_LBKSH.dtype), mode="drop"))
            return (*arrays[:part], new_LBKSH, *arrays[part + 1 :])

        return KVCache(written(self.keys, k_BTKH), written(self.values, v_BTKH))

    def view(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """A layer's keys and values, each [B, K, S, H]."""
        part, index = self._place(layer)
        k_BKSH = jax.lax.dynamic_index_in_dim(self.keys[part], index, keepdims=False)
        v_BKSH = jax.lax.dynamic_index_in_dim(self.values[part], index, keepdims=False)
        return k_BKSH, v_BKSH

    def _place(self, layer: Any) -> tuple[int, jax.Array | int]:
        """Which array a layer is in, and its index there."""
        return (0, layer) if len(self.keys) == 1 else (layer, 0)


def _laid_out(x_LBKSH: jax.Array) -> jax.Array:
    """Rows and heads divided over the mesh in force, as queries are; otherwise XLA may keep all heads everywhere."""
    return constrain(x_LBKSH, "layers", "batch", "kv_heads", None, None)
