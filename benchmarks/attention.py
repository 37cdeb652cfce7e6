"""Temporary memory and time of attention, forward and backward, for each kernel and sequence length.

    python benchmarks/attention.py [--lengths 1024 4096]               # time the kernels that run here
    python benchmarks/attention.py --topology v5e:2x2                  # compile for a TPU; needs '.[tpu]'

Temporaries are from XLA's `memory_analysis()`, without arguments and results. The kernels alternate, and times are
medians.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if any(argument.startswith("--topology") for argument in sys.argv):  # must be set before jax starts
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nextllm_jax.ops.attention import causal_attention
from nextllm_jax.ops.blockwise import blockwise_attention
from nextllm_jax.ops.cudnn import cudnn_attention
from nextllm_jax.ops.splash import splash_attention


def kernels(blocks: tuple[int, int], platform: str) -> dict:
    """A function of (q, k, v, segment ids) for each kernel."""
    found = {
        "xla": lambda q, k, v, ids: causal_attention(q, k, v, segment_ids_BT=ids),
        "blockwise": lambda q, k, v, ids: blockwise_attention(q, k, v, segment_ids_BS=ids, blocks=blocks),
    }
    if platform == "tpu":
        found["splash"] = lambda q, k, v, ids: splash_attention(q, k, v, segment_ids_BS=ids, blocks=blocks)
    if platform == "gpu":
        found["cudnn"] = lambda q, k, v, ids: cudnn_attention(q, k, v, segment_ids_BT=ids)
        found["cudnn, one document"] = lambda q, k, v, ids: cudnn_attention(q, k, v)
    return found


def passes(attend, q, k, v, ids):
    """The output, and the gradients for a cotangent equal to the output."""
    out, backward = jax.vjp(functools.partial(attend, ids=ids), q, k, v)
    return out, backward(out)


def compiled(attend, T: int, arguments: argparse.Namespace, dtype, device):
    """The compiled forward and backward pass for a device, which need not be attached."""
    sharding = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    B, heads, H = arguments.batch_size, (arguments.num_heads, *2 * (arguments.num_kv_heads,)), arguments.head_dim
    shapes = [jax.ShapeDtypeStruct((B, T, N, H), dtype, sharding=sharding) for N in heads]
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=sharding)
    return jax.jit(functools.partial(passes, attend)).lower(*shapes, ids).compile()


def inputs(T: int, arguments: argparse.Namespace, dtype):
    """Random queries, keys and values with unit variance, and segment ids of two documents."""
    rng, H = np.random.default_rng(0), arguments.head_dim
    heads = (arguments.num_heads, *2 * (arguments.num_kv_heads,))
    arrays = [jnp.asarray(rng.normal(size=(arguments.batch_size, T, N, H)), dtype) for N in heads]
    return *arrays, jnp.broadcast_to((jnp.arange(T) > T // 3).astype(jnp.int32), (arguments.batch_size, T))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs=2, default=(512, 512), help="positions per block of queries, keys")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--topology", help="only compile, for a chip of this TPU topology")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if arguments.topology:
        from jax.experimental import topologies

        device = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices[0]
    dtype = jnp.dtype(arguments.dtype)
    print(f"{device.device_kind}, {', '.join(f'{name} {value}' for name, value in vars(arguments).items() if value)}")
    for T in arguments.lengths:
        programs = {
            name: compiled(attend, T, arguments, dtype, device)
            for name, attend in kernels(tuple(arguments.blocks), device.platform).items()
        }
        times: dict[str, list[float]] = {name: [] for name in programs}
        if not arguments.topology:
            arrays = inputs(T, arguments, dtype)
            for _ in range(arguments.rounds + 1):
                for name, program in programs.items():
                    started = time.perf_counter()
                    jax.block_until_ready(program(*arrays))
                    times[name].append(time.perf_counter() - started)
        for name, program in programs.items():
            memory = program.memory_analysis()
            assert memory is not None
            took = f"{statistics.median(times[name][1:]) * 1e3:>9,.2f} ms" if times[name] else ""
            print(f"{T:>7,} {name:<20} {memory.temp_size_in_bytes / 2**20:>9,.1f} MiB {took}", flush=True)


if __name__ == "__main__":
    main()
