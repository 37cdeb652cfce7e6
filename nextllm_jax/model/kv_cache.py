"""The key-value cache, an immutable value that is passed to the model and returned by it.

A row holds its position p in slot p, or in slot p % S of a ring of S slots. A query at position p sees its own position
and earlier ones, so no mask is stored. Padding of a right-padded prompt leaves garbage in the slots after the prompt.
Each of these is overwritten before any query can see it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig
from nextllm_jax.sharding import constrain


class LayerCache(NamedTuple):
    """The keys and values of a layer. Int8 ones must be multiplied by their scales."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array | None = None
    v_scale_BKS: jax.Array | None = None


@flax.struct.dataclass
class Entries:
    """The keys and values of L layers, and in an int8 cache their float32 scales, one for each position and head.

    If `length`, the number of positions, exceeds S, the S slots are a ring.
    """

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    k_scale_LBKS: jax.Array | None
    v_scale_LBKS: jax.Array | None
    length: int = flax.struct.field(pytree_node=False)
    ring_length: int | None = flax.struct.field(pytree_node=False)
    """The most slots that the layers need, if they have a window."""

    @classmethod
    def create(cls, shape: tuple[int, ...], dtype: Any, ring_length: int | None) -> "Entries":
        """Empty entries of the shape [L, B, K, length, H]."""
        L, B, K, length, H = shape
        slots = (L, B, K, length if ring_length is None else min(length, ring_length))
        k_LBKSH, v_LBKSH = (_sharded(jnp.zeros((*slots, H), dtype)) for _ in range(2))
        is_int8 = jnp.dtype(dtype) == jnp.int8
        k_scale_LBKS, v_scale_LBKS = (_sharded(jnp.zeros(slots, jnp.float32)) if is_int8 else None for _ in range(2))
        return cls(k_LBKSH, v_LBKSH, k_scale_LBKS, v_scale_LBKS, length, ring_length)

    @property
    def num_slots(self) -> int:
        """S, the number of slots of a row."""
        return self.k_LBKSH.shape[3]

    def with_length(self, length: int, change: Callable[..., jax.Array], *others: "Entries") -> "Entries":
        """The entries with each array changed, given those of `others` too, for `length` positions."""
        arrays = [[each.k_LBKSH, each.v_LBKSH, each.k_scale_LBKS, each.v_scale_LBKS] for each in (self, *others)]
        changed = [None if each[0] is None else change(*each) for each in zip(*arrays, strict=True)]
        return Entries(*changed, length=length, ring_length=self.ring_length)  # pyright: ignore

    def slots_of(self, positions_BT: jax.Array) -> jax.Array:
        """The slots of positions; those past the end have one that does not exist."""
        if self.num_slots == self.length:
            return positions_BT
        return jnp.where(positions_BT < self.length, positions_BT % self.num_slots, self.num_slots)


