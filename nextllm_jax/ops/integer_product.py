"""Products of a few rows of activations with int8 matrices on CPUs.

XLA's CPU backend multiplies floats with int8 in a scalar loop. It multiplies int8 with int8 fast, for eight rows as for
one: so a row is given as two of int8, the second of which holds what the first leaves over.
"""

import math

import jax
import jax.numpy as jnp

_LEAST_ROWS = 8
"""With fewer XLA falls back to a scalar loop, so rows are repeated."""
_FINER = 254
"""Steps of the second row in one of the first."""


def integer_product(x: jax.Array, q: jax.Array, num_inputs: int, *, inputs_first: bool) -> jax.Array:
    """`x @ q`, float32 [..., outputs], of floats [..., inputs] and int8 [inputs, outputs], or [outputs, inputs].

    Of `x` and `q`, `num_inputs` axes are inputs. Each row of `x` is rounded to multiples of 1/32,258 of its greatest
    magnitude; the rest is exact up to float32.
    """
    rows, outputs = x.shape[: x.ndim - num_inputs], q.shape[num_inputs:] if inputs_first else q.shape[:-num_inputs]
    x_RI = x.astype(jnp.float32).reshape(math.prod(rows), -1)
    step_R1 = jnp.max(jnp.abs(x_RI), axis=1, keepdims=True) / 127
    steps_RI = x_RI / jnp.where(step_R1 == 0, 1, step_R1)
    coarse_RI = jnp.round(steps_RI)
    both = jnp.concatenate([coarse_RI, jnp.round((steps_RI - coarse_RI) * _FINER)]).astype(jnp.int8)
    repeated = jnp.tile(both, (-(-_LEAST_ROWS // len(both)), 1))
    dims, shape = ("io", (both.shape[1], -1)) if inputs_first else ("oi", (-1, both.shape[1]))
    sums = jnp.einsum(f"ri,{dims}->ro", repeated, q.reshape(shape), preferred_element_type=jnp.int32)
    coarse_RO, fine_RO = jnp.split(sums[: len(both)].astype(jnp.float32), 2)
    return ((coarse_RO + fine_RO / _FINER) * step_R1).reshape(*rows, *outputs)
