"""Cross-entropy loss of a language-model head in chunks, without the logits of all tokens at once.

Dimension letters: B batch, T time, D embed, V vocabulary, C tokens of one chunk.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Layout(NamedTuple):
    """The mesh axes that shard the dimensions of hidden states [B, T, D] and head [V, D].

    The axes of `embed` shard D of the head but not of the hidden states. They also shard tokens, so they must be among
    those of `batch` and `sequence`.
    """

    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    def on_current_mesh(self) -> "Layout":
        """The layout without axes that have size 1 in the current mesh, that are not in it, or that are manual."""
        mesh = jax.sharding.get_abstract_mesh()
        present = {axis for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes}
        return Layout(*(tuple(axis for axis in axes if axis in present) for axes in self))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The axes that shard tokens."""
        return self.batch + self.sequence


class _Rule(NamedTuple):
    """The settings of all chunks, known at compile time."""

    chunk_tokens: int
    divisor: float
    soft_cap: float | None
    layout: Layout
    gather_tokens: bool
    """True: the devices along `layout.embed` gather each other's tokens, and each has a shard of the vocabulary.
    False: each gathers the whole head."""

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """The axes that shard the vocabulary while logits are computed."""
        return self.layout.vocab + (self.layout.embed if self.gather_tokens else ())

    @property
    def summed_axes(self) -> tuple[str, ...]:
        """The axes along which devices compute the loss of different tokens."""
        gathered = self.layout.embed if self.gather_tokens else ()
        return tuple(axis for axis in self.layout.tokens if axis not in gathered)


def cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    logit_divisor: float = 1.0,
    soft_cap: float | None = None,
    chunk_tokens: int = 2048,
    layout: Layout = Layout(),  # noqa: B008  immutable
) -> jax.Array:
    """The negative log-likelihood of the targets in nats, summed over the mask: a float32 scalar.

    Logits are hidden @ head.T. The product uses hidden's dtype, to which the head is cast, and is accumulated in
    float32. `finish_logits` and the normalization are computed in float32 as well. Each device holds the logits of
    about `chunk_tokens` tokens at a time; chunks are split along time. Smaller chunks save memory, but below about
    1,000 tokens a TPU is limited by reading the head and its gradient from memory.

    `layout` describes the sharding on the current mesh (`jax.set_mesh`). If devices with different tokens share a
    sharded head, there are two ways; the one that communicates less is chosen.
    - The head is gathered once, and its gradient is summed on each device and reduced once.
    - The tokens are gathered, chunk by chunk, and each device computes the logits of its shard of the vocabulary (as in
      Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, which does so over the tensor axis).

    Under differentiation, the forward pass computes both gradients together with the logits, and the backward pass only
    scales them. The gradient of hidden has its dtype. The gradient of the head is accumulated in float32 and reduced
    over devices in hidden's dtype. Second derivatives and the gradient of the mask are not supported.

    Raises ValueError for axes of `layout.embed` that do not shard tokens.
    """
    layout = layout.on_current_mesh()
    if not set(layout.embed) <= set(layout.tokens):
        raise ValueError(f"the head is sharded over {layout.embed}, but tokens only over {layout.tokens}")
    gather_tokens = _should_gather_tokens(layout, targets_BT.size, head_VD.shape[0])
    rule = _Rule(chunk_tokens, logit_divisor, soft_cap, layout, gather_tokens)
    return _nll_sum(rule, hidden_BTD, head_VD, targets_BT, mask_BT.astype(jnp.float32))


