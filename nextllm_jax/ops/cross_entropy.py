"""Cross-entropy of a language-model head that never holds the logits of all tokens.

Dimension letters: B batch, T time, D embed, V vocabulary, C tokens of one chunk.
"""

import functools

import jax
import jax.numpy as jnp


def cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    chunk_tokens: int = 1024,
) -> jax.Array:
    """Negative log-likelihood of the targets, in nats, summed over mask: a float32 scalar.

    The logits are hidden @ head.T, multiplied in hidden's dtype (head is cast to it), accumulated and normalized in
    float32. The time axis is cut so that about chunk_tokens rows of logits exist at once, so memory is
    chunk_tokens x V and a batch that is sharded over devices stays so. Under differentiation the gradients for
    hidden (in its dtype) and head (summed in float32, returned in head's dtype) are made beside the logits, which
    are then dropped; the backward pass only scales them. Not differentiable twice, nor in the mask.
    """
    B, T, _ = hidden_BTD.shape
    num_chunks = -(-T // max(1, chunk_tokens // B))
    return _nll_sum(num_chunks, hidden_BTD, head_VD, targets_BT, mask_BT.astype(jnp.float32))


def _chunks(num_chunks: int, x_BT: jax.Array) -> jax.Array:
    """[num_chunks, B * tokens, ...] of [B, T, ...], the time axis padded with zeros where it does not divide."""
    B, T, *rest = x_BT.shape
    length = -(-T // num_chunks)
    padding = [(0, 0), (0, num_chunks * length - T)] + [(0, 0)] * len(rest)
    x_BT = jnp.pad(x_BT, padding).reshape(B, num_chunks, length, *rest)
    return jnp.moveaxis(x_BT, 1, 0).reshape(num_chunks, B * length, *rest)


def _chunk_nll(x_CD, head_VD, targets_C, mask_C):
    """(summed nll, logits [C, V], their log-sum-exp [C], where the targets are [C, V])."""
    logits_CV = jnp.einsum("CD,VD->CV", x_CD, head_VD, preferred_element_type=jnp.float32)
    log_sum_C = jax.nn.logsumexp(logits_CV, axis=-1)
    is_target_CV = jnp.arange(head_VD.shape[0])[None, :] == targets_C[:, None]
    # A masked sum, not a gather: it stays local when the vocabulary is sharded.
    target_logit_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
    return jnp.sum((log_sum_C - target_logit_C) * mask_C), logits_CV, log_sum_C, is_target_CV


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll_sum(num_chunks, hidden_BTD, head_VD, targets_BT, mask_BT):
    head = head_VD.astype(hidden_BTD.dtype)

    def add_chunk(total, chunk):
        x_CD, targets_C, mask_C = chunk
        return total + _chunk_nll(x_CD, head, targets_C, mask_C)[0], None

    chunks = jax.tree.map(functools.partial(_chunks, num_chunks), (hidden_BTD, targets_BT, mask_BT))
    return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), chunks)[0]


def _nll_sum_forward(num_chunks, hidden_BTD, head_VD, targets_BT, mask_BT):
    dtype = hidden_BTD.dtype
    head = head_VD.astype(dtype)

    def add_chunk(carry, chunk):
        total, d_head_VD = carry
        x_CD, targets_C, mask_C = chunk
        nll, logits_CV, log_sum_C, is_target_CV = _chunk_nll(x_CD, head, targets_C, mask_C)
        d_logits_CV = (jnp.exp(logits_CV - log_sum_C[:, None]) - is_target_CV) * mask_C[:, None]
        d_logits_CV = d_logits_CV.astype(dtype)
        d_x_CD = jnp.einsum("CV,VD->CD", d_logits_CV, head, preferred_element_type=jnp.float32).astype(dtype)
        d_head_VD += jnp.einsum("CV,CD->VD", d_logits_CV, x_CD, preferred_element_type=jnp.float32)
        return (total + nll, d_head_VD), d_x_CD

    chunks = jax.tree.map(functools.partial(_chunks, num_chunks), (hidden_BTD, targets_BT, mask_BT))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(head_VD.shape, jnp.float32))
    (total, d_head_VD), d_x = jax.lax.scan(add_chunk, start, chunks)
    B, T, D = hidden_BTD.shape
    d_hidden_BTD = jnp.moveaxis(d_x.reshape(num_chunks, B, -1, D), 0, 1).reshape(B, -1, D)[:, :T]
    return total, (d_hidden_BTD, d_head_VD.astype(head_VD.dtype))


def _nll_sum_backward(num_chunks, residuals, d_total):
    d_hidden_BTD, d_head_VD = residuals
    scaled = [(d_total * gradient).astype(gradient.dtype) for gradient in (d_hidden_BTD, d_head_VD)]
    return scaled[0], scaled[1], None, None


_nll_sum.defvjp(_nll_sum_forward, _nll_sum_backward)
