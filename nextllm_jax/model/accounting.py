"""Counts parameters, FLOPs and bytes of a model from the shapes of its weights."""

import math
from typing import NamedTuple

import jax

from nextllm_jax.config import Config, LoraConfig, ModelConfig, OptimizerConfig
from nextllm_jax.hardware import readable_bytes
from nextllm_jax.model.lora import create
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import EXPERTS, Weight, by_name, of_kind


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, including padded vocabulary. A tied embedding counts once."""
    return sum(weight.value.size for weight in by_name(abstract_params(config)).values())


def active_parameter_count(config: ModelConfig) -> int:
    """Number of parameters that process a token: of the experts in a layer, those of experts_per_token."""
    return sum(active_size(config, weight) for weight in by_name(abstract_params(config)).values())


def active_size(config: ModelConfig, weight: Weight) -> int:
    """The part of a weight's size that processes a token."""
    size = weight.value.size
    return size * config.experts_per_token // config.num_experts if EXPERTS in weight.names else size


def matrix_size(config: ModelConfig) -> int:
    """Number of parameters in the matrices of all layers, without embedding, head and routers."""
    return sum(weight.value.size for weight in of_kind(abstract_params(config), "matrix").values())


def active_matrix_size(config: ModelConfig) -> int:
    """Number of parameters in the matrices of all layers, routers included, that multiply a token."""
    matrices = of_kind(abstract_params(config), "matrix", "router")
    return sum(active_size(config, weight) for weight in matrices.values())


def adapter_count(config: ModelConfig, lora: LoraConfig) -> int:
    """Number of parameters in the adapters. Raises InputError as `lora.create` does."""
    return sum(weight.value.size for weight in _adapters(config, lora))


def _adapters(config: ModelConfig, lora: LoraConfig) -> list[Weight]:
    shapes = jax.eval_shape(lambda: create(lora, abstract_params(config), jax.random.key(0)))
    return list(by_name(shapes).values())


def parameter_bytes(config: ModelConfig, lora: LoraConfig | None = None) -> int:
    """Bytes of the trained parameters: the model's in `param_dtype`, or float32 adapters."""
    if lora is not None and lora.rank:
        return adapter_count(config, lora) * 4
    return parameter_count(config) * _width(config.param_dtype)


def moment_bytes(config: ModelConfig, optimizer: OptimizerConfig, lora: LoraConfig | None = None) -> int:
    """Bytes of the two moments of each trained parameter. Muon has only the first for a matrix.

    The second has the dtype of the trained parameters.
    """
    count = adapter_count(config, lora) if lora is not None and lora.rank else parameter_count(config)
    left_out = matrix_size(config) * _width(config.param_dtype) if optimizer.name == "muon" else 0
    return count * _width(optimizer.first_moment_dtype) + parameter_bytes(config, lora) - left_out


def update_flops(config: ModelConfig, optimizer: OptimizerConfig) -> float:
    """FLOPs of an update in matrix products: Muon's five Newton-Schulz iterations; 0 for AdamW.

    An iteration for an m x n matrix with m <= n has two products of m x m with m x n and one of m x m with m x m.
    """
    if optimizer.name != "muon":
        return 0.0
    flops = 0.0
    for weight in of_kind(abstract_params(config), "matrix").values():
        stacked, inputs = weight.num_stacked, weight.num_stacked + weight.num_inputs
        shape = weight.value.shape
        m, n = sorted((math.prod(shape[stacked:inputs]), math.prod(shape[inputs:])))
        flops += math.prod(shape[:stacked]) * 5 * (4.0 * m * m * n + 2.0 * m * m * m)
    return flops


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def frozen_bytes(config: ModelConfig, lora: LoraConfig) -> int:
    """Bytes of the frozen base weights of adapters; 0 without adapters. Scales of quantized matrices do not count."""
    if not lora.rank:
        return 0
    width, matrices = _width(config.param_dtype), matrix_size(config)
    bits = {"unquantized": 8 * width, "int8": 8, "int4": 4}[lora.frozen]
    return (parameter_count(config) - matrices) * width + matrices * bits // 8


def state_bytes(config: Config) -> int:
    """Bytes of the trained parameters, their average and the optimizer's moments, which is the size of a checkpoint."""
    model, lora = config.model, config.lora
    copies = 2 if config.training.ema_decay else 1
    return copies * parameter_bytes(model, lora) + moment_bytes(model, config.optimizer, lora)


class SaveEstimate(NamedTuple):
    """What each host writes for a checkpoint, and how long that takes at checkpoint.megabytes_per_second."""

    num_hosts: int
    host_bytes: float
    seconds: float
    megabytes_per_second: float

    def __str__(self) -> str:
        hosts = f" from each of {self.num_hosts} hosts" if self.num_hosts > 1 else ""
        return (
            f"a save writes {readable_bytes(self.host_bytes)}{hosts}, which takes {self.seconds:.1f} s at "
            f"{self.megabytes_per_second:,g} MB/s (checkpoint.megabytes_per_second)"
        )


def save_estimate(config: Config, num_hosts: int) -> SaveEstimate:
    """The estimate for a number of hosts, which share the arrays equally, replicated ones too."""
    host_bytes = state_bytes(config) / num_hosts
    speed = config.checkpoint.megabytes_per_second
    return SaveEstimate(num_hosts, host_bytes, host_bytes / (1e6 * speed), speed)


def flops_per_token(config: ModelConfig, sequence_length: int, lora: LoraConfig | None = None) -> float:
    """Training FLOPs per token: 6 per weight of a matrix or head (2 forward, 4 backward), plus attention.

    Of the experts, only the chosen ones count. A frozen weight counts 4, since it needs no gradient, and an adapter's
    weight counts 6. The embedding lookup counts nothing. Attention counts the causal half of the logits:
    12 N H S / 2 per layer and token (2 products, forward and backward), and less in local layers. Source: Chowdhery
    et al. 2022 (PaLM, appendix B), with causality.
    """
    weights = active_matrix_size(config) + config.vocab_size * config.embed_dim
    pattern = config.layer_pattern
    visible = 0.0
    for layer in range(config.num_layers):
        local = pattern[layer % len(pattern)] == "local"
        visible += _mean_visible(sequence_length, config.sliding_window if local else sequence_length)
    if lora is not None and lora.rank:
        weights = (4 * weights + 6 * sum(active_size(config, weight) for weight in _adapters(config, lora))) / 6
    return 6.0 * weights + 12.0 * config.num_heads * config.head_dim * visible


def _mean_visible(sequence_length: int, window: int) -> float:
    """The mean number of positions that a query sees, including its own."""
    window = min(window, sequence_length)
    return window - window * (window - 1) / (2 * sequence_length)
