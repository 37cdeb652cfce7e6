"""Which attention kernel a model runs on its devices, and running it on a mesh."""

import dataclasses
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from nextllm_jax.config import Config
from nextllm_jax.errors import InputError
from nextllm_jax.ops.attention import causal_attention
from nextllm_jax.ops.splash import splash_attention
from nextllm_jax.sharding import per_shard


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """How a model attends without a cache, settled for its devices."""

    name: Literal["xla", "blockwise", "splash", "cudnn"] = "xla"
    blocks: tuple[int, int] = (512, 512)
    """Positions in a block of queries and in one of keys."""
    context: Literal["all_gather", "ring"] = "all_gather"
    """How sequences attend that the mesh divides."""
    interpret: bool = False
    """Run Pallas kernels on any device, slowly: for tests."""
    reason: str = dataclasses.field(default="", compare=False)
    """Why this one, in a few words."""


def choose_kernel(config: Config, mesh: Mesh, dtype: Any) -> AttentionKernel:
    """The kernel for training on the mesh's devices, which need not be here.

    Raises InputError if the config asks for one that cannot be had.
    """
    platform = mesh.devices.flat[0].platform
    name = config.model.attention
    if name == "auto":
        name, reason = ("splash", "the devices are TPUs") if platform == "tpu" else ("xla", f"platform {platform}")
    elif name == "splash" and platform != "tpu":
        raise InputError(f"model.attention is splash, which needs TPUs, but the devices are {platform}; set auto")
    else:
        reason = "as configured"
    return AttentionKernel(name, reason=reason)


def attend(
    kernel: AttentionKernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    **rule: Any,
) -> jax.Array:
    """`ops.attention.causal_attention` by a kernel, divided over the mesh in force."""
    if kernel.name == "xla":
        return causal_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=segment_ids_BT, **rule)

    def on_shard(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        return splash_attention(
            q_BTNH, k_BTKH, v_BTKH,
            segment_ids_BS=segment_ids_BT, blocks=kernel.blocks, interpret=kernel.interpret, **rule,
        )  # fmt: skip

    names_q, names_kv = ("batch", "seq", "heads", "head_dim"), ("batch", "seq", "kv_heads", "head_dim")
    return per_shard(on_shard, (names_q, names_kv, names_kv, ("batch", "seq")), names_q)(
        q_BTNH, k_BTKH, v_BTKH, segment_ids_BT
    )