@flax.struct.dataclass
class KVCache:
    """Keys and values: the `Entries` of all layers together, or those of each layer.

    A scan over layers needs them together. Without a scan, separate arrays are updated in place; a single array would
    be copied for each layer. S comes after K, so attention needs no transpose.
    """

    entries: tuple[Entries, ...]

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        *,
        batch_size: int,
        length: int,
        dtype: Any,
        scan_layers: bool = True,
        ring_slack: int | None = None,
    ) -> "KVCache":
        """An empty cache for `batch_size` rows of at most `length` positions. `scan_layers` as in the Transformer.

        With `ring_slack`, a layer with a window keeps only that many positions more than its window, if layers have
        entries of their own. A call must then write fewer than `ring_slack` positions per row.
        """
        shape = (batch_size, config.num_kv_heads, length, config.head_dim)
        if scan_layers:
            return cls((Entries.create((config.num_layers, *shape), dtype, None),))

        def ring_length(layer: int) -> int | None:
            kind, window = config.layer_pattern[layer % len(config.layer_pattern)], config.sliding_window
            return None if kind != "local" or window is None or ring_slack is None else window + ring_slack

        return cls(tuple(Entries.create((1, *shape), dtype, ring_length(i)) for i in range(config.num_layers)))

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.entries[0].k_LBKSH.shape[1]

    @property
    def length(self) -> int:
        """Number of positions that a row can hold."""
        return self.entries[0].length

    def split(self) -> list["KVCache"]:
        """A cache for each layer; for a cache with entries for each layer."""
        return [KVCache((each,)) for each in self.entries]

    @classmethod
    def joined(cls, parts: Sequence["KVCache"]) -> "KVCache":
        """The cache of all layers, from the caches that `split` returned."""
        return cls(tuple(each for part in parts for each in part.entries))

    def grown(self, length: int) -> "KVCache":
        """The cache with slots for at least `length` positions."""

        def grow(entries: Entries) -> Entries:
            needed = length if entries.ring_length is None else min(length, entries.ring_length)
            more = needed - entries.num_slots
            return entries.with_length(
                length, lambda x: jnp.pad(x, [(0, more if axis == 3 else 0) for axis in range(x.ndim)])
            )

        return self if length <= self.length else KVCache(tuple(map(grow, self.entries)))

    def taken(self, slot_B: jax.Array, length: int) -> "KVCache":
        """The first `length` positions of the rows `slot_B`. An index past the end gives the last row.

        If `slot_B` has as many indices as the cache has rows, they must be all rows in order.
        """
        if len(slot_B) < self.num_rows:
            take = lambda x: _sharded(x.at[:, slot_B, :, :length].get(mode="clip"))  # noqa: E731
        elif length < self.length:
            take = lambda x: x[:, :, :, :length]  # noqa: E731
        else:
            return self
        return KVCache(tuple(entries.with_length(length, take) for entries in self.entries))

    def put(self, slot_B: jax.Array, part: "KVCache") -> "KVCache":
        """The cache with the result of `taken` written back. Rows with an index past the end are dropped."""
        if len(slot_B) < self.num_rows:
            put = lambda x, new: x.at[:, slot_B, :, : new.shape[3]].set(new, mode="drop")  # noqa: E731
        elif part.length < self.length:
            put = lambda x, new: x.at[:, :, :, : new.shape[3]].set(new)  # noqa: E731
        else:
            return part
        pairs = zip(self.entries, part.entries, strict=True)
        return KVCache(tuple(whole.with_length(self.length, put, new) for whole, new in pairs))

    def copied(self, source: jax.Array, target: jax.Array) -> "KVCache":
        """The cache with row `target` replaced by row `source`."""

        def copy(x: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(x, source, axis=1)
            return _sharded(jax.lax.dynamic_update_slice_in_dim(x, row, target, axis=1))

        return jax.tree.map(copy, self)

    def write(self, layer: jax.Array | int, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "KVCache":
        """The cache with a layer's keys and values written at `positions_BT`. Positions past the end are dropped."""
        part, index = self._location(layer)
        entries = self.entries[part]
        new = Entries(k_BTKH, v_BTKH, None, None, 0, None)
        if entries.k_scale_LBKS is not None:
            (k_BTKH, k_scale_BTK), (v_BTKH, v_scale_BTK) = _quantized(k_BTKH), _quantized(v_BTKH)
            new = Entries(k_BTKH, v_BTKH, k_scale_BTK, v_scale_BTK, 0, None)
        # The heads are indices too. With a window over them, a TPU would want another layout than attention reads, and
        # copy the cache between the two.
        B, _, K, _ = k_BTKH.shape
        row_B11, head_11K = jnp.arange(B)[:, None, None], jnp.arange(K)[None, None]
        place = (jnp.full_like(row_B11, index), row_B11, head_11K, entries.slots_of(positions_BT)[..., None])

        def set_(x: jax.Array, new: jax.Array) -> jax.Array:
            return _sharded(x.at[place].set(new.astype(x.dtype), mode="drop"))

        written = entries.with_length(entries.length, set_, new)
        return KVCache((*self.entries[:part], written, *self.entries[part + 1 :]))

    def view(self, layer: jax.Array | int) -> LayerCache:
        """A layer's keys and values."""
        part, index = self._location(layer)
        arrays = jax.tree.leaves(self.entries[part])
        return LayerCache(*(jax.lax.dynamic_index_in_dim(array, index, keepdims=False) for array in arrays))

    def _location(self, layer: Any) -> tuple[int, jax.Array | int]:
        """(number of the entries that hold a layer, the layer's index in them)."""
        return (0, layer) if len(self.entries) == 1 else (layer, 0)


def _sharded(x: jax.Array) -> jax.Array:
    """An array with batch and heads sharded over the current mesh; otherwise XLA might replicate all heads."""
    return constrain(x, "layers", "batch", "kv_heads", *[None] * (x.ndim - 3))


def _quantized(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values in -127 to 127, and their float32 scale [B, T, K]."""
    x_BTKH = x_BTKH.astype(jnp.float32)
    scale_BTK = jnp.maximum(jnp.max(jnp.abs(x_BTKH), axis=-1) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x_BTKH / scale_BTK[..., None]), scale_BTK
