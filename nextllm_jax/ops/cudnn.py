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
    """`ops.attention.causal_attention` with cuDNN, for bfloat16 and head dims that are multiples of 8.

    The kernel itself supports causality and windows. Segment ids become a bias of B x T x T values, whose backward pass
    needs B x N x T x T values. The bias is -1e9 between documents: large enough that the softmax of a masked logit is
    exactly 0, and small enough that a row whose first block of keys is fully masked does not overflow. Without segment
    ids there is no bias. For `jax.checkpoint`, only the output has a name ("attention_out").

    Raises NotImplementedError for a soft cap and for fewer queries than keys, which cuDNN does not support.
    """
    if soft_cap is not None:
        raise NotImplementedError("cuDNN's attention has no soft cap; choose another model.attention")
    if q_BTNH.shape[1] != k_BTKH.shape[1]:
        raise NotImplementedError("cuDNN's attention needs as many queries as keys; choose another model.attention")
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
