"""The decoder: embedding, layers, final norm, and a separate head.

The layers are a scan over periods of the layer patterns, so only one period is compiled for any depth. The layers that
do not fill a period follow one by one. Generation uses no scan (`scan_layers=False`), since a scan over stacked
parameters copies each matrix out of the stack before a decode step can multiply with it.

The head is separate, so a chunked loss never builds the logits of a whole batch. Decoding is not a mode: training,
prefill and a decode step are the same call, with or without a cache.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nextllm_jax import hardware
from nextllm_jax.config.checks import require
from nextllm_jax.config.model import EXECUTION_FIELDS, LayerKind, MLPKind, ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.attention import Attention
from nextllm_jax.model.attention_kernel import AttentionKernel
from nextllm_jax.model.kv_cache import KVCache
from nextllm_jax.model.layers import Embed, SwiGLU, make_norm, record_mean_square
from nextllm_jax.model.moe import MixtureOfExperts
from nextllm_jax.model.weights import STACK, unstack_layers
from nextllm_jax.ops import rope
from nextllm_jax.ops.cross_entropy import finish_logits
from nextllm_jax.ops.quantized import QTensor
from nextllm_jax.sharding import constrain

_BLOCK_INPUT = "block_input"

# The checkpoint names of the attention output, and of the other values that its backward pass needs.
_ATTENTION = ("attention_out", "attention_residuals")

Rope = dict[LayerKind, tuple[jax.Array, jax.Array]]
"""Rotary cosines and sines for each kind of layer that has RoPE."""


class Block(nn.Module):
    """One decoder layer: attention and MLP, each added to the residual stream, with norms before or after them."""

    config: ModelConfig
    kind: LayerKind
    mlp_kind: MLPKind
    dtype: Any
    kernel: AttentionKernel

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        ropes: Rope,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: KVCache | None,
        layer: jax.Array | int,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return the residual stream [B, T, D] and the cache after this layer."""
        config = self.config
        # Between sublayers, the residual stream and its norms are sharded along time over the tensor axis, which would
        # otherwise replicate them (sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198).
        seq = "residual_seq" if cache is None else "seq"
        x_BTD = checkpoint_name(constrain(x_BTD, "batch", seq, "activation_embed"), _BLOCK_INPUT)
        record_mean_square(self, "before_attention", x_BTD)
        attended, cache = Attention(config, self.kind, self.dtype, self.kernel, name="attention")(
            self._before("attention_norm", x_BTD), ropes.get(self.kind), positions_BT, segment_ids_BT, cache, layer
        )
        x_BTD = constrain(x_BTD + self._after("attention_post_norm", attended), "batch", seq, "activation_embed")
        record_mean_square(self, "before_mlp", x_BTD)
        with jax.named_scope("mlp"):
            out_BTD = self._mlp(self._before("mlp_norm", x_BTD), segment_ids_BT)
            x_BTD = x_BTD + self._after("mlp_post_norm", out_BTD)
        return constrain(x_BTD, "batch", seq, "activation_embed"), cache

    def _mlp(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
        config = self.config
        if self.mlp_kind == "dense":
            return SwiGLU(config, config.mlp_dim, self.dtype, name="mlp")(x_BTD)
        return MixtureOfExperts(config, self.dtype, name="mlp")(x_BTD, segment_ids_BT)

    def _before(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """The input of a sublayer, gathered along time once for all of its matrices."""
        x_BTD = x_BTD if self.config.norm_placement == "post" else make_norm(self.config, name)(x_BTD)
        return constrain(x_BTD, "batch", "seq", "activation_embed")

    def _after(self, name: str, out_BTD: jax.Array) -> jax.Array:
        """The output of a sublayer as it is added to the residual stream."""
        if self.config.norm_placement != "pre":
            out_BTD = make_norm(self.config, name)(out_BTD)
        return out_BTD if self.config.residual_scale == 1 else out_BTD * self.config.residual_scale


_traced_once = nn.jit(lambda block, *args: block(*args))
"""Calls a layer; all layers of a kind share one trace."""


class Period(nn.Module):
    """One period of the layer patterns, the body of the scan over depth."""

    config: ModelConfig
    dtype: Any
    kernel: AttentionKernel

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, KVCache | None],
        period: jax.Array,
        ropes: Rope,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        """Return the carry (residual stream, cache) after this period's layers."""
        x_BTD, cache = carry
        kinds = self.config.period
        # A scan already prevents common subexpression elimination across its iterations.
        block = _remat(self.config, prevent_cse=False)
        for i, (kind, mlp_kind) in enumerate(kinds):
            layer = period * len(kinds) + i
            x_BTD, cache = block(self.config, kind, mlp_kind, self.dtype, self.kernel, name=f"block_{i}")(
                x_BTD, ropes, positions_BT, segment_ids_BT, cache, layer
            )
        return (x_BTD, cache), None


class Transformer(nn.Module):
    """Llama-style decoder (Touvron et al. 2023, arXiv:2302.13971). `dtype` is the dtype of the matmuls.

    `kernel` computes attention without a cache. With `scan_layers=False` the parameters are those of `unstack_layers`.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    scan_layers: bool = True
    kernel: AttentionKernel = AttentionKernel()

    def setup(self) -> None:
        config, param_dtype = self.config, jnp.dtype(self.config.param_dtype)
        embed = (config.vocab_size, config.embed_dim, config.init_std, self.dtype, param_dtype)
        num_periods = self._num_periods()
        self.embed = Embed(*embed)
        if num_periods:
            self.layers = nn.scan(
                Period,
                variable_axes={"params": 0, "intermediates": 0, "adapters": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=num_periods,
                metadata_params={nn.PARTITION_NAME: STACK},
            )(config, self.dtype, self.kernel)
        block = _remat(config, prevent_cse=True)
        kinds = config.period
        num_rest = config.num_layers - num_periods * len(kinds)
        self.remainder = [block(config, *kinds[i % len(kinds)], self.dtype, self.kernel) for i in range(num_rest)]
        self.final_norm = make_norm(config, initial_scale=config.width_ratio)
        if not config.tie_embeddings:
            self.lm_head = Embed(*embed)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return hidden states [B, T, D] after the final norm, and the cache with these tokens written.

        `positions_BT` (int32) are used for RoPE. Without a cache, attention is causal by index and limited to tokens
        with equal `segment_ids_BT` (0 is padding). With a cache, positions are also the slots that the tokens are
        written to; the positions of a row are contiguous, and rows may start at different positions.

        Raises ValueError for segment ids together with a cache.
        """
        if cache is not None and segment_ids_BT is not None:
            raise ValueError("a cache holds one document per row; pass segment_ids or a cache, not both")
        config, x_BTD = self.config, self.embedded(tokens_BT)
        context = (ropes(config, positions_BT), positions_BT, segment_ids_BT)
        num_periods = self._num_periods()
        if num_periods:
            (x_BTD, cache), _ = self.layers((x_BTD, cache), jnp.arange(num_periods), *context)
        if self.scan_layers or cache is None:
            for i, block in enumerate(self.remainder):
                x_BTD, cache = block(x_BTD, *context, cache, num_periods * len(config.period) + i)
        else:
            parts = []
            for block, part in zip(self.remainder, cache.split(), strict=True):
                x_BTD, part = _traced_once(block, x_BTD, *context, part, 0)
                parts.append(part)
            cache = KVCache.joined(parts)
        record_mean_square(self, "before_final_norm", x_BTD)
        hidden_BTD = self.final_norm(x_BTD)
        if self.is_initializing():
            self.logits(hidden_BTD)  # creates the parameters of an untied head
        return hidden_BTD, cache

    def embedded(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the residual stream [B, T, D] before the first layer."""
        x_BTD = self.embed(tokens_BT)
        return x_BTD if self.config.embedding_scale == 1 else x_BTD * self.config.embedding_scale

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Return float32 logits [B, T, V], padded vocabulary included."""
        head = self.embed if self.config.tie_embeddings else self.lm_head
        return finish_logits(head.attend(hidden_BTD), self.config.logit_divisor, self.config.logit_soft_cap)

    def _num_periods(self) -> int:
        return self.config.num_layers // len(self.config.period) if self.scan_layers else 0


@functools.lru_cache(maxsize=256)
def abstract_params(config: ModelConfig, *, scan_layers: bool = True) -> Any:
    """The parameters of a model as abstract arrays in `Weight` boxes, which hold the metadata of each.

    Allocates nothing and does not initialize a backend. The result is cached: do not modify it. Raises InputError if
    model.vocab_size is not stated.
    """
    require(config.vocab_size > 0, "model.vocab_size is not stated, and there is no data to take it from; state it")
    defaults = {name: getattr(ModelConfig, name) for name in EXECUTION_FIELDS}
    params = _abstract_params(dataclasses.replace(config, **defaults))
    return params if scan_layers else unstack_layers(config, params)


@functools.lru_cache(maxsize=64)
def _abstract_params(config: ModelConfig) -> Any:
    def init() -> Any:
        tokens_BT = jnp.zeros((1, 1), jnp.int32)
        return Transformer(config).init(jax.random.key(0), tokens_BT, tokens_BT)["params"]

    return jax.eval_shape(init)


def _remat(config: ModelConfig, *, prevent_cse: bool) -> type[Block]:
    if config.remat == "none":
        return Block
    return nn.remat(Block, prevent_cse=prevent_cse, policy=_remat_policy(config))


def _remat_policy(config: ModelConfig) -> Any:
    """What a block saves for its backward pass, in addition to its input. remat_offload keeps both in host memory."""
    policies, names = jax.checkpoint_policies, _ATTENTION if config.remat == "save_attention" else ()
    if not config.remat_offload:
        dots = policies.dots_with_no_batch_dims_saveable
        return dots if config.remat == "dots" else policies.save_only_these_names(*names)
    offload_names = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_BLOCK_INPUT, *names],
        offload_src="device",
        offload_dst="pinned_host",
    )
    if config.remat != "dots":
        return offload_names
    offload_dots = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    return lambda *args, **params: (offload_names if "name" in params else offload_dots)(*args, **params)


