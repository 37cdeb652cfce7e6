"""Every setting of a model. Importing this module does not import jax."""

import dataclasses
from typing import Literal

from nextllm_jax.config.checks import check_types, require, require_positive
from nextllm_jax.config.fields import Fixed, Free, NoEffect, marks

LayerKind = Literal["global", "local", "global_nope"]
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder."""

    vocab_size: Fixed[int] = 8192
    """Rows of the embedding; at least the tokenizer's size, more is padding."""
    num_layers: Fixed[int] = 8
    """Decoder blocks."""
    embed_dim: Fixed[int] = 256
    """Width of the residual stream."""
    mlp_dim: Fixed[int] = 688
    """Width inside SwiGLU."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """What the gate of the MLP goes through: silu, or gelu by its tanh approximation (GeGLU)."""
    num_heads: Fixed[int] = 8
    """Query heads."""
    num_kv_heads: Fixed[int] = 4
    """Key and value heads; divides num_heads (equal: MHA, 1: MQA)."""
    head_dim: Fixed[int] = 32
    """Width of a head, free of embed_dim / num_heads; even, for RoPE."""
    context_length: int = 2048
    """Most positions that prompt and new tokens may fill together."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_local_theta: float | None = None
    """Base of the rotary frequencies in local layers, which then are not scaled; none: as in the global ones."""
    rotary_dim: int | None = None
    """Leading dimensions of a head that RoPE turns; none: all."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """How the rotary frequencies are stretched beyond the original context."""
    rope_scaling_factor: float = 1.0
    """Ratio of the new to the original context (linear, llama3, yarn, longrope)."""
    rope_original_context_length: int = 8192
    """Context that the frequencies were trained for (llama3, yarn, longrope)."""
    rope_low_freq_factor: float = 1.0
    """Wavelengths above original context / this are fully stretched (llama3)."""
    rope_high_freq_factor: float = 4.0
    """Wavelengths below original context / this are left alone (llama3)."""
    rope_beta_fast: float = 32.0
    """Rotations in the original context above which a frequency is left alone (yarn)."""
    rope_beta_slow: float = 1.0
    """Rotations in the original context below which a frequency is fully stretched (yarn)."""
    rope_attention_factor: float | None = None
    """Factor on the rotary cosines and sines; none: 0.1 ln(factor) + 1 (yarn), or
    sqrt(1 + ln(factor) / ln(original context)) (longrope)."""
    rope_short_factors: tuple[float, ...] = ()
    """Divisors of the frequencies where context_length is within the original context (longrope)."""
    rope_long_factors: tuple[float, ...] = ()
    """Divisors of the frequencies where context_length is over the original context (longrope)."""
    layer_pattern: Fixed[tuple[LayerKind, ...]] = ("global",)
    """Kinds of layer, repeated over the depth: global, local (sliding window), global_nope (no RoPE)."""
    sliding_window: int = 1024
    """Positions that a local layer sees, its own included."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    norm_scale_offset: float = 0.0
    """Added to the learnt scale of every norm; Gemma's norms multiply by 1 + scale."""
    norm_placement: Fixed[Literal["pre", "post", "sandwich"]] = "pre"
    """Norms before attention and MLP, after them (before they are added to the residual stream), or both."""
    qk_norm: Fixed[bool] = False
    """RMSNorm over queries and keys before RoPE."""
    qk_norm_over: Fixed[Literal["head", "projection"]] = "head"
    """What that norm spans: each head by itself, or all heads together."""
    attention_bias: Fixed[bool] = False
    """Bias on the query, key and value projections."""
    attention_output_bias: Fixed[bool] = False
    """Bias on the output projection of attention."""
    attention_scale: float | None = None
    """Factor on the attention scores; none: 1 / sqrt(head_dim)."""
    attention_soft_cap: float | None = None
    """Bounds the attention scores: cap tanh(score / cap); none: no bound."""
    embedding_scale: float = 1.0
    """Factor on the embeddings where they enter the residual stream."""
    residual_scale: float = 1.0
    """Factor on what attention and MLP add to the residual stream."""
    logit_divisor: float = 1.0
    """Divides the logits, before their soft cap."""
    logit_soft_cap: float | None = None
    """Bounds the logits: cap tanh(logit / cap); none: no bound."""
    tie_embeddings: Fixed[bool] = True
    """One matrix for the embedding and the output head."""
    init_std: NoEffect[float] = 0.02
    """Standard deviation of the initial weights; the projections back into the residual stream get
    init_std / sqrt(2 num_layers)."""
    dtype: Free[Literal["auto", "float32", "bfloat16"]] = "auto"
    """Type of the matmuls; auto: bfloat16, but float32 on a CPU without bfloat16 units."""
    attention: Free[Literal["auto", "xla", "blockwise", "splash", "cudnn"]] = "auto"
    """How training attends: plain XLA; blockwise in XLA, for long sequences; splash, a Pallas kernel for TPUs; cuDNN's
    flash attention, for GPUs. auto: what is best on the devices, on GPUs without much memory,
    printed at the start."""
    attention_blocks: Free[tuple[int, ...]] = ()
    """Positions in a block of queries and in one of keys, for blockwise and splash; none: by the chip."""
    param_dtype: Fixed[DType] = "float32"
    """Type in which parameters are kept."""
    remat: Free[Literal["none", "dots", "save_attention", "full"]] = "none"
    """What the backward pass recomputes: nothing, all but the matmul results, all but attention, or whole layers."""
    remat_offload: Free[bool] = False
    """Keep what remat saves of the forward pass in the host's memory (TPU and GPU)."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        require_positive(
            self, "model.", "vocab_size", "num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim",
            "context_length", "sliding_window", "rope_original_context_length", "norm_eps", "init_std",
            "rope_attention_factor", "attention_scale", "attention_soft_cap", "embedding_scale", "residual_scale",
            "logit_divisor", "logit_soft_cap",
        )  # fmt: skip
        heads, kv_heads = self.num_heads, self.num_kv_heads
        require(heads % kv_heads == 0, f"model.num_kv_heads {kv_heads} does not divide model.num_heads {heads}")
        require(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}; RoPE needs an even one")
        offload = not self.remat_offload or self.remat != "none"
        require(offload, "model.remat_offload needs something that remat saves; set model.remat to full, or another")
        require(len(self.layer_pattern) > 0, "model.layer_pattern is empty; ('global',) is the plain Llama")
        blocks = self.attention_blocks
        require(
            len(blocks) in (0, 2) and all(block > 0 for block in blocks),
            f"model.attention_blocks is {blocks}; it must be two positive numbers, of queries and of keys, or none",
        )
        self._check_rope()

    def without_remat(self) -> "ModelConfig":
        """The same model where nothing is recomputed or offloaded, as inference wants it."""
        return dataclasses.replace(self, remat="none", remat_offload=False)

    def _check_rope(self) -> None:
        for name in ("rope_theta", "rope_local_theta"):
            theta = getattr(self, name)
            require(theta is None or theta > 1, f"model.{name} is {theta}; it must be over 1")
        rotary, head = self.rotary_dim, self.head_dim
        fits = rotary is None or (rotary % 2 == 0 and 0 < rotary <= head)
        require(fits, f"model.rotary_dim is {rotary}; it must be even and at most model.head_dim {head}")
        require(
            self.rope_beta_slow < self.rope_beta_fast,
            f"model.rope_beta_slow {self.rope_beta_slow} is not below model.rope_beta_fast {self.rope_beta_fast}",
        )
        factor, kind = self.rope_scaling_factor, self.rope_scaling
        require(kind == "none" or factor >= 1, f"model.rope_scaling_factor is {factor}; '{kind}' needs at least 1")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        require(low < high, f"model.rope_low_freq_factor {low} is not below model.rope_high_freq_factor {high}")
        wanted = (rotary or head) // 2 if kind == "longrope" else 0
        for name in ("rope_short_factors", "rope_long_factors"):
            factors = getattr(self, name)
            require(
                len(factors) == wanted and all(factor > 0 for factor in factors),
                f"model.{name} holds {len(factors)} numbers; '{kind}' needs {wanted}, all of them positive",
            )


EXECUTION_FIELDS = tuple(name for name, mark in marks(ModelConfig).items() if mark.change == "free")
"""The fields of a ModelConfig that say how a model is computed, not which model it is."""
