"""Time and memory of a sparse layer next to a dense one with the same active FLOPs, forward and backward.

python benchmarks/sparse_layer.py
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig
from nextllm_jax.model.layers import SwiGLU
from nextllm_jax.model.moe import MixtureOfExperts

TOKENS = (8, 512)
WIDTH = 256
SHAPES = {"8 experts of 512, 2 chosen": (8, 2, 512), "64 experts of 128, 8 chosen": (64, 8, 128)}
REPEATS = 9


@dataclasses.dataclass
class Measured:
    """A compiled gradient of a layer, its arguments, and the processor seconds of each call."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    temporary_mib: float
    seconds: list[float] = dataclasses.field(default_factory=list)


def measured(layer: nn.Module, *inputs: Any) -> Measured:
    params = nn.meta.unbox(layer.init(jax.random.key(0), *inputs)["params"])

    def loss(params: Any, *inputs: Any) -> jax.Array:
        return jnp.sum(jnp.square(layer.apply({"params": params}, *inputs)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, *inputs).compile()
    memory = compiled.memory_analysis()
    return Measured(compiled, (params, *inputs), memory.temp_size_in_bytes / 2**20 if memory else 0.0)


def main() -> None:
    x_BTD = jax.random.normal(jax.random.key(1), (*TOKENS, WIDTH))
    ids_BT = jnp.ones(TOKENS, jnp.int32)
    print(f"{TOKENS[0]} x {TOKENS[1]} tokens of {WIDTH}, float32, forward and backward, median of {REPEATS}")
    print(f"{'layer':32}{'dense':>10}{'sparse':>10}{'ratio':>8}{'temporaries, MiB':>20}")
    for name, (experts, chosen, width) in SHAPES.items():
        config = ModelConfig(
            embed_dim=WIDTH, num_experts=experts, experts_per_token=chosen, expert_mlp_dim=width, dtype="float32"
        )
        dense = measured(SwiGLU(config, chosen * width, jnp.float32), x_BTD)
        sparse = measured(MixtureOfExperts(config, jnp.float32), x_BTD, ids_BT)
        for _ in range(REPEATS):
            for each in (dense, sparse):
                began = time.process_time()
                jax.block_until_ready(each.run(*each.arguments))
                each.seconds.append(time.process_time() - began)
        one, other = (1e3 * statistics.median(each.seconds) for each in (dense, sparse))
        memory = f"{dense.temporary_mib:.0f} / {sparse.temporary_mib:.0f}"
        print(f"{name:32}{one:7.0f} ms{other:7.0f} ms{other / one:8.2f}{memory:>20}")


if __name__ == "__main__":
    main()
