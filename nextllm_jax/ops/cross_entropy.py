"""Cross-entropy of a language-model head that never holds the logits of all tokens.

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
    """Mesh axes over which the dimensions of hidden states [B, T, D] and head [V, D] are divided.

    The axes of `embed` divide the head's D alone, and tokens too: they are some of `batch` or `sequence`.
    """

    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    def present(self) -> "Layout":
        """Without the axes along which the mesh in force (`jax.set_mesh`) has one device, or none, or is manual."""
        mesh = jax.sharding.get_abstract_mesh()
        there = {axis for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes}
        return Layout(*(tuple(axis for axis in axes if axis in there) for axes in self))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The axes that divide tokens."""
        return self.batch + self.sequence


class _Rule(NamedTuple):
    """What is the same for all chunks, and known when the program is built."""

    chunk_tokens: int
    divisor: float
    soft_cap: float | None
    layout: Layout
    tokens_travel: bool
    """The devices along `layout.embed` hold a part of the vocabulary each and see each other's tokens; otherwise each
    holds all of the head."""

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """Axes that divide the vocabulary while logits are made."""
        return self.layout.vocab + (self.layout.embed if self.tokens_travel else ())

    @property
    def summed_axes(self) -> tuple[str, ...]:
        """Axes whose devices see other tokens than this one."""
        travelling = self.layout.embed if self.tokens_travel else ()
        return tuple(axis for axis in self.layout.tokens if axis not in travelling)


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
    """Negative log-likelihood of the targets, in nats, summed over mask: a float32 scalar.

    The logits are hidden @ head.T, multiplied in hidden's dtype (head is cast to it), accumulated and normalized in
    float32; in between `finish_logits` sees them. At most about chunk_tokens x V of them exist at once on each
    device, cut along time; fewer save memory, but below some 1,000 rows a TPU waits for the head and its gradient to
    pass through memory.

    `layout` says how the arrays lie on the mesh in force (`jax.set_mesh`). Where the head is divided over devices
    with other tokens, either the head travels, once, and each device sums its gradient before that is reduced,
    once; or, where it is less to send, the tokens travel, chunk by chunk, to devices that each hold a part of the
    vocabulary (Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, there over tensor alone).

    Under differentiation both gradients are made beside the logits, hidden's in its own dtype, head's summed in
    float32 and, between devices, in hidden's dtype; the backward pass only scales them. So it is not differentiable
    twice, nor in the mask.

    Raises ValueError for axes of `layout.embed` that divide no tokens.
    """
    layout = layout.present()
    if not set(layout.embed) <= set(layout.tokens):
        raise ValueError(f"the head is divided over {layout.embed}, but tokens over {layout.tokens} only")
    travel = _tokens_should_travel(layout, targets_BT.size, head_VD.shape[0])
    rule = _Rule(chunk_tokens, logit_divisor, soft_cap, layout, travel)
    return _nll_sum(rule, hidden_BTD, head_VD, targets_BT, mask_BT.astype(jnp.float32))


def _tokens_should_travel(layout: Layout, num_tokens: int, vocab_size: int) -> bool:
    """Whether the tokens of the devices that share a head are fewer than its rows, of which each can get a part."""
    shape = jax.sharding.get_abstract_mesh().shape
    size = lambda axes: math.prod(shape[axis] for axis in axes)  # noqa: E731
    sharing = num_tokens * size(layout.embed) // size(layout.tokens)
    return bool(layout.embed) and sharing <= vocab_size and vocab_size % size(layout.vocab + layout.embed) == 0


def finish_logits(products: jax.Array, divisor: float, soft_cap: float | None) -> jax.Array:
    """Logits of float32 products of hidden states and head: divided, then bounded as cap * tanh(logit / cap)."""
    logits = products if divisor == 1 else products / divisor
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _divided(function, layout: Layout, out_specs):
    """`function(hidden, head, targets, mask)`, run on each device's part of them."""
    if not any(layout):
        return function
    tokens, head = PartitionSpec(layout.batch, layout.sequence), PartitionSpec(layout.vocab, layout.embed)
    # Over all axes of the mesh, one-device axes too: where some are left to XLA, its CPU compiler aborts on the
    # bfloat16 sums inside ("Invalid binary instruction opcode copy", jax 0.10 to 0.12).
    return jax.shard_map(function, in_specs=(tokens, head, tokens, tokens), out_specs=out_specs, check_vma=False)


