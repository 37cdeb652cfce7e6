"""Estimates of a train step by formula, without compiling: FLOPs, memory, memory traffic, minimum communication."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, Mesh

from nextllm_jax.config import Config, OptimizerConfig
from nextllm_jax.config.model import ModelConfig
from nextllm_jax.model.accounting import (
    active_matrix_size,
    flops_per_token,
    matrix_size,
    parameter_bytes,
    update_flops,
)
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.model.weights import EXPERTS, STACK, Weight, of_kind
from nextllm_jax.ops.grouped import num_rows
from nextllm_jax.plan.collectives import Collective, Traffic
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.state import abstract_state

_BF16, _FLOAT32, _BATCH_BYTES_PER_TOKEN = 2, 4, 17
_LOSS_CHUNK_TOKENS, _LANES = 2048, 128


def argument_bytes(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of a step's arguments on one device: train state and batch, without the padding of a chip's tiles."""
    plain = dataclasses.replace(config.model.without_remat(), attention="auto")
    tokens = tokens_per_device(config, mesh.shape) * mesh.shape["tensor"]
    state = _state_bytes(plain, config.optimizer, mesh)
    if config.training.ema_decay:
        state += parameter_bytes(plain) // _shards(mesh.shape)
    return state + int(tokens * _BATCH_BYTES_PER_TOKEN)


@functools.lru_cache
def _state_bytes(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh | AbstractMesh) -> int:
    state = abstract_state(Transformer(model), make_optimizer(optimizer, model), mesh, optimizer)
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.sharding.memory_kind != "pinned_host"]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def peak_bytes(config: Config, mesh: Mapping[str, int], arguments: int) -> int:
    """The peak memory of a device during a step in bytes, arguments included, close to what the TPU compiler reports.

    The peak is the sum of the arguments, the layers' matrices in bfloat16, the head's gradient in float32, the
    activations that remat saves, and the greater of
    - one chunk of the loss;
    - the gradients of the embedding and of the layers' matrices, and the backward pass of one layer.
    """
    model, steps = config.model, config.training.accumulation_steps
    shards = _shards(mesh)
    matrices = matrix_size(model) / shards
    tables = matrix_parameters(model) / shards - matrices
    tokens = tokens_per_device(config, mesh) * mesh["tensor"] / steps
    saved = 0 if model.remat_offload else model.num_layers * tokens * _saved_bytes_per_token(model, mesh)
    # Gradients are accumulated over microbatches in float32.
    sums = 0 if steps == 1 else matrices * _FLOAT32
    # Offloaded moments of embedding and head are fetched as a whole.
    fetched = 2 * _FLOAT32 * tables if config.optimizer.offload_state else 0
    embedding = 0 if model.tie_embeddings else tables / 2
    always = arguments + _BF16 * matrices + _FLOAT32 * (tables - embedding) + saved + sums + fetched
    backward = _FLOAT32 * embedding + _BF16 * matrices + _layer_bytes(model, mesh, tokens)
    return int(always + max(backward, _loss_bytes(model, mesh, tokens)))


def _shards(mesh: Mapping[str, int]) -> int:
    """The number of devices that a matrix is sharded over, an expert's too."""
    return mesh["fsdp"] * mesh["tensor"] * mesh["expert"]


def _saved_bytes_per_token(model: ModelConfig, mesh: Mapping[str, int]) -> float:
    """Bytes per token that one layer saves for its backward pass, in bfloat16; the mean over the layers."""
    # The residual stream is sharded over tensor; the outputs of norms are not.
    tensor = mesh["tensor"]
    embed, residual, mlp = model.embed_dim, model.embed_dim / tensor, _dense_width(model) / tensor
    q, kv = _head_widths(model, tensor)
    widths = {
        "full": residual,
        "save_attention": residual + q,
        "dots": 2 * residual + q + kv + 2 * mlp,
        "none": 2 * embed + 2 * residual + 2 * q + model.head_dim * model.num_heads / tensor + kv + 3 * mlp,
    }
    return _BF16 * widths[model.remat]


