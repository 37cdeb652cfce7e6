"""The building blocks of the decoder: RMSNorm, Linear, Embed and SwiGLU.

Parameters are stored in `param_dtype` and cast to `dtype` where they are used. Norms compute in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig
from nextllm_jax.model.weights import declare
from nextllm_jax.ops.linear import linear
from nextllm_jax.ops.product import Product, product
from nextllm_jax.ops.quantized import QTensor, take_rows
from nextllm_jax.sharding import RULES, constrain, is_divisible, per_shard

INPUTS = "inputs"
"""The Flax collection with the input of each Linear; filled if the caller makes it mutable."""


def record_mean_square(module: nn.Module, name: str, x_BTD: jax.Array) -> None:
    """Record the mean square over D of each position, float32 [B, T], if the caller asks for intermediates.

    Before a norm this costs nothing, since the norm computes the same value.
    """
    module.sow("intermediates", name, jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), axis=-1))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (scale + offset) over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    eps: float
    param_dtype: Any
    scale_offset: float = 0.0
    initial_scale: float = 1.0
    """Of scale + scale_offset."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalized array in the dtype of `x`; computed in float32."""
        init = nn.initializers.constant(self.initial_scale - self.scale_offset)
        scale = declare(self, "scale", "norm", init, ("norm",), (x.shape[-1],), self.param_dtype)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) + self.scale_offset
        return _rms_norm(x, scale, self.eps)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm whose backward pass recomputes the float32 arrays from `x`, which is saved anyway."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


class Linear(nn.Module):
    """An einsum of the input with one kernel, whose equation, shape and logical axes are given.

    If the collection "adapters" is given, it adds the low-rank product x @ a @ b, already scaled (see model/lora.py).
    """

    equation: str
    kernel_shape: tuple[int, ...]
    kernel_axes: tuple[str, ...]
    init_std: float
    dtype: Any
    param_dtype: Any
    bias_axes: tuple[str, ...] = ()
    """The trailing kernel axes that have a bias; empty: no bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `einsum(equation, x, kernel) + bias` in `dtype`; the kernel may be a QTensor."""
        init = nn.initializers.normal(self.init_std)
        num_inputs = len(self._inputs())
        kernel = declare(
            self, "kernel", "matrix", init, self.kernel_axes, self.kernel_shape, self.param_dtype, num_inputs=num_inputs
        )
        x = x.astype(self.dtype)
        self.sow(INPUTS, "x", x)
        y = product(self.equation, x, kernel, per_device=self._per_device(x, kernel))
        if self.has_variable("adapters", "a"):
            a, b = (self.get_variable("adapters", name).astype(self.dtype) for name in ("a", "b"))
            y = y + linear(self._equation_of("b"), linear(self._equation_of("a"), x, a), b)
        if not self.bias_axes:
            return y
        bias_shape = self.kernel_shape[-len(self.bias_axes) :]
        bias = declare(self, "bias", "bias", nn.initializers.zeros, self.bias_axes, bias_shape, self.param_dtype)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)

    def _per_device(self, x: jax.Array, kernel: Any) -> Callable[[Product], Product] | None:
        """The `per_device` argument of `product`; None if the arrays cannot be sharded evenly over the mesh."""
        axes = tuple(
            "activation_embed" if axis == "embed" else axis for axis in self.kernel_axes
        )  # not sharded, as in x
        inputs, outputs = axes[: len(self._inputs())], axes[len(self._inputs()) :]
        x_axes, y_axes = ("batch", "seq", *inputs), ("batch", "seq", *outputs)
        if not is_divisible(x.shape, x_axes) or not all(is_divisible(p.shape, axes) for p in jax.tree.leaves(kernel)):
            return None
        return lambda f: per_shard(f, (x_axes, axes), y_axes, summed_names=inputs)

    def _inputs(self) -> str:
        """The letters of the kernel's contracted axes, which are its leading axes."""
        x_dims, kernel_dims = self.equation.split("->")[0].split(",")
        return "".join(dim for dim in kernel_dims if dim in x_dims)

    def _equation_of(self, adapter: str) -> str:
        """The equation of an adapter. For "BTD,DF->BTF": a has "BTD,DR->BTR", b has "BTR,RF->BTF"."""
        (x_dims, kernel_dims), y_dims = self.equation.split("->")[0].split(","), self.equation.split("->")[1]
        inputs = self._inputs()
        outputs = kernel_dims[len(inputs) :]
        low_dims = f"{y_dims.removesuffix(outputs)}R"
        return f"{x_dims},{inputs}R->{low_dims}" if adapter == "a" else f"{low_dims},R{outputs}->{y_dims}"