def _should_gather_tokens(layout: Layout, num_tokens: int, vocab_size: int) -> bool:
    """Whether gathering tokens communicates less: the devices that share a head have fewer tokens than it has rows.

    The vocabulary must also be divisible by the number of these devices.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    size = lambda axes: math.prod(shape[axis] for axis in axes)  # noqa: E731
    sharing = num_tokens * size(layout.embed) // size(layout.tokens)
    return bool(layout.embed) and sharing <= vocab_size and vocab_size % size(layout.vocab + layout.embed) == 0


def finish_logits(products: jax.Array, divisor: float, soft_cap: float | None) -> jax.Array:
    """The logits from float32 products of hidden states and head: divided, then capped as cap * tanh(logit / cap)."""
    logits = products if divisor == 1 else products / divisor
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _on_shards(function, layout: Layout, out_specs):
    """`function(hidden, head, targets, mask)`, mapped over shards of them."""
    if not any(layout):
        return function
    tokens, head = PartitionSpec(layout.batch, layout.sequence), PartitionSpec(layout.vocab, layout.embed)
    # All mesh axes are manual, even those of size 1: otherwise the CPU compiler aborts on the bfloat16 sums inside
    # ("Invalid binary instruction opcode copy", jax 0.10 to 0.12).
    return jax.shard_map(function, in_specs=(tokens, head, tokens, tokens), out_specs=out_specs, check_vma=False)


def _gather_head(rule: _Rule, head_VD: jax.Array) -> jax.Array:
    """The rows of the head for this device's logits, with all columns, gathered from the shards of the head."""
    axes = rule.layout.embed
    if not axes:
        return head_VD
    if rule.gather_tokens:
        return jax.lax.all_to_all(head_VD, axes, split_axis=0, concat_axis=1, tiled=True)
    return jax.lax.all_gather(head_VD, axes, axis=1, tiled=True)


def _scatter_head_gradient(rule: _Rule, d_head_VD: jax.Array) -> jax.Array:
    """The gradient of this device's shard of the head, from the gradient of the rows that `_gather_head` returned."""
    axes, summed = rule.layout.embed, rule.summed_axes
    if axes and rule.gather_tokens:
        d_head_VD = jax.lax.all_to_all(d_head_VD, axes, split_axis=1, concat_axis=0, tiled=True)
    elif axes:
        d_head_VD = jax.lax.psum_scatter(d_head_VD, axes, scatter_dimension=1, tiled=True)
        summed = tuple(axis for axis in summed if axis not in axes)
    return jax.lax.psum(d_head_VD, summed)


