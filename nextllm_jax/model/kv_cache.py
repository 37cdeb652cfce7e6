"""The key-value cache, an immutable value that is passed to the model and returned by it.

Slot s of a row holds position s of that row. A query at position p sees the slots s <= p, so no mask is stored. Padding
of a right-padded prompt leaves garbage in the slots after the prompt. Each of these is overwritten before any query can
see it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig
from nextllm_jax.sharding import constrain


class LayerCache(NamedTuple):
    """The keys and values of a layer. Those of an int8 cache are to be multiplied by their scales."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array | None = None
    v_scale_BKS: jax.Array | None = None


@flax.struct.dataclass
class KVCache:
    """Keys and values: one array [L, B, K, S, H] for all layers, or one array [1, B, K, S, H] per layer.

    A scan over layers needs the single array. Without a scan, separate arrays are updated in place; a single array
    would be copied for each layer. S comes after K, so attention needs no transpose.

    An int8 cache also has scales, float32 [L or 1, B, K, S]: one for each key and each value of a head.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    key_scales: tuple[jax.Array, ...] = ()
    value_scales: tuple[jax.Array, ...] = ()

    @classmethod
    def create(
        cls, config: ModelConfig, *, batch_size: int, length: int, dtype: Any, scan_layers: bool = True
    ) -> "KVCache":
        """An empty cache for `batch_size` rows of at most `length` positions. `scan_layers` as in the Transformer."""
        parts, layers = (1, config.num_layers) if scan_layers else (config.num_layers, 1)
        shape = (layers, batch_size, config.num_kv_heads, length, config.head_dim)

        def arrays(shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, ...]:
            return tuple(_sharded(jnp.zeros(shape, dtype)) for _ in range(parts))

        cache = cls(arrays(shape, dtype), arrays(shape, dtype))
        if jnp.dtype(dtype) != jnp.int8:
            return cache
        return cache.replace(  # pyright: ignore[reportAttributeAccessIssue]
            key_scales=arrays(shape[:-1], jnp.float32), value_scales=arrays(shape[:-1], jnp.float32)
        )

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
        fields = [self.keys, self.values, self.key_scales, self.value_scales]
        return [KVCache(*(arrays[i : i + 1] for arrays in fields)) for i in range(len(self.keys))]

    @classmethod
    def joined(cls, parts: Sequence["KVCache"]) -> "KVCache":
        """The cache of all layers, from the caches that `split` returned."""
        return jax.tree.map(lambda *arrays: sum(arrays, ()), *parts, is_leaf=_is_arrays)

    def grown(self, length: int) -> "KVCache":
        """The cache with slots for at least `length` positions."""
        if length <= self.length:
            return self
        more = length - self.length
        return jax.tree.map(lambda x: jnp.pad(x, [(0, more if axis == 3 else 0) for axis in range(x.ndim)]), self)

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

        def written(arrays: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
            old = arrays[part]
            slots = old.at[jnp.full_like(positions_BT, index), rows_BT, :, positions_BT]
            return (*arrays[:part], _sharded(slots.set(new.astype(old.dtype), mode="drop")), *arrays[part + 1 :])

        if not self.key_scales:
            return KVCache(written(self.keys, k_BTKH), written(self.values, v_BTKH))
        (k_BTKH, k_scale_BTK), (v_BTKH, v_scale_BTK) = _quantized(k_BTKH), _quantized(v_BTKH)
        return KVCache(
            written(self.keys, k_BTKH),
            written(self.values, v_BTKH),
            written(self.key_scales, k_scale_BTK),
            written(self.value_scales, v_scale_BTK),
        )

    def view(self, layer: jax.Array | int) -> LayerCache:
        """A layer's keys and values."""
        part, index = self._location(layer)
        arrays = [each[part] for each in (self.keys, self.values, self.key_scales, self.value_scales) if each]
        return LayerCache(*(jax.lax.dynamic_index_in_dim(array, index, keepdims=False) for array in arrays))

    def _location(self, layer: Any) -> tuple[int, jax.Array | int]:
        """(number of the array that holds a layer, the layer's index in it)."""
        return (0, layer) if len(self.keys) == 1 else (layer, 0)


def _sharded(x: jax.Array) -> jax.Array:
    """An array with batch and heads sharded over the current mesh; otherwise XLA might replicate all heads."""
    return constrain(x, "layers", "batch", "kv_heads", *[None] * (x.ndim - 3))


def _quantized(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values in -127 to 127, and a float32 scale [B, T, K] that they are to be multiplied by."""
    x_BTKH = x_BTKH.astype(jnp.float32)
    scale_BTK = jnp.maximum(jnp.max(jnp.abs(x_BTKH), axis=-1) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x_BTKH / scale_BTK[..., None]), scale_BTK


def _is_arrays(x: Any) -> bool:
    return isinstance(x, tuple)