def _head_widths(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """Width of queries, and of keys and values together, on a device. The attention kernel pads head_dim to lanes."""
    head_dim = -(-model.head_dim // _LANES) * _LANES
    return head_dim * model.num_heads // tensor, 2 * head_dim * model.num_kv_heads // tensor


def _dense_width(model: ModelConfig) -> float:
    """The mean width of the MLPs that process all tokens: dense ones and shared experts."""
    sparse = len(model.sparse_layers) / model.num_layers
    return (1 - sparse) * model.mlp_dim + sparse * model.shared_expert_mlp_dim


def _layer_bytes(model: ModelConfig, mesh: Mapping[str, int], tokens: float) -> float:
    """Bytes for the backward pass of one layer: gathered matrices, activations and their gradients.

    The number of copies of each is fitted to compiled programs; see tests/plan/test_estimate.py.
    """
    dense = (matrix_size(model) - expert_matrix_size(model)) / model.num_layers
    gathered = dense / mesh["tensor"] / 3 if mesh["fsdp"] * mesh["expert"] > 1 else 0
    mlp = (model.shared_expert_mlp_dim if model.num_experts else model.mlp_dim) / mesh["tensor"]
    # The MLP's backward pass has finished when that of attention begins.
    activations = tokens * (6 * model.embed_dim + max(5 * mlp, 3.5 * sum(_head_widths(model, mesh["tensor"]))))
    return _BF16 * (gathered + activations) + _expert_bytes(model, mesh, tokens)


def _expert_bytes(model: ModelConfig, mesh: Mapping[str, int], tokens: float) -> float:
    """Bytes for the backward pass of the experts of one layer: gathered matrices, rows and their gradients."""
    if not model.num_experts:
        return 0.0
    expert, tensor, width = mesh["expert"], mesh["tensor"], model.expert_mlp_dim or model.mlp_dim
    rows = num_rows(int(tokens * expert * model.experts_per_token))
    matrices = expert_matrix_size(model) / len(model.sparse_layers) / expert / tensor
    return _BF16 * (2 * matrices + rows * (3 * model.embed_dim + 4 * width / tensor))


def _loss_bytes(model: ModelConfig, mesh: Mapping[str, int], tokens: float) -> float:
    """Bytes for one chunk of the loss: logits in float32 and their gradient in bfloat16; see `ops.cross_entropy`.

    If the devices along fsdp have fewer tokens than the vocabulary has rows, each keeps its shard of the head.
    Otherwise each gathers the head, and with several chunks it sums the head's gradient in float32.
    """
    vocabulary, fsdp = model.vocab_size / mesh["tensor"], mesh["fsdp"] * mesh["expert"]
    if fsdp > 1 and tokens * fsdp <= model.vocab_size and model.vocab_size % (fsdp * mesh["tensor"]) == 0:
        return min(tokens * fsdp, _LOSS_CHUNK_TOKENS) * vocabulary / fsdp * (_FLOAT32 + _BF16)
    gradient = _FLOAT32 if tokens > _LOSS_CHUNK_TOKENS else _BF16
    head = vocabulary * model.embed_dim * (_BF16 + gradient) if fsdp > 1 else 0
    return min(tokens, _LOSS_CHUNK_TOKENS) * vocabulary * (_FLOAT32 + _BF16) + head


def sharded_weights(config: ModelConfig) -> list[Weight]:
    """The weights that FSDP shards: matrices and embedding, stacked over layers."""
    return list(of_kind(abstract_params(config), "matrix", "embedding").values())


def matrix_parameters(config: ModelConfig) -> int:
    """Number of parameters in matrices and embedding."""
    return sum(weight.value.size for weight in sharded_weights(config))


def expert_matrix_size(config: ModelConfig) -> int:
    """Number of parameters in the matrices of all experts."""
    matrices = of_kind(abstract_params(config), "matrix").values()
    return sum(weight.value.size for weight in matrices if EXPERTS in weight.names)


def layer_forward_flops(config: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """Forward FLOPs per token of all layers: (matrix products, attention)."""
    head = 6.0 * config.vocab_size * config.embed_dim
    weights = active_matrix_size(config)
    attention = flops_per_token(config, sequence_length) - head - 6.0 * weights
    return 2.0 * weights, attention / 3


def recomputed_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs per token that remat adds. The last product of a layer is never recomputed."""
    products, attention = layer_forward_flops(config, sequence_length)
    routed = len(config.sparse_layers) * config.experts_per_token * (config.expert_mlp_dim or config.mlp_dim)
    products -= 2.0 * config.embed_dim * (config.num_layers * _dense_width(config) + routed)
    in_experts = 4.0 * config.embed_dim * routed  # their inner values are never saved
    added = {"none": in_experts, "dots": attention + in_experts, "save_attention": products}
    return added.get(config.remat, products + attention)


def update_flops_of_a_device(config: Config, mesh: Mapping[str, int]) -> float:
    """FLOPs of an update on the device that does most; see `sharding.per_layer`.

    All layers count as stacked.
    """
    parts = _shards(mesh) * (mesh["data"] if config.optimizer.shard_over_data else 1)
    periods = max(config.model.num_layers // len(config.model.period), 1)
    return update_flops(config.model, config.optimizer) * math.ceil(periods / parts) / periods


def minimum_traffic(config: Config, mesh: Mapping[str, int]) -> dict[Collective, Traffic]:
    """A lower bound on what a device sends in a step, if every matrix is sharded over fsdp, expert and tensor.

    - fsdp: each microbatch all-gathers the weights twice, for the forward and the backward pass, and reduce-scatters
      their gradients once, all in bfloat16. For all but the experts, the devices along expert take part in this.
    - expert: each sparse layer all-gathers its tokens and reduce-scatters its results in bfloat16, and the backward
      pass does so with the gradients.
    - data and slices: the gradients' shards are all-reduced in float32, within a slice and then between slices.
    - tensor: the outputs of attention and MLP are all-reduced in bfloat16, forward and backward. The model instead
      reduce-scatters them and all-gathers after the norm, which sends the same number of bytes.
    - fsdp and tensor: Muon exchanges shards of the momentum for whole layers, and sends back their directions.
    """
    model, steps = config.model, config.training.accumulation_steps
    traffic: dict[Collective, Traffic] = {}
    weights, experts = matrix_parameters(model) / mesh["tensor"], expert_matrix_size(model) / mesh["tensor"]
    slices = config.mesh.slices
    sizes = {**mesh, "data": mesh["data"] // slices, "slices": slices}

    def add(kind: str, axes: tuple[str, ...], dtype: str, count: float, full_bytes: float) -> None:
        members, label = math.prod(sizes[axis] for axis in axes), "+".join(axis for axis in axes if sizes[axis] > 1)
        if members > 1:
            factor = (2 if kind == "all-reduce" else 1) * (members - 1) / members
            key, old = Collective(kind, label, dtype), traffic.get(Collective(kind, label, dtype), Traffic(0, 0))
            traffic[key] = Traffic(old.count + count, old.sent_bytes + full_bytes * factor)

    sharded = sharded_weights(model)
    layers = [math.prod(weight.value.shape[: int(weight.names[0] == STACK)]) for weight in sharded]
    matrices = sum(layers)
    of_experts = sum(n for n, weight in zip(layers, sharded, strict=True) if EXPERTS in weight.names)
    groups = [(("fsdp", "expert"), matrices - of_experts, weights - experts)]
    groups += [(("fsdp",), of_experts, experts / mesh["expert"])] if of_experts else []
    for axes, count, size in groups:
        add("all-gather", axes, "bf16", 2 * count * steps, 2 * steps * _BF16 * size)
        add("reduce-scatter", axes, "bf16", count * steps, steps * _BF16 * size)
    on_a_device = _FLOAT32 * weights / mesh["fsdp"] / mesh["expert"]
    add("all-reduce", ("data",), "f32", matrices, on_a_device)
    add("all-reduce", ("slices",), "f32", matrices, on_a_device / sizes["data"])
    if config.optimizer.name == "muon":
        kernels = 2 * len(of_kind(abstract_params(model), "matrix"))
        exchanged = 2 * _FLOAT32 * matrix_size(model) / _shards(mesh)
        for axis in ("fsdp", "tensor", "expert"):
            add("all-to-all", (axis,), "f32", kernels, exchanged)
    tokens = tokens_per_device(config, mesh) * mesh["tensor"]
    sums = 4 * model.num_layers
    add("all-reduce", ("tensor",), "bf16", sums * steps, sums * _BF16 * tokens * model.embed_dim)
    exchanges = 2 * len(model.sparse_layers)
    for kind in ("all-gather", "reduce-scatter"):
        whole = exchanges * _BF16 * tokens * mesh["expert"] * model.embed_dim
        add(kind, ("expert",), "bf16", exchanges * steps, whole)
    return traffic


def tokens_per_device(config: Config, mesh: Mapping[str, int]) -> float:
    """Tokens of a global batch per device."""
    return config.training.global_batch_size * config.data.sequence_length / math.prod(mesh.values())


def memory_traffic_bytes(config: Config, mesh: Mapping[str, int], state_bytes: float) -> float:
    """A lower bound on the bytes that a device reads and writes in its memory in a step.

    The state is read and written once, and gradients are written and read in float32. Each pass over a microbatch reads
    the weights, and writes and reads the inputs and outputs of its products. There is one forward pass, there are two
    products in the backward pass, and with remat there is a second forward pass. Attention logits stay on the chip.
    Each of Muon's five iterations reads its matrices twice and writes them once in float32.
    """
    model, steps = config.model, config.training.accumulation_steps
    shards = _shards(mesh)
    gradients = 2 * _FLOAT32 * matrix_parameters(model) / shards
    passes = 3 if model.remat == "none" else 4
    fsdp, expert, experts = mesh["fsdp"], mesh["expert"], expert_matrix_size(model)
    sizes = (matrix_parameters(model) - experts, fsdp * expert), (experts / expert, fsdp)
    read = sum(size * (2 if shards > 1 else 1) for size, shards in sizes)  # a gather writes them, too
    weights = passes * steps * _BF16 / mesh["tensor"] * read
    widths = 2 * model.head_dim * (model.num_heads + model.num_kv_heads) + 3 * model.embed_dim + 3 * _dense_width(model)
    routed = model.experts_per_token * (2 * model.embed_dim + 3 * (model.expert_mlp_dim or model.mlp_dim))
    widths += len(model.sparse_layers) / model.num_layers * routed
    tokens = tokens_per_device(config, mesh)
    activations = passes * model.num_layers * 2 * _BF16 * widths * tokens
    update = 5 * 3 * _FLOAT32 * matrix_size(model) / shards if config.optimizer.name == "muon" else 0
    return 2 * state_bytes + gradients + weights + activations + update
