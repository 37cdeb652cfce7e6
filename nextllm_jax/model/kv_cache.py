"""The key-value cache, an immutable value that is passed to the model and returned by it.

Slot s of a row holds position s of that row. A query at position p sees the slots s <= p, so no mask is stored. Padding
of a right-padded prompt leaves garbage in the slots after the prompt. Each of these is overwritten before any query can
see it.
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
    """Keys and values: one array [L, B, K, S, H] for all layers, or one array [1, B, K, S, H] per layer.

    A scan over layers needs the single array. Without a scan, separate arrays are updated in place; a single array
    would be copied for each layer. S comes after K, so attention needs no transpose.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @classmethod
    def create(
        cls, config: ModelConfig, *, batch_size: int, length: int, dtype: Any, scan_layers: bool = True
    ) -> "KVCache":
        """An empty cache for `batch_size` rows of at most `length` positions. `scan_layers` as in the Transformer."""
        parts, layers = (1, config.num_layers) if scan_layers else (config.num_layers, 1)
        shape = (layers, batch_size, config.num_kv_heads, length, config.head_dim)
        keys, values = (tuple(_sharded(jnp.zeros(shape, dtype)) for _ in range(parts)) for _ in range(2))
        return cls(keys, values)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.keys[0].shape[1]

    @property
    def length(self) -> int:
        """Number of positions that a row can hold."""
        return self.keys[0].shape[3]

    def split(self) -> list["KVCache"]:
        """A cache for each layer; for a cache with one array per layer."""
        return [KVCache((keys,), (values,)) for keys, values in zip(self.keys, self.values, strict=True)]

    @classmethod
    def joined(cls, parts: Sequence["KVCache"]) -> "KVCache":
        """The cache of all layers, from the caches that `split` returned."""
        return cls(tuple(part.keys[0] for part in parts), tuple(part.values[0] for part in parts))

    def grown(self, length: int) -> "KVCache":
        """The cache with slots for at least `length` positions."""
        if length <= self.length:
            return self
        padding = ((0, 0), (0, 0), (0, 0), (0, length - self.length), (0, 0))
        return jax.tree.map(lambda x: jnp.pad(x, padding), self)

    def taken(self, slot_B: jax.Array, length: int) -> "KVCache":
        """The first `length` positions of the rows `slot_B`. An index past the end gives the last row.

        If `slot_B` has as many indices as the cache has rows, they must be all rows in order.
        """
        if len(slot_B) == self.num_rows:
            return self if length == self.length else jax.tree.map(lambda x: x[:, :, :, :length], self)
        return jax.tree.map(lambda x: _sharded(x.at[:, slot_B, :, :length].get(mode="clip")), self)

    def put(self, slot_B: jax.Array, part: "KVCache") -> "KVCache":
        """The cache with the result of `taken` written back. Rows with an index past the end are dropped."""
        if len(slot_B) == self.num_rows:
            if part.length == self.length:
                return part
            return jax.tree.map(lambda x, new: x.at[:, :, :, : part.length].set(new), self, part)
        return jax.tree.map(lambda x, new: x.at[:, slot_B, :, : part.length].set(new, mode="drop"), self, part)

    def copied(self, source: jax.Array, target: jax.Array) -> "KVCache":
        """The cache with row `target` replaced by row `source`."""

        def copy(x: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(x, source, axis=1)
            return _sharded(jax.lax.dynamic_update_slice_in_dim(x, row, target, axis=1))

        return jax.tree.map(copy, self)

    def write(self, layer: jax.Array | int, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "KVCache":
        """The cache with a layer's keys and values written at `positions_BT`. Positions past the end are dropped."""
        part, index = self._location(layer)
        rows_BT = jnp.broadcast_to(jnp.arange(k_BTKH.shape[0])[:, None], positions_BT.shape)

        def written(arrays: tuple[jax.Array, ...], new_BTKH: jax.Array) -> tuple[jax.Array, ...]:
            old_LBKSH = arrays[part]
            slots = old_LBKSH.at[jnp.full_like(positions_BT, index), rows_BT, :, positions_BT]
            new_LBKSH = _sharded(slots.set(new_BTKH.astype(old_LBKSH.dtype), mode="drop"))
            return (*arrays[:part], new_LBKSH, *arrays[part + 1 :])

        return KVCache(written(self.keys, k_BTKH), written(self.values, v_BTKH))

    def view(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """A layer's keys and values, each [B, K, S, H]."""
        part, index = self._location(layer)
        k_BKSH = jax.lax.dynamic_index_in_dim(self.keys[part], index, keepdims=False)
        v_BKSH = jax.lax.dynamic_index_in_dim(self.values[part], index, keepdims=False)
        return k_BKSH, v_BKSH

    def _location(self, layer: Any) -> tuple[int, jax.Array | int]:
        """(number of the array that holds a layer, the layer's index in it)."""
        return (0, layer) if len(self.keys) == 1 else (layer, 0)


def _sharded(x_LBKSH: jax.Array) -> jax.Array:
    """The array with batch and heads sharded over the current mesh; otherwise XLA might replicate all heads."""
    return constrain(x_LBKSH, "layers", "batch", "kv_heads", None, None)