def ropes(config: ModelConfig, positions_BT: jax.Array) -> Rope:
    """Rotary cosines and sines, float32 [B, T, H/2], for each kind of layer that has RoPE."""
    kinds: list[LayerKind] = [kind for kind in sorted(set(config.layer_pattern)) if kind != "global_nope"]
    if config.rope_local_theta is None:
        return dict.fromkeys(kinds, rope_cos_sin(config, positions_BT)) if kinds else {}
    freqs = rope.frequencies(config.rotary_dim or config.head_dim, config.rope_local_theta)
    local = rope.cos_sin(positions_BT, freqs)
    return {kind: local if kind == "local" else rope_cos_sin(config, positions_BT) for kind in kinds}


def rope_cos_sin(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotary cosines and sines, float32 [B, T, H/2], with the config's RoPE scaling."""
    freqs = rope.frequencies(config.rotary_dim or config.head_dim, config.rope_theta)
    attention_factor = 1.0
    if config.rope_scaling == "linear":
        freqs = rope.scale_linear(freqs, config.rope_scaling_factor)
    elif config.rope_scaling == "llama3":
        freqs = rope.scale_llama3(
            freqs,
            config.rope_scaling_factor,
            original_context_length=config.rope_original_context_length,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
        )
    elif config.rope_scaling == "yarn":
        attention_factor = config.rope_attention_factor
        if attention_factor is None:
            attention_factor = rope.yarn_attention_factor(config.rope_scaling_factor)
        freqs = rope.scale_yarn(
            freqs,
            config.rope_scaling_factor,
            theta=config.rope_theta,
            original_context_length=config.rope_original_context_length,
            beta_fast=config.rope_beta_fast,
            beta_slow=config.rope_beta_slow,
        )
    elif config.rope_scaling == "longrope":
        original, factor = config.rope_original_context_length, config.rope_scaling_factor
        attention_factor = config.rope_attention_factor or rope.longrope_attention_factor(factor, original)
        # This depends on the model only, since keys that are already cached cannot change their frequencies.
        beyond = config.context_length > original
        freqs = rope.scale_longrope(freqs, config.rope_long_factors if beyond else config.rope_short_factors)
    return rope.cos_sin(positions_BT, freqs, attention_factor)


def head_embedding(config: ModelConfig, params: Any) -> jax.Array | QTensor:
    """The head, [V, D]: the embedding itself if it is tied."""
    return params["embed" if config.tie_embeddings else "lm_head"]["embedding"]


def resolve_dtype(name: str, platform: str, *, training: bool = False) -> np.dtype:
    """The dtype of the matmuls for a config's `model.dtype` on a jax platform ("cpu", "gpu", "tpu").

    On a CPU with bfloat16 units, "auto" is bfloat16 only for training: products with a single row, as in decoding, are
    several times slower there in bfloat16 than in float32. Raises InputError for any other name.
    """
    if name == "auto":
        fast = platform != "cpu" or (training and hardware.cpu_has_bfloat16())
        name = "bfloat16" if fast else "float32"
    if name not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype is {name}; it must be auto, float32 or bfloat16")
    return jnp.dtype(name)


def set_matmul_precision(dtype: np.dtype) -> None:
    """For float32, set jax to full precision, since TPUs and recent GPUs use fewer bits by default."""
    if dtype == jnp.float32:
        jax.config.update("jax_default_matmul_precision", "highest")
