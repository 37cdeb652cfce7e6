"""Chooses the attention kernel for training, and runs it on the current mesh."""

import dataclasses
import functools
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from nextllm_jax.config import Config
from nextllm_jax.errors import InputError
from nextllm_jax.ops.attention import causal_attention
from nextllm_jax.ops.blockwise import blockwise_attention
from nextllm_jax.ops.cudnn import cudnn_attention
from nextllm_jax.sharding import RULES, per_shard

KernelName = Literal["xla", "blockwise", "splash", "cudnn"]

# From this length on, blockwise is about as fast as xla on a CPU with a quarter of its temporaries
# (benchmarks/attention.py).
_LONG = 2048
# With a document mask, cuDNN's backward pass needs 2 N T^2 bytes per sequence: 0.5 GiB at this length for 16 heads.
_LONGEST_MASK = 4096


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """The attention kernel of a model without a cache, chosen for its devices."""

    name: KernelName = "xla"
    blocks: tuple[int, int] = (512, 512)
    """Positions per block of queries and per block of keys."""
    interpret: bool = False
    """Run a Pallas kernel in interpret mode, on any device; for tests."""
    reason: str = dataclasses.field(default="", compare=False)
    """Why it was chosen, for a message."""


def choose_kernel(config: Config, mesh: Mesh, dtype: Any) -> AttentionKernel:
    """The kernel for training on the devices of the mesh, which need not be attached to this machine.

    Raises InputError if the config asks for a kernel that is not available there.
    """
    name, reason = _name_and_reason(config, mesh, dtype)
    kind = mesh.devices.flat[0].device_kind
    default = AttentionKernel.blocks
    if name == "splash":
        from nextllm_jax.ops.splash import default_blocks  # imports Pallas, which takes a tenth of a start

        default = default_blocks(kind)
    queries, keys = config.model.attention_blocks or default
    if mesh.shape["sequence"] > 1:
        reason += ", gathering keys"
    return AttentionKernel(name, (queries, keys), reason=reason)


def _name_and_reason(config: Config, mesh: Mesh, dtype: Any) -> tuple[KernelName, str]:
    name = config.model.attention
    if name != "auto":
        if obstacle := _obstacle(name, config, mesh, dtype):
            raise InputError(f"model.attention is {name}, but {obstacle}; set it to auto")
        return name, "as configured"
    platform, length = mesh.devices.flat[0].platform, config.data.sequence_length
    best: KernelName | None = {"tpu": "splash", "gpu": "cudnn"}.get(platform)  # pyright: ignore[reportAssignmentType]
    obstacle = _obstacle(best, config, mesh, dtype) if best else None
    if best == "cudnn" and not obstacle and length > _LONGEST_MASK:
        obstacle = f"its document mask needs much memory beyond data.sequence_length {_LONGEST_MASK}"
    if best and not obstacle:
        return best, f"auto on {platform}"
    why = f"auto on {platform}" + (f": {best} is not available, {obstacle}" if obstacle else "")
    if mesh.shape["sequence"] > 1:
        return "blockwise", why
    return ("blockwise", f"{why}, length {length:,}") if length >= _LONG else ("xla", why)


def _obstacle(name: KernelName, config: Config, mesh: Mesh, dtype: Any) -> str | None:
    """Why a config cannot use a kernel on a mesh; None if it can."""
    model, platform, parts = config.model, mesh.devices.flat[0].platform, mesh.shape["sequence"]
    length = config.data.sequence_length
    if name == "splash":
        if platform != "tpu":
            return f"it needs TPUs and the devices are {platform}"
        from nextllm_jax.ops.splash import LANES

        if any(block % LANES for block in model.attention_blocks):
            return f"model.attention_blocks {model.attention_blocks} are not multiples of {LANES}"
        if parts > 1 and length % (parts * LANES):
            return f"data.sequence_length {length} / mesh.sequence {parts} is not a multiple of {LANES}"
    if name == "cudnn":
        if platform != "gpu":
            return f"it needs GPUs and the devices are {platform}"
        if dtype != "bfloat16":
            return f"it needs bfloat16 and model.dtype is {dtype}"
        if model.attention_soft_cap is not None:
            return "it has no soft cap (model.attention_soft_cap)"
        if model.head_dim % 8 or model.head_dim > 128:
            return f"it needs a multiple of 8 up to 128 and model.head_dim is {model.head_dim}"
        if parts > 1:
            return f"it cannot shard sequences (mesh.sequence {parts})"
        if length % 2:
            return f"its document mask needs an even data.sequence_length, not {length}"
    return None


def attend(
    kernel: AttentionKernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    **rule: Any,
) -> jax.Array:
    """`ops.attention.causal_attention` with the given kernel, sharded over the current mesh.

    XLA shards the kernel `xla` itself. The others run in `shard_map` over batch and heads. If sequences are sharded,
    each device has its own queries and gathers all keys. `rule` holds window, scale and soft cap.
    """
    if kernel.name == "xla":
        return causal_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=segment_ids_BT, **rule)
    (axis,) = RULES["seq"]
    mesh = jax.sharding.get_abstract_mesh()
    is_sharded = not mesh.empty and mesh.shape[axis] > 1

    def on_shard(q_BTNH, k_BTKH, v_BTKH, ids_BT):
        if not is_sharded:
            return _attend_whole(kernel, q_BTNH, k_BTKH, v_BTKH, ids_BT, 0, rule)
        # The gradient of the all-gather is a reduce-scatter: each device gets the gradients of its own keys.
        gather = functools.partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
        k_BSKH, v_BSKH, ids_BS = jax.tree.map(gather, (k_BTKH, v_BTKH, ids_BT))
        return _attend_whole(kernel, q_BTNH, k_BSKH, v_BSKH, ids_BS, jax.lax.axis_index(axis), rule)

    names_q, names_k = ("batch", "seq", "heads", "head_dim"), ("batch", "seq", "kv_heads", "head_dim")
    sharded = per_shard(on_shard, (names_q, names_k, names_k, ("batch", "seq")), names_q)
    return sharded(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _attend_whole(kernel: AttentionKernel, q_BTNH, k_BSKH, v_BSKH, ids_BS, shard, rule: dict[str, Any]) -> jax.Array:
    """Attention of shard number `shard` of the queries (0 also if T = S) over the keys of whole sequences."""
    if kernel.name == "cudnn":
        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=ids_BS, **rule)
    rule = rule | {"segment_ids_BS": ids_BS, "blocks": kernel.blocks, "shard": shard}
    if kernel.name == "splash":
        from nextllm_jax.ops.splash import splash_attention

        return splash_attention(q_BTNH, k_BSKH, v_BSKH, interpret=kernel.interpret, **rule)
    return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, **rule)