def _chunks(x_BT: jax.Array, num_chunks: int) -> jax.Array:
    """[num_chunks, C, ...] from [B, T, ...]; the time axis is padded with zeros to a multiple of num_chunks."""
    B, T, *rest = x_BT.shape
    length = -(-T // num_chunks)
    padding = [(0, 0), (0, num_chunks * length - T)] + [(0, 0)] * len(rest)
    x_BT = jnp.pad(x_BT, padding).reshape(B, num_chunks, length, *rest)
    return jnp.moveaxis(x_BT, 1, 0).reshape(num_chunks, B * length, *rest)


def _unchunk(x_C: jax.Array, B: int, T: int) -> jax.Array:
    """The inverse of `_chunks`: [B, T, ...] from [num_chunks, C, ...], without the padding."""
    x_C = x_C.reshape(x_C.shape[0], B, -1, *x_C.shape[2:])
    return jnp.moveaxis(x_C, 0, 1).reshape(B, -1, *x_C.shape[3:])[:, :T]


def _chunk_nll(rule: _Rule, x_CD, head_VD, targets_C, mask_C):
    """(summed nll, its gradient for the products [C, V] of hidden states and this device's rows of the head)."""
    axes, V = rule.vocab_axes, head_VD.shape[0]
    logits_CV = finish_logits(_einsum("CD,VD->CV", x_CD, head_VD), rule.divisor, rule.soft_cap)
    max_C = logits_CV.max(axis=-1)
    max_C = jax.lax.pmax(max_C, axes) if axes else max_C
    weights_CV = jnp.exp(logits_CV - max_C[:, None])
    first = jax.lax.axis_index(axes) * V if axes else 0
    # A masked sum instead of a gather, since only one device has the target in its shard of the vocabulary.
    is_target_CV = first + jnp.arange(V)[None, :] == targets_C[:, None]
    target_logit_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
    sum_C, target_logit_C = jax.lax.psum((weights_CV.sum(axis=-1), target_logit_C), axes)
    nll = jnp.sum((max_C + jnp.log(sum_C) - target_logit_C) * mask_C)
    d_logits_CV = weights_CV * (mask_C / sum_C)[:, None] - jnp.where(is_target_CV, mask_C[:, None], 0)
    if rule.soft_cap is not None:
        d_logits_CV *= 1 - jnp.square(logits_CV / rule.soft_cap)
    return nll, d_logits_CV if rule.divisor == 1 else d_logits_CV / rule.divisor


def _scan_chunks(rule: _Rule, start, step, hidden_BTD, targets_BT, mask_BT):
    """`lax.scan` of `step` over chunks (hidden [C, D], targets [C], mask [C]), gathered over devices if asked for."""
    B, T, _ = hidden_BTD.shape
    axes = rule.layout.embed if rule.gather_tokens else ()
    rows = B * (jax.lax.axis_size(axes) if axes else 1)
    num_chunks = -(-T // max(1, rule.chunk_tokens // rows))

    def gathered_step(carry, chunk):
        return step(carry, jax.lax.all_gather(chunk, axes, tiled=True) if axes else chunk)

    return jax.lax.scan(gathered_step, start, tuple(_chunks(x, num_chunks) for x in (hidden_BTD, targets_BT, mask_BT)))


def _nll_sum_primal(rule: _Rule, hidden_BTD, head_VD, targets_BT, mask_BT) -> jax.Array:
    def local(hidden_BTD, head_VD, targets_BT, mask_BT):
        head_VD = _gather_head(rule, head_VD)

        def step(nll, chunk):
            x_CD, targets_C, mask_C = chunk
            return nll + _chunk_nll(rule, x_CD, head_VD, targets_C, mask_C)[0], None

        nll, _ = _scan_chunks(rule, jnp.zeros((), jnp.float32), step, hidden_BTD, targets_BT, mask_BT)
        return jax.lax.psum(nll, rule.summed_axes)

    sharded = _on_shards(local, rule.layout, PartitionSpec())
    return sharded(hidden_BTD, head_VD.astype(hidden_BTD.dtype), targets_BT, mask_BT)


def _nll_sum_forward(rule: _Rule, hidden_BTD, head_VD, targets_BT, mask_BT):
    layout = rule.layout

    def local(hidden_BTD, head_VD, targets_BT, mask_BT):
        head_VD, dtype = _gather_head(rule, head_VD), hidden_BTD.dtype

        def step(carry, chunk):
            nll, d_head_VD = carry
            x_CD, targets_C, mask_C = chunk
            chunk_nll, d_logits_CV = _chunk_nll(rule, x_CD, head_VD, targets_C, mask_C)
            d_logits_CV = d_logits_CV.astype(dtype)
            d_x_CD = _einsum("CV,VD->CD", d_logits_CV, head_VD)
            if rule.gather_tokens:
                d_x_CD = jax.lax.psum_scatter(d_x_CD, layout.embed, scatter_dimension=0, tiled=True)
            d_x_CD = jax.lax.psum(d_x_CD, layout.vocab).astype(dtype)
            d_head_VD += _einsum("CV,CD->VD", d_logits_CV, x_CD)
            return (nll + chunk_nll, d_head_VD), d_x_CD

        B, T, _ = hidden_BTD.shape
        start = (jnp.zeros((), jnp.float32), jnp.zeros(head_VD.shape, jnp.float32))
        (nll, d_head_VD), d_x = _scan_chunks(rule, start, step, hidden_BTD, targets_BT, mask_BT)
        d_head_VD = _scatter_head_gradient(rule, d_head_VD.astype(dtype))
        return jax.lax.psum(nll, rule.summed_axes), d_head_VD, _unchunk(d_x, B, T)

    out_specs = (
        PartitionSpec(),
        PartitionSpec(layout.vocab, layout.embed),
        PartitionSpec(layout.batch, layout.sequence),
    )
    sharded = _on_shards(local, layout, out_specs)
    nll, d_head_VD, d_hidden_BTD = sharded(hidden_BTD, head_VD.astype(hidden_BTD.dtype), targets_BT, mask_BT)
    return nll, (d_hidden_BTD, d_head_VD.astype(head_VD.dtype))


def _nll_sum_backward(rule, residuals, d_nll):
    d_hidden_BTD, d_head_VD = ((d_nll * gradient).astype(gradient.dtype) for gradient in residuals)
    return d_hidden_BTD, d_head_VD, None, None


_nll_sum = jax.custom_vjp(_nll_sum_primal, nondiff_argnums=(0,))
_nll_sum.defvjp(_nll_sum_forward, _nll_sum_backward)
