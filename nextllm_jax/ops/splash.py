"""Splash attention: JAX's sparse flash attention for TPU, written in Pallas.

Dimension letters: B batch, T query time, S key time, N query heads, K key heads, H head dim.
"""

import concurrent.futures
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128
"""Width of a TPU's vector registers. Block sizes must be multiples of it."""

# Block sizes of queries and keys by device kind. A float32 block of logits must fit in the chip's vector memory, of
# which a kernel gets 16 MiB by default (v6e: 32 MiB). With larger blocks, keys are read less often.
_BLOCKS = {
    "TPU v5": (1024, 512),
    "TPU v5p": (1024, 512),
    "TPU v6 lite": (1024, 1024),
    "TPU v6e": (1024, 1024),
    "TPU7x": (1024, 1024),
}


def default_blocks(device_kind: str) -> tuple[int, int]:
    """Positions per block of queries and per block of keys for a `jax.Device.device_kind`."""
    return _BLOCKS.get(device_kind, (512, 512))


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segment_ids_BS: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    blocks: tuple[int, int],
    shard: jax.Array | int = 0,
    interpret: bool = False,
) -> jax.Array:
    """`ops.attention.causal_attention` with the splash kernel, which neither builds T x S arrays nor repeats key heads.

    - `blocks` are the positions per block of queries and of keys, multiples of 128. Sequences are padded at the end to
      a multiple of both.
    - With fewer queries than keys, S = n T, the queries are shard number `shard` of n. Then T must be a multiple of the
      block of queries.
    - The scale is applied to the queries, in their dtype.
    - `interpret` runs the kernel on any device, slowly.

    For `jax.checkpoint`, the output and the log-sum-exp are both named "attention_out". XLA cannot shard the kernel, so
    call it in `shard_map`. Raises ValueError for block sizes that do not fit.
    """
    T, S, N, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2], q_BTNH.shape[3]
    block_q, block_kv = (min(block, -(-S // LANES) * LANES) for block in blocks)
    if block_q % LANES or block_kv % LANES:
        raise ValueError(f"the blocks of splash attention are {block_q} and {block_kv}; they must be multiples of 128")
    shards = S // T
    padding = -S % math.lcm(block_q, block_kv)
    if shards > 1 and (padding or T % block_q):
        raise ValueError(f"{T} queries of {S} positions are not divisible into blocks of {block_q} and {block_kv}")
    scaled_BTNH = (q_BTNH * (H**-0.5 if scale is None else scale)).astype(q_BTNH.dtype)
    q_BNTH, k_BKSH, v_BKSH = (_heads_first(x, padding) for x in (scaled_BTNH, k_BSKH, v_BSKH))
    ids = None
    if segment_ids_BS is not None:
        ids_BS = jnp.pad(segment_ids_BS, ((0, 0), (0, padding)))
        ids = splash.SegmentIds(jax.lax.dynamic_slice_in_dim(ids_BS, shard * T, T + padding, axis=1), ids_BS)
    kernel = _kernel(N, S + padding, shards, window, soft_cap, block_q, block_kv, interpret)
    if shards > 1:
        kernel = jax.tree.map(functools.partial(_part, shards=shards, shard=shard), kernel)
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, ids)
    return jnp.einsum("BNTH->BTNH", out_BNTH[:, :, :T])


def _heads_first(x_BTNH: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(jnp.einsum("BTNH->BNTH", x_BTNH), ((0, 0), (0, 0), (0, padding), (0, 0)))


def _part(leaf: np.ndarray, *, shards: int, shard: jax.Array | int) -> jax.Array:
    """A shard's part of an array of mask information: [heads, query blocks, key blocks], or [queries]."""
    axis = 1 if leaf.ndim == 3 else 0
    size = leaf.shape[axis] // shards
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), shard * size, size, axis)


class _Mask(masks.LocalMask):
    """The causal mask, with an optional window.

    JAX only asks of each block whether any or all of its elements are visible. If two corners decide that, a single
    element is returned instead of the block. Whole blocks would take minutes for 131,072 positions.
    """

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        rows, columns = idx
        nearest, farthest = rows.start - (columns.stop - 1), rows.stop - 1 - columns.start
        reach = self.shape[1] if self.window_size[0] is None else self.window_size[0]
        if farthest < 0 or nearest > reach:
            return np.zeros((1, 1), np.bool_)
        if nearest >= 0 and farthest <= reach:
            return np.ones((1, 1), np.bool_)
        return super().__getitem__(idx)


@functools.lru_cache(maxsize=64)
def _kernel(
    num_heads: int,
    length: int,
    shards: int,
    window: int | None,
    soft_cap: float | None,
    block_q: int,
    block_kv: int,
    interpret: bool,
) -> Any:
    """The kernel for whole sequences with numpy arrays, cached, since preparing a long mask takes seconds."""
    mask = _Mask((length, length), (None if window is None else window - 1, 0), 0)
    make = functools.partial(
        splash.make_splash_mha,
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name="attention_out",
        interpret=interpret,
    )
    # `make` creates jax arrays. In a new thread they belong neither to the current trace nor to the current mesh, whose
    # devices may only be a topology to compile for.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(lambda: jax.tree.map(np.asarray, make())).result()
