"""Products of activations with int8 matrices on CPUs, where XLA's own way is slow or takes much memory.

Dimension letters: R rows, I inputs, O outputs.
"""

import math

import jax
import jax.numpy as jnp

_FEW_ROWS = 8
"""Up to this many rows, int8 times int8 is faster than float32. XLA uses a scalar loop for fewer, so they are
repeated."""
_FINER = 254
"""Fine steps in a coarse step."""
_TILE_OUTPUTS = 128


def cpu_product(x: jax.Array, q: jax.Array, num_inputs: int, *, inputs_first: bool) -> jax.Array:
    """`x @ q`, float32 [..., outputs], of floats [..., inputs] and int8 [inputs, outputs], or [outputs, inputs].

    Of `x` and `q`, `num_inputs` axes are inputs. Up to eight rows of `x` are rounded to multiples of 1/32,258 of their
    greatest magnitude; the rest is exact up to float32.
    """
    rows, outputs = x.shape[: x.ndim - num_inputs], q.shape[num_inputs:] if inputs_first else q.shape[:-num_inputs]
    x_RI = x.astype(jnp.float32).reshape(math.prod(rows), -1)
    num_inputs = x_RI.shape[1]
    q_IO = q.reshape(num_inputs, -1) if inputs_first else q.reshape(-1, num_inputs).T
    multiply = _integer_product if len(x_RI) <= _FEW_ROWS else _tiled_product
    return multiply(x_RI, q_IO).reshape(*rows, *outputs)


def _integer_product(x_RI: jax.Array, q_IO: jax.Array) -> jax.Array:
    """The product in int8: each row becomes two rows. The second holds the rounding errors of the first."""
    step_R1 = jnp.max(jnp.abs(x_RI), axis=1, keepdims=True) / 127
    steps_RI = x_RI / jnp.where(step_R1 == 0, 1, step_R1)
    coarse_RI = jnp.round(steps_RI)
    both = jnp.concatenate([coarse_RI, jnp.round((steps_RI - coarse_RI) * _FINER)]).astype(jnp.int8)
    repeated = jnp.tile(both, (-(-_FEW_ROWS // len(both)), 1))
    sums = jnp.matmul(repeated, q_IO, preferred_element_type=jnp.int32)[: len(both)].astype(jnp.float32)
    coarse_RO, fine_RO = jnp.split(sums, 2)
    return (coarse_RO + fine_RO / _FINER) * step_R1


def _tiled_product(x_RI: jax.Array, q_IO: jax.Array) -> jax.Array:
    """The product in float32 by tiles of the outputs, in a loop.

    XLA would otherwise turn all matrices of a model into floats first. A tile stays in the processor's cache.
    """
    num_outputs = q_IO.shape[1]
    width = next(
        (size for size in range(_TILE_OUTPUTS, _TILE_OUTPUTS // 4, -1) if num_outputs % size == 0), _TILE_OUTPUTS
    )
    num_tiles = num_outputs // width

    def multiply(tile: jax.Array) -> jax.Array:
        return x_RI @ jax.lax.dynamic_slice_in_dim(q_IO, tile * width, width, axis=1).astype(jnp.float32)

    rest = x_RI @ q_IO[:, num_tiles * width :].astype(jnp.float32)
    if num_tiles == 0:
        return rest
    y = jnp.moveaxis(jax.lax.map(multiply, jnp.arange(num_tiles)), 0, 1).reshape(len(x_RI), -1)
    return jnp.concatenate([y, rest], axis=1)
