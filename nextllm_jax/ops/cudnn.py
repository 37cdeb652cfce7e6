"""cuDNN's flash attention on NVIDIA GPUs, through jax.nn."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """`ops.attention.causal_attention` by cuDNN, for bfloat16 and head dims that are multiples of 8.

    Causality and windows are the kernel's own. Documents become a bias over all pairs of positions, B T T numbers
    (and the backward pass takes B N T T for it):
    other documents' scores are lowered by 1e9, so that their exponential beside a visible score is exactly 0, and
    nothing overflows in a row whose first block of keys is all masked. Without segment ids there is no such array.
    Only the output has a name for `jax.checkpoint`: the rest is out of reach.

    Raises NotImplementedError for a soft cap, which cuDNN does not know, and for what its kernel does not take.
    """
    if soft_cap is not None:
        raise NotImplementedError("cuDNN's attention has no soft cap; choose another model.attention")
    if q_BTNH.shape[1] != k_BTKH.shape[1]:
        raise NotImplementedError("cuDNN's attention cannot take a part of the queries")
    bias_B1TT = None
    if segment_ids_BT is not None:
        same_B1TT = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
        bias_B1TT = jnp.where(same_B1TT, 0, -1e9).astype(q_BTNH.dtype)
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        bias=bias_B1TT,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return checkpoint_name(jnp.asarray(out_BTNH), "attention_out")
