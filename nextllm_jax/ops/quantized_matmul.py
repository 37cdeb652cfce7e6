"""Products with a matrix of small integers on TPUs, as a Pallas kernel: no float copy of the matrix leaves the chip.

Dimension letters: R rows, I inputs, O outputs, G groups of inputs that share a scale.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_MOST_ROWS, _MOST_INPUTS, _MOST_OUTPUTS = 512, 2048, 512
_LANES, _SUBLANES = 128, 8


def tile_sizes(q_IO: Any, scale_GO: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a tile of a matrix, whose shapes are read; None if no tiles divide it.

    A tile has whole groups, eight or a multiple of it, unless it has all inputs.
    """
    (num_inputs, num_outputs), num_groups = q_IO.shape, scale_GO.shape[0]
    group = num_inputs // num_groups
    inputs = _largest_divisor(num_inputs, math.lcm(_LANES, _SUBLANES * group), _MOST_INPUTS)
    if inputs is None and num_inputs % _LANES == 0 and num_inputs <= 2 * _MOST_INPUTS:
        inputs = num_inputs
    outputs = _largest_divisor(num_outputs, _LANES, _MOST_OUTPUTS)
    return None if inputs is None or outputs is None or group % _SUBLANES else (inputs, outputs)


def _largest_divisor(size: int, unit: int, most: int) -> int | None:
    return next((tile for tile in range(most - most % unit, 0, -unit) if size % tile == 0), None)


def quantized_matmul(
    x_RI: jax.Array,
    q_IO: jax.Array,
    scale_GO: jax.Array,
    minimum_GO: jax.Array | None,
    result_type: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`x @ dequantize(QTensor(q, scale, minimum))`, [R, O] in `result_type`: products in bfloat16, sums in float32.

    `x` is bfloat16, `q` int4 or int8, scale and minimum float16. `interpret` runs the kernel on any device, slowly.
    XLA cannot shard the kernel: call it under `shard_map`. Raises ValueError if no tiles divide the matrix.
    """
    tiles = tile_sizes(q_IO, scale_GO)
    if tiles is None:
        raise ValueError(f"no tiles divide the matrix {q_IO.shape} with {scale_GO.shape[0]} groups; see tile_sizes")
    (num_rows, num_inputs), num_outputs, group = x_RI.shape, q_IO.shape[1], q_IO.shape[0] // scale_GO.shape[0]
    (inputs, outputs), rows = tiles, min(_MOST_ROWS, -(-num_rows // 16) * 16)
    x_RI = jnp.pad(x_RI, ((0, -num_rows % rows), (0, 0)))
    # Mosaic loads no float16, so the kernel gets its bits.
    grouped = [jax.lax.bitcast_convert_type(x, jnp.int16) for x in (scale_GO, minimum_GO) if x is not None]
    by_input_and_output = [pl.BlockSpec((size, outputs), lambda r, o, i: (i, o)) for size in (inputs, inputs // group)]
    y_RO = pl.pallas_call(
        functools.partial(_kernel, least=int(jnp.iinfo(q_IO.dtype).min)),
        grid=(len(x_RI) // rows, num_outputs // outputs, num_inputs // inputs),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda r, o, i: (r, i)),
            by_input_and_output[0],
            *by_input_and_output[1:] * len(grouped),
        ],
        out_specs=pl.BlockSpec((rows, outputs), lambda r, o, i: (r, o)),
        out_shape=jax.ShapeDtypeStruct((len(x_RI), num_outputs), result_type),
        scratch_shapes=[pltpu.VMEM((rows, outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(x_RI, q_IO, *grouped)
    return y_RO[:num_rows]


def _kernel(x_ref: Any, q_ref: Any, scale_ref: Any, *refs: Any, least: int) -> None:
    """Adds one tile's product to the sums; `refs` are a minimum, if there is one, the result and the sums."""
    *minimum_ref, y_ref, sums_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    (num_inputs, num_outputs), num_groups = q_ref.shape, scale_ref.shape[0]
    steps = q_ref[...].astype(jnp.float32).reshape(num_groups, num_inputs // num_groups, num_outputs)
    scale, *minimum = (_from_float16_bits(ref[...])[:, None] for ref in (scale_ref, *minimum_ref))
    values = (steps - least) * scale + minimum[0] if minimum else steps * scale
    matrix = values.reshape(num_inputs, num_outputs).astype(x_ref.dtype)
    # Without a precision Mosaic refuses bfloat16 in a process that asks for full float32 products.
    precision = jax.lax.Precision.DEFAULT
    sums_ref[...] += jnp.dot(x_ref[...], matrix, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def _from_float16_bits(bits: jax.Array) -> jax.Array:
    """The float32 values of finite float16 numbers, whose bits come as int16.

    Subnormal ones are multiplied out, since a TPU flushes subnormal float32 to zero.
    """
    bits = bits.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    normal = jax.lax.bitcast_convert_type((magnitude << 13) + ((127 - 15) << 23), jnp.float32)
    value = jnp.where(magnitude < 1 << 10, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits < 0, -value, value)