class Embed(nn.Module):
    """A [V, D] matrix for embedding lookup and, as the head, for logits."""

    vocab_size: int
    embed_dim: int
    init_std: float
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        init, shape = nn.initializers.normal(self.init_std), (self.vocab_size, self.embed_dim)
        self.embedding = declare(self, "embedding", "embedding", init, ("vocab", "embed"), shape, self.param_dtype)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the embeddings of the tokens, [B, T, D] in `dtype`."""
        # Devices that share the table along D all look up each other's tokens in their own shard, then exchange the
        # results. This communicates tokens instead of the table, and the table's gradient is created sharded.
        tokens_BT = constrain(tokens_BT, "lookup_batch", "seq")
        if isinstance(self.embedding, QTensor):
            x_BTD, seq = take_rows(self.embedding, tokens_BT, self.dtype), "seq"
        else:
            x_BTD, seq = _take_rows_of_shards(self.embedding, tokens_BT, self.dtype)
        return constrain(constrain(x_BTD, "lookup_batch", seq, "embed"), "batch", seq, "activation_embed")

    def attend(self, hidden_BTD: jax.Array) -> jax.Array:
        """Return logits, float32 [B, T, V]."""
        return product("BTD,VD->BTV", hidden_BTD.astype(self.dtype), self.embedding, jnp.float32)


def _take_rows_of_shards(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> tuple[jax.Array, str]:
    """`take_rows` of a table that may be sharded, and the logical axis that its result is sharded over along T.

    The devices along V each look up the tokens that they have, then add up and scatter the results. XLA would shard the
    lookup alike, but aborts inside `sharding.sum_over_data` (a failed check in spmd_partitioner_util.cc, jax 0.12).
    """
    (axis,), table, tokens = RULES["vocab"], ("vocab", "embed"), ("lookup_batch", "seq")
    is_sharded = jax.sharding.get_abstract_mesh().shape.get(axis, 1) > 1
    if not (is_sharded and is_divisible(table_VD.shape, table) and is_divisible(tokens_BT.shape, tokens)):
        return take_rows(table_VD, tokens_BT, dtype), "seq"
    is_split = is_divisible(tokens_BT.shape, ("lookup_batch", "residual_seq"))

    def on_shard(rows_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        row_BT = tokens_BT - jax.lax.axis_index(axis) * len(rows_VD)
        is_here_BT = (row_BT >= 0) & (row_BT < len(rows_VD))
        x_BTD = jnp.where(is_here_BT[..., None], take_rows(rows_VD, jnp.where(is_here_BT, row_BT, 0), dtype), 0)
        scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True)
        return (scatter if is_split else jax.lax.psum)(x_BTD, axis)

    seq = "residual_seq" if is_split else "seq"
    return per_shard(on_shard, [table, tokens], ("lookup_batch", seq, "embed"))(table_VD, tokens_BT), seq


class SwiGLU(nn.Module):
    """down(activation(gate(x)) * up(x)), silu in SwiGLU and gelu in GeGLU (Shazeer 2020, arXiv:2002.05202)."""

    config: ModelConfig
    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return [B, T, D]."""
        config = self.config
        embed, mlp = config.embed_dim, self.mlp_dim
        types = {"dtype": self.dtype, "param_dtype": jnp.dtype(config.param_dtype)}
        std = hidden_init_std(config)
        into = {"kernel_shape": (embed, mlp), "kernel_axes": ("embed", "mlp"), "init_std": std, **types}
        activation = activation_of(config)
        gate_BTF = Linear("BTD,DF->BTF", **into, name="gate")(x_BTD)
        up_BTF = Linear("BTD,DF->BTF", **into, name="up")(x_BTD)
        # The backward pass recomputes the intermediate values from the two inputs instead of saving them.
        gated = jax.checkpoint(lambda gate, up: activation(gate) * up, prevent_cse=False)
        inner_BTF = constrain(gated(gate_BTF, up_BTF), "batch", "seq", "mlp")
        return Linear("BTF,FD->BTD", (mlp, embed), ("mlp", "embed"), residual_init_std(config), **types, name="down")(
            inner_BTF
        )


def make_norm(config: ModelConfig, name: str | None = None, initial_scale: float = 1.0) -> RMSNorm:
    """The RMSNorm that a config asks for."""
    param_dtype = jnp.dtype(config.param_dtype)
    return RMSNorm(config.norm_eps, param_dtype, config.norm_scale_offset, initial_scale, name=name)


def activation_of(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """The activation of the MLP gate."""
    return nn.silu if config.activation == "silu" else nn.gelu  # the tanh approximation


def hidden_init_std(config: ModelConfig) -> float:
    """The initial standard deviation of the matrices of attention and MLP, except for their output projections."""
    return config.init_std * math.sqrt(config.width_ratio)


def residual_init_std(config: ModelConfig) -> float:
    """The initial standard deviation of projections into the residual stream (Radford et al. 2019, GPT-2).

    It keeps the variance of the residual stream independent of depth. With completep, it is that of the base depth
    times base_depth / num_layers, so the sum over the layers is bounded. It is 0 with `zero_init_outputs`.
    """
    std = 0.0 if config.zero_init_outputs else hidden_init_std(config) / math.sqrt(2 * config.num_layers)
    return std * math.sqrt(config.depth_ratio)
