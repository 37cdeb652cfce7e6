"""Grouped query attention (Ainslie et al. 2023, arXiv:2305.13245), with and without a cache."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nextllm_jax.config.model import LayerKind, ModelConfig
from nextllm_jax.model.attention_kernel import AttentionKernel, attend
from nextllm_jax.model.kv_cache import KVCache
from nextllm_jax.model.layers import Linear, hidden_init_std, make_norm, residual_init_std
from nextllm_jax.ops.attention import cached_attention
from nextllm_jax.ops.rope import apply_rope
from nextllm_jax.sharding import constrain


class Attention(nn.Module):
    """Causal attention of one layer. `kind` determines its window."""

    config: ModelConfig
    kind: LayerKind
    dtype: Any
    kernel: AttentionKernel

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array] | None,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: KVCache | None,
        layer: jax.Array | int,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return the output [B, T, D] and the cache with this layer's keys and values written.

        `rope` holds the rotary cosines and sines; None for a layer without RoPE.
        """
        config = self.config
        q_BTNH = self._project("q", config.num_heads, "heads", x_BTD)
        k_BTKH = self._project("k", config.num_kv_heads, "kv_heads", x_BTD)
        v_BTKH = self._project("v", config.num_kv_heads, "kv_heads", x_BTD)
        if config.qk_norm:
            q_BTNH = self._norm("q_norm", q_BTNH)
            k_BTKH = self._norm("k_norm", k_BTKH)
        if rope is not None:
            q_BTNH = apply_rope(q_BTNH, *rope)
            k_BTKH = apply_rope(k_BTKH, *rope)
        rule = {
            "window": config.sliding_window if self.kind == "local" else None,
            "scale": config.attention_scale,
            "soft_cap": config.attention_soft_cap,
        }
        with jax.named_scope("attention"):
            if cache is None:
                # Initialization runs on one token, which cannot be sharded.
                kernel = AttentionKernel() if self.is_initializing() else self.kernel
                out_BTNH = attend(kernel, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, **rule)
            else:
                cache = cache.write(layer, k_BTKH, v_BTKH, positions_BT)
                out_BTNH = cached_attention(q_BTNH, *cache.view(layer), positions_BT=positions_BT, **rule)
        out_BTNH = constrain(out_BTNH, "batch", "seq", "heads", "head_dim")
        output = Linear(
            # "h", since einsum contracts in alphabetical order: H before N would transpose the kernel in each call.
            "BTNh,NhD->BTD",
            (config.num_heads, config.head_dim, config.embed_dim),
            ("heads", "head_dim", "embed"),
            residual_init_std(config),
            self.dtype,
            jnp.dtype(config.param_dtype),
            bias_axes=("embed",) if config.attention_output_bias else (),
            name="o",
        )
        return output(out_BTNH), cache

    def _norm(self, name: str, x_BTNH: jax.Array) -> jax.Array:
        norm = make_norm(self.config, name)
        if self.config.qk_norm_over == "head":
            return norm(x_BTNH)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)

    def _project(self, name: str, num_heads: int, axis: str, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        projected = Linear(
            "BTD,DNH->BTNH",
            (config.embed_dim, num_heads, config.head_dim),
            ("embed", axis, "head_dim"),
            hidden_init_std(config),
            self.dtype,
            jnp.dtype(config.param_dtype),
            bias_axes=(axis, "head_dim") if config.attention_bias else (),
            name=name,
        )(x_BTD)
        return constrain(projected, "batch", "seq", axis, "head_dim")
