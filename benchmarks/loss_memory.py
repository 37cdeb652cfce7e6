"""Peak temporary memory of the loss and its gradients at a 128,256-token vocabulary: chunked and plain.

    python benchmarks/loss_memory.py [--batch-size 8] [--sequence-length 4096] [--embed-dim 2048]

Compiles both without running them and reads XLA's `memory_analysis()`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import optax

from nextllm_jax.ops.cross_entropy import cross_entropy


def plain_loss(hidden_BTD, head_VD, targets_BT, mask_BT):
    """The summed loss, computed from the logits of all tokens at once."""
    head_VD = head_VD.astype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT) * mask_BT)


def temporary_bytes(loss, arguments: argparse.Namespace, dtype) -> int:
    """Bytes of temporaries for the loss and both gradients, without arguments and results."""
    B, T, D, V = arguments.batch_size, arguments.sequence_length, arguments.embed_dim, arguments.vocab_size
    shapes = [
        jax.ShapeDtypeStruct(*shape)
        for shape in (((B, T, D), dtype), ((V, D), jnp.float32), ((B, T), jnp.int32), ((B, T), jnp.bool_))
    ]
    memory = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--embed-dim", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    arguments = parser.parse_args()
    print(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in vars(arguments).items()))
    for dtype in (jnp.float32, jnp.bfloat16):
        plain, chunked = (temporary_bytes(loss, arguments, dtype) for loss in (plain_loss, cross_entropy))
        print(
            f"{jnp.dtype(dtype).name:<10} plain {plain / 2**20:>9,.0f} MiB   chunked {chunked / 2**20:>7,.0f} MiB   "
            f"plain / chunked {plain / chunked:.1f}"
        )


if __name__ == "__main__":
    main()
