"""Which attention kernel a model trains with, and running it on the mesh in force."""

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
from nextllm_jax.ops.splash import LANES, default_blocks, splash_attention
from nextllm_jax.sharding import RULES, per_shard

KernelName = Literal["xla", "blockwise", "splash", "cudnn"]

# From here on blockwise is about as fast as xla on a CPU, with a quarter of its temporaries; benchmarks/attention.py.
_LONG = 2048
# With a mask of documents cuDNN's backward pass takes 2 N T^2 bytes a sequence: 0.5 GiB here for 16 heads.
_LONGEST_MASK = 4096


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """How a model attends without a cache, settled for its devices."""

    name: KernelName = "xla"
    blocks: tuple[int, int] = (512, 512)
    """Positions in a block of queries and in one of keys."""
    interpret: bool = False
    """Run a Pallas kernel on any device, slowly: for tests."""
    reason: str = dataclasses.field(default="", compare=False)
    """Why this one, in a few words."""


def choose_kernel(config: Config, mesh: Mesh, dtype: Any) -> AttentionKernel:
    """The kernel for training on the mesh's devices, which need not be here.

    Raises InputError if the config asks for one that cannot be had.
    """
    name, reason = _name_and_reason(config, mesh, dtype)
    kind = mesh.devices.flat[0].device_kind
    default = default_blocks(kind) if name == "splash" else AttentionKernel.blocks
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
        obstacle = f"its mask of documents takes much memory beyond data.sequence_length {_LONGEST_MASK}"
    if best and not obstacle:
        return best, f"auto on {platform}"
    why = f"auto on {platform}" + (f": {best} is out, {obstacle}" if obstacle else "")
    if mesh.shape["sequence"] > 1:
        return "blockwise", why
    return ("blockwise", f"{why}, length {length:,}") if length >= _LONG else ("xla", why)


def _obstacle(name: KernelName, config: Config, mesh: Mesh, dtype: Any) -> str | None:
    """Why a config cannot have a kernel on a mesh; None if it can."""
    model, platform, parts = config.model, mesh.devices.flat[0].platform, mesh.shape["sequence"]
    length = config.data.sequence_length
    if name == "splash":
        if platform != "tpu":
            return f"it needs TPUs and the devices are {platform}"
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
            return f"it cannot divide sequences (mesh.sequence {parts})"
        if length % 2:
            return f"its mask of documents needs an even data.sequence_length, not {length}"
    return None


def attend(
    kernel: AttentionKernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    **rule: Any,
) -> jax.Array:
    """`ops.attention.causal_attention` by a kernel, divided over the mesh in force.

    XLA itself shards `xla`. The others run on each device's batch and heads; of a split sequence each device has its
    own queries, and gathers all keys. `rule` is window, scale and soft cap.
    """
    if kernel.name == "xla":
        return causal_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=segment_ids_BT, **rule)
    (axis,) = RULES["seq"]
    mesh = jax.sharding.get_abstract_mesh()
    divided = not mesh.empty and mesh.shape[axis] > 1

    def on_shard(q_BTNH, k_BTKH, v_BTKH, ids_BT):
        if not divided:
            return _attend_whole(kernel, q_BTNH, k_BTKH, v_BTKH, ids_BT, 0, rule)
        # The transpose of this gathering is a reduce-scatter: each device gets the gradients of its own keys.
        gather = functools.partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
        k_BSKH, v_BSKH, ids_BS = jax.tree.map(gather, (k_BTKH, v_BTKH, ids_BT))
        return _attend_whole(kernel, q_BTNH, k_BSKH, v_BSKH, ids_BS, jax.lax.axis_index(axis), rule)

    names_q, names_k = ("batch", "seq", "heads", "head_dim"), ("batch", "seq", "kv_heads", "head_dim")
    divide = per_shard(on_shard, (names_q, names_k, names_k, ("batch", "seq")), names_q)
    return divide(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _attend_whole(kernel: AttentionKernel, q_BTNH, k_BSKH, v_BSKH, ids_BS, shard, rule: dict[str, Any]) -> jax.Array:
    """Attention of part number `shard` of the queries (of T = S queries, if it is 0) over whole sequences of keys."""
    if kernel.name == "cudnn":
        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=ids_BS, **rule)
    rule = rule | {"segment_ids_BS": ids_BS, "blocks": kernel.blocks, "shard": shard}
    if kernel.name == "splash":
        return splash_attention(q_BTNH, k_BSKH, v_BSKH, interpret=kernel.interpret, **rule)
    return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, **rule)