def _take_head(rule: _Rule, head_VD: jax.Array) -> jax.Array:
    """The rows of the head that this device multiplies with, whole, of its part of the head."""
    axes = rule.layout.embed
    if not axes:
        return head_VD
    if rule.tokens_travel:
        return jax.lax.all_to_all(head_VD, axes, split_axis=0, concat_axis=1, tiled=True)
    return jax.lax.all_gather(head_VD, axes, axis=1, tiled=True)


def _give_head_gradient(rule: _Rule, d_head_VD: jax.Array) -> jax.Array:
    """The gradient for this device's part of the head, of that for the rows it multiplied with."""
    axes, summed = rule.layout.embed, rule.summed_axes
    if axes and rule.tokens_travel:
        d_head_VD = jax.lax.all_to_all(d_head_VD, axes, split_axis=1, concat_axis=0, tiled=True)
    elif axes:
        d_head_VD = jax.lax.psum_scatter(d_head_VD, axes, scatter_dimension=1, tiled=True)
        summed = tuple(axis for axis in summed if axis not in axes)
    return jax.lax.psum(d_head_VD, summed)


def _chunks(x_BT: jax.Array, num_chunks: int) -> jax.Array:
    """[num_chunks, C, ...] of [B, T, ...], the time axis padded with zeros where it does not divide."""
    B, T, *rest = x_BT.shape
    length = -(-T // num_chunks)
    padding = [(0, 0), (0, num_chunks * length - T)] + [(0, 0)] * len(rest)
    x_BT = jnp.pad(x_BT, padding).reshape(B, num_chunks, length, *rest)
    return jnp.moveaxis(x_BT, 1, 0).reshape(num_chunks, B * length, *rest)


def _unchunk(x_C: jax.Array, B: int, T: int) -> jax.Array:
    """[B, T, ...] of [num_chunks, C, ...], without the padding."""
    x_C = x_C.reshape(x_C.shape[0], B, -1, *x_C.shape[2:])
    return jnp.moveaxis(x_C, 0, 1).reshape(B, -1, *x_C.shape[3:])[:, :T]


def _chunk_nll(rule: _Rule, x_CD, head_VD, targets_C, mask_C):
    """(summed nll, its gradient for the products [C, V] of hidden states and this device's part of the head)."""
    axes, V = rule.vocab_axes, head_VD.shape[0]
    logits_CV = finish_logits(_einsum("CD,VD->CV", x_CD, head_VD), rule.divisor, rule.soft_cap)
    max_C = logits_CV.max(axis=-1)
    max_C = jax.lax.pmax(max_C, axes) if axes else max_C
    weights_CV = jnp.exp(logits_CV - max_C[:, None])
    first = jax.lax.axis_index(axes) * V if axes else 0
    # A masked sum, not a gather: of the divided vocabulary only one device holds the target.
    is_target_CV = first + jnp.arange(V)[None, :] == targets_C[:, None]
    target_logit_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
    sum_C, target_logit_C = jax.lax.psum((weights_CV.sum(axis=-1), target_logit_C), axes)
    nll = jnp.sum((max_C + jnp.log(sum_C) - target_logit_C) * mask_C)
    d_logits_CV = weights_CV * (mask_C / sum_C)[:, None] - jnp.where(is_target_CV, mask_C[:, None], 0)
    if rule.soft_cap is not None:
        d_logits_CV *= 1 - jnp.square(logits_CV / rule.soft_cap)
    return nll, d_logits_CV if rule.divisor == 1 else d_logits_CV / rule.divisor


def _scan_chunks(rule: _Rule, start, step, hidden_BTD, targets_BT, mask_BT):
    """`lax.scan` of `step` over the chunks (hidden [C, D], targets [C], mask [C]) of all devices that share them."""
    B, T, _ = hidden_BTD.shape
    axes = rule.layout.embed if rule.tokens_travel else ()
    rows = B * (jax.lax.axis_size(axes) if axes else 1)
    num_chunks = -(-T // max(1, rule.chunk_tokens // rows))

    def gathered_step(carry, chunk):
        return step(carry, jax.lax.all_gather(chunk, axes, tiled=True) if axes else chunk)

    return jax.lax.scan(gathered_step, start, tuple(_chunks(x, num_chunks) for x in (hidden_BTD, targets_BT, mask_BT)))


def _nll_sum_primal(rule: _Rule, hidden_BTD, head_VD, targets_BT, mask_BT) -> jax.Array:
    def local(hidden_BTD, head_VD, targets_BT, mask_BT):
        head_VD = _take_head(rule, head_VD)

        def step(nll, chunk):
            x_CD, targets_C, mask_C = chunk
            return nll + _chunk_nll(rule, x_CD, head_VD, targets_C, mask_C)[0], None

        nll, _ = _scan_chunks(rule, jnp.zeros((), jnp.float32), step, hidden_BTD, targets_BT, mask_BT)
        return jax.lax.psum(nll, rule.summed_axes)

    divided = _divided(local, rule.layout, PartitionSpec())
    return divided(hidden_BTD, head_VD.astype(hidden_BTD.dtype), targets_BT, mask_BT)


def _nll_sum_forward(rule: _Rule, hidden_BTD, head_VD, targets_BT, mask_BT):
    layout = rule.layout

    def local(hidden_BTD, head_VD, targets_BT, mask_BT):
        head_VD, dtype = _take_head(rule, head_VD), hidden_BTD.dtype

        def step(carry, chunk):
            nll, d_head_VD = carry
            x_CD, targets_C, mask_C = chunk
            chunk_nll, d_logits_CV = _chunk_nll(rule, x_CD, head_VD, targets_C, mask_C)
            d_logits_CV = d_logits_CV.astype(dtype)
            d_x_CD = _einsum("CV,VD->CD", d_logits_CV, head_VD)
            if rule.tokens_travel:
                d_x_CD = jax.lax.psum_scatter(d_x_CD, layout.embed, scatter_dimension=0, tiled=True)
            d_x_CD = jax.lax.psum(d_x_CD, layout.vocab).astype(dtype)
            d_head_VD += _einsum("CV,CD->VD", d_logits_CV, x_CD)
            return (nll + chunk_nll, d_head_VD), d_x_CD

        B, T, _ = hidden_BTD.shape
        start = (jnp.zeros((), jnp.float32), jnp.zeros(head_VD.shape, jnp.float32))
        (nll, d_head_VD), d_x = _scan_chunks(rule, start, step, hidden_BTD, targets_BT, mask_BT)
        d_head_VD = _give_head_gradient(rule, d_head_VD.astype(dtype))
        return jax.lax.psum(nll, rule.summed_axes), d_head_VD, _unchunk(d_x, B, T)

    out_specs = (
        PartitionSpec(),
        PartitionSpec(layout.vocab, layout.embed),
        PartitionSpec(layout.batch, layout.sequence),
    )
    divided = _divided(local, layout, out_specs)
    nll, d_head_VD, d_hidden_BTD = divided(hidden_BTD, head_VD.astype(hidden_BTD.dtype), targets_BT, mask_BT)
    return nll, (d_hidden_BTD, d_head_VD.astype(head_VD.dtype))


def _nll_sum_backward(rule, residuals, d_nll):
    d_hidden_BTD, d_head_VD = ((d_nll * gradient).astype(gradient.dtype) for gradient in residuals)
    return d_hidden_BTD, d_head_VD, None, None


_nll_sum = jax.custom_vjp(_nll_sum_primal, nondiff_argnums=(0,))
_nll_sum.defvjp(_nll_sum_forward, _nll_sum_backward)
