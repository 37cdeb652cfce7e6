"""Every setting of a model. Importing this module does not import jax."""

import dataclasses
import math
from typing import Literal

from nextllm_jax.config.checks import check_types, require, require_positive
from nextllm_jax.config.fields import Fixed, Free, NoEffect, marks

LayerKind = Literal["global", "local", "global_nope"]
MLPKind = Literal["dense", "sparse"]
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder. The settings that every model needs come first, those of single families last."""

    vocab_size: Fixed[int] = 0
    """Rows of the embedding: at least the number of tokens of the data. Further rows are padding. 0: the number of
    tokens, rounded up to a multiple of 128."""
    num_layers: Fixed[int] = 8
    """Decoder blocks."""
    embed_dim: Fixed[int] = 256
    """Width of the residual stream."""
    mlp_dim: Fixed[int] = 688
    """Width inside SwiGLU."""
    num_heads: Fixed[int] = 8
    """Query heads."""
    num_kv_heads: Fixed[int] = 4
    """Key and value heads. It must divide num_heads; equal to it means MHA, 1 means MQA."""
    head_dim: Fixed[int] = 32
    """Width of a head. It must be even, for RoPE, and need not be embed_dim / num_heads."""
    context_length: int = 2048
    """Maximum number of tokens in a sequence, prompt and new tokens together."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    tie_embeddings: Fixed[bool] = True
    """Use one matrix for both the embedding and the output head."""
    init_std: NoEffect[float] = 0.02
    """Standard deviation of the initial weights. The output projections of attention and MLP use
    init_std / sqrt(2 num_layers)."""
    zero_init_outputs: NoEffect[bool] = False
    """Initialize the output projections of attention and MLP with zeros, so each layer starts as the identity."""
    parametrization: Literal["standard", "completep"] = "standard"
    """How learning rates and initial weights depend on the shape. standard: they are as stated; completep: those of a
    model of base_width and base_depth, from which the ones of each weight are derived."""
    base_width: int | None = None
    """With completep: embed_dim of the model that the learning rates were chosen for."""
    base_depth: int | None = None
    """With completep: num_layers of the model that the learning rates were chosen for."""
    dtype: Free[Literal["auto", "float32", "bfloat16"]] = "auto"
    """Type of the matmuls; auto: bfloat16, but float32 on a CPU without bfloat16 units."""
    attention: Free[Literal["auto", "xla", "blockwise", "splash", "cudnn"]] = "auto"
    """Attention kernel for training. xla: plain XLA; blockwise: XLA in blocks, for long sequences; splash: a Pallas
    kernel for TPUs; cudnn: flash attention of cuDNN, for GPUs. auto: the fastest available kernel that does not need
    much memory; training prints it at startup."""
    attention_blocks: Free[tuple[int, ...]] = ()
    """Block sizes in positions, of queries and of keys, for blockwise and splash; none: chosen for the chip."""
    param_dtype: Fixed[DType] = "float32"
    """Type in which parameters are stored."""
    remat: Free[Literal["none", "dots", "save_attention", "full"]] = "none"
    """What the backward pass recomputes. none: nothing; dots: everything except matmul results; save_attention:
    everything except attention outputs; full: whole layers."""
    remat_offload: Free[bool] = False
    """Store the activations that remat saves in host memory (TPU and GPU)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Activation of the MLP gate: silu, or the tanh approximation of gelu (GeGLU)."""
    layer_pattern: Fixed[tuple[LayerKind, ...]] = ("global",)
    """Kinds of layers, repeated over the depth: global, local (sliding window), global_nope (no RoPE)."""
    sliding_window: int = 1024
    """Positions that a query in a local layer attends to, including its own."""
    rope_local_theta: float | None = None
    """Base of the rotary frequencies in local layers, which are then not scaled; none: same as in global layers."""
    rotary_dim: int | None = None
    """Leading dimensions of a head that RoPE rotates; none: all."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """How the rotary frequencies are scaled for contexts longer than the original one."""
    rope_scaling_factor: float = 1.0
    """Ratio of the new to the original context (linear, llama3, yarn, longrope)."""
    rope_original_context_length: int = 8192
    """Context length that the model was first trained with (llama3, yarn, longrope)."""
    rope_low_freq_factor: float = 1.0
    """Wavelengths longer than the original context / this are fully scaled (llama3)."""
    rope_high_freq_factor: float = 4.0
    """Wavelengths shorter than the original context / this are not scaled (llama3)."""
    rope_beta_fast: float = 32.0
    """Frequencies with more rotations than this in the original context are not scaled (yarn)."""
    rope_beta_slow: float = 1.0
    """Frequencies with fewer rotations than this in the original context are fully scaled (yarn)."""
    rope_attention_factor: float | None = None
    """Factor on the rotary cosines and sines; none: 0.1 ln(factor) + 1 (yarn), or
    sqrt(1 + ln(factor) / ln(original context)) (longrope)."""
    rope_short_factors: tuple[float, ...] = ()
    """Divisors of the frequencies if context_length is at most the original context (longrope)."""
    rope_long_factors: tuple[float, ...] = ()
    """Divisors of the frequencies if context_length exceeds the original context (longrope)."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    norm_scale_offset: float = 0.0
    """Added to the learned scale of every norm; Gemma's norms multiply by 1 + scale."""
    norm_placement: Fixed[Literal["pre", "post", "sandwich"]] = "pre"
    """Norms before attention and MLP, after them (before the residual addition), or both."""
    qk_norm: Fixed[bool] = False
    """RMSNorm over queries and keys before RoPE."""
    qk_norm_over: Fixed[Literal["head", "projection"]] = "head"
    """Dimensions of the query and key norm: each head by itself, or all heads together."""
    attention_bias: Fixed[bool] = False
    """Bias on the query, key and value projections."""
    attention_output_bias: Fixed[bool] = False
    """Bias on the output projection of attention."""
    attention_scale: float | None = None
    """Factor on the attention logits; none: 1 / sqrt(head_dim)."""
    attention_soft_cap: float | None = None
    """Bounds the attention logits: cap * tanh(logit / cap); none: no bound."""
    embedding_scale: float = 1.0
    """Factor on the token embeddings before the first layer."""
    residual_scale: float = 1.0
    """Factor on the outputs of attention and MLP before the residual addition."""
    logit_divisor: float = 1.0
    """The logits are divided by this, before their soft cap."""
    logit_soft_cap: float | None = None
    """Bounds the logits: cap * tanh(logit / cap); none: no bound."""
    num_experts: Fixed[int] = 0
    """Experts in each sparse layer. A router chooses some of them for each token; 0: all layers are dense."""
    experts_per_token: int = 2
    """Number of experts that the router chooses for each token."""
    expert_mlp_dim: Fixed[int | None] = None
    """Width inside each expert; none: mlp_dim."""
    mlp_pattern: Fixed[tuple[MLPKind, ...]] = ("sparse",)
    """Kinds of MLPs, repeated over the depth: sparse (experts), dense (one SwiGLU of mlp_dim)."""
    shared_expert_mlp_dim: Fixed[int] = 0
    """Width inside the shared expert, which processes all tokens; 0: none. Several shared experts are one that is as
    wide as all of them."""
    shared_expert_gate: Fixed[bool] = False
    """Multiply the output of the shared expert by a learned sigmoid of its input."""
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    """Scores from the router's logits. softmax: over all experts; sigmoid: of each expert by itself."""
    normalize_expert_weights: bool = True
    """Divide the scores of the chosen experts by their sum; softmax is then a softmax over the chosen experts alone."""
    expert_weight_scale: float = 1.0
    """Factor on the weights of the chosen experts."""
    selection_bias: Fixed[bool] = False
    """Choose experts by score plus a bias. After each step it rises for experts with fewer tokens than the mean."""
    selection_bias_rate: float = 0.001
    """Change of the selection bias in a step."""
    load_balance_weight: float = 0.01
    """Weight of the load-balancing loss, which is 1 if all experts get equally many tokens."""
    router_z_weight: float = 0.001
    """Weight of the mean squared log-sum-exp of the router's logits, which keeps them small."""
    capacity_factor: float | None = None
    """In training, an expert takes at most this factor times the mean number of tokens per expert from a sequence; the
    others skip it. none: no limit."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        require_positive(
            self, "model.", "num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim",
            "context_length", "sliding_window", "rope_original_context_length", "norm_eps", "init_std",
            "rope_attention_factor", "attention_scale", "attention_soft_cap", "embedding_scale", "residual_scale",
            "logit_divisor", "logit_soft_cap", "base_width", "base_depth",
        )  # fmt: skip
        require(self.vocab_size >= 0, f"model.vocab_size is {self.vocab_size}; it cannot be negative")
        heads, kv_heads = self.num_heads, self.num_kv_heads
        require(heads % kv_heads == 0, f"model.num_kv_heads {kv_heads} does not divide model.num_heads {heads}")
        require(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}; it must be even, for RoPE")
        offload = not self.remat_offload or self.remat != "none"
        require(offload, "model.remat_offload needs something to offload; set model.remat, for example to full")
        require(len(self.layer_pattern) > 0, "model.layer_pattern is empty; use ('global',) for a plain Llama")
        blocks = self.attention_blocks
        require(
            len(blocks) in (0, 2) and all(block > 0 for block in blocks),
            f"model.attention_blocks is {blocks}; give two positive block sizes, of queries and of keys, or none",
        )
        self._check_rope()
        self._check_experts()
        self._check_parametrization()

    @property
    def period(self) -> tuple[tuple[LayerKind, MLPKind], ...]:
        """The kinds of attention and MLP of each layer in a period, which repeats over the depth."""
        mlps: tuple[MLPKind, ...] = self.mlp_pattern if self.num_experts else ("dense",)
        length = math.lcm(len(self.layer_pattern), len(mlps))
        return tuple((self.layer_pattern[i % len(self.layer_pattern)], mlps[i % len(mlps)]) for i in range(length))

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The indices of the layers that have experts."""
        period = self.period
        return tuple(layer for layer in range(self.num_layers) if period[layer % len(period)][1] == "sparse")

    @property
    def width_ratio(self) -> float:
        """base_width / embed_dim; 1 with the standard parametrization."""
        return 1.0 if self.base_width is None else self.base_width / self.embed_dim

    @property
    def depth_ratio(self) -> float:
        """base_depth / num_layers; 1 with the standard parametrization."""
        return 1.0 if self.base_depth is None else self.base_depth / self.num_layers

    def without_remat(self) -> "ModelConfig":
        """The same model without recomputation and offloading."""
        return dataclasses.replace(self, remat="none", remat_offload=False)

    def for_inference(self) -> "ModelConfig":
        """The config for inference: without recomputation, offloading and limits on the tokens of an expert."""
        return dataclasses.replace(self.without_remat(), capacity_factor=None)

    def _check_parametrization(self) -> None:
        scaled = self.parametrization == "completep"
        for name in ("base_width", "base_depth"):
            message = "needs" if scaled else "has no"
            require(
                (getattr(self, name) is not None) == scaled,
                f"model.parametrization {self.parametrization} {message} model.{name}, the shape that the learning "
                f"rates were chosen for; {'set it' if scaled else 'leave it out, or set completep'}",
            )
        require(
            not scaled or self.norm_placement == "pre",
            f"model.parametrization completep scales the outputs of attention and MLP, and norms after them "
            f"(model.norm_placement {self.norm_placement}) would undo it; use standard",
        )

    def _check_experts(self) -> None:
        experts, chosen = self.num_experts, self.experts_per_token
        require(experts >= 0, f"model.num_experts is {experts}; it cannot be negative")
        require(len(self.mlp_pattern) > 0, "model.mlp_pattern is empty; use ('sparse',) for experts in all layers")
        for name in ("expert_mlp_dim", "shared_expert_mlp_dim", "selection_bias", "capacity_factor"):
            value = getattr(self, name)
            require(
                experts > 0 or not value, f"model.{name} is {value}, but there are no experts; set model.num_experts"
            )
        gated = self.shared_expert_mlp_dim > 0 or not self.shared_expert_gate
        require(gated, "model.shared_expert_gate needs a shared expert; set model.shared_expert_mlp_dim")
        require_positive(
            self, "model.", "experts_per_token", "expert_mlp_dim", "expert_weight_scale", "capacity_factor"
        )
        for name in ("shared_expert_mlp_dim", "selection_bias_rate", "load_balance_weight", "router_z_weight"):
            value = getattr(self, name)
            require(value >= 0, f"model.{name} is {value}; it cannot be negative")
        if experts:
            require(chosen <= experts, f"model.experts_per_token {chosen} exceeds model.num_experts {experts}")
            message = f"model.mlp_pattern {self.mlp_pattern} has no sparse layer for model.num_experts {experts}"
            require(len(self.sparse_layers) > 0, f"{message}; put 'sparse' among its first {self.num_layers} entries")

    def _check_rope(self) -> None:
        for name in ("rope_theta", "rope_local_theta"):
            theta = getattr(self, name)
            require(theta is None or theta > 1, f"model.{name} is {theta}; it must be greater than 1")
        rotary, head = self.rotary_dim, self.head_dim
        fits = rotary is None or (rotary % 2 == 0 and 0 < rotary <= head)
        require(fits, f"model.rotary_dim is {rotary}; it must be even and at most model.head_dim {head}")
        require(
            self.rope_beta_slow < self.rope_beta_fast,
            f"model.rope_beta_slow {self.rope_beta_slow} is not below model.rope_beta_fast {self.rope_beta_fast}",
        )
        factor, kind = self.rope_scaling_factor, self.rope_scaling
        message = f"model.rope_scaling_factor is {factor}; rope_scaling '{kind}' needs at least 1"
        require(kind == "none" or factor >= 1, message)
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        require(low < high, f"model.rope_low_freq_factor {low} is not below model.rope_high_freq_factor {high}")
        wanted = (rotary or head) // 2 if kind == "longrope" else 0
        for name in ("rope_short_factors", "rope_long_factors"):
            factors = getattr(self, name)
            require(
                len(factors) == wanted and all(factor > 0 for factor in factors),
                f"model.{name} has {len(factors)} values; rope_scaling '{kind}' needs {wanted} positive ones",
            )


EXECUTION_FIELDS = tuple(name for name, mark in marks(ModelConfig).items() if mark.change == "free")
"""The fields of a ModelConfig that change how the model is computed but not what it computes."""
TRAINING_FIELDS = (
    "load_balance_weight", "router_z_weight", "selection_bias_rate", "capacity_factor",
    "parametrization", "base_width", "base_depth",
)  # fmt: skip
"""The fields of a ModelConfig that change how a model is trained, but not what it computes."""
