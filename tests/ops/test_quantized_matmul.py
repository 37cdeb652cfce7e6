"""The TPU kernel for quantized matrices: interpreted against the dequantized matrix, and compiled for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from nextllm_jax.ops import quantized_matmul as module
from nextllm_jax.ops.product import product
from nextllm_jax.ops.quantized import QTensor, dequantize, quantize
from nextllm_jax.ops.quantized_matmul import quantized_matmul, tile_sizes

RNG = np.random.default_rng(0)


def abstract(shape, group, *, dtype="int4", minimum=True):
    """The abstract QTensor of a matrix with groups along the last of its inputs, which is its first axis but one."""
    axis = len(shape) - 2
    scale = jax.ShapeDtypeStruct((*shape[:axis], shape[axis] // group, *shape[axis + 1 :]), jnp.float16)
    return QTensor(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), scale, scale if minimum else None)


def matrix(shape, group, **form):
    """A random matrix, some groups of which have subnormal scales and minima."""
    x = RNG.normal(size=shape) * 10.0 ** RNG.integers(-6, 1, (shape[0] // 8, 1)).repeat(8, axis=0)
    return quantize(jnp.asarray(x, jnp.float32), abstract(shape, group, **form))


CASES = {  # rows, (inputs, outputs), group
    "one tile": (9, (256, 128), 32, {}),
    "several tiles and padded rows": (520, (2560, 640), 32, {}),
    "no minimum": (16, (512, 128), 64, {"minimum": False}),
    "int8": (16, (256, 256), 8, {"dtype": "int8", "minimum": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_product_with_the_dequantized_matrix(case):
    rows, shape, group, form = CASES[case]
    x, kernel = jnp.asarray(RNG.normal(size=(rows, shape[0])), jnp.bfloat16), matrix(shape, group, **form)
    found = quantized_matmul(x, kernel.q, kernel.scale, kernel.minimum, jnp.float32, interpret=True)
    expected = np.asarray(x, np.float32) @ np.asarray(dequantize(kernel, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_float16_is_read_from_its_bits():
    bits = np.arange(-(2**15), 2**15, dtype=np.int16)
    values = bits.view(np.float16)
    finite = np.isfinite(values)
    found = module._from_float16_bits(jnp.asarray(bits[finite]))
    np.testing.assert_array_equal(found, values[finite].astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "group", "tiles"),
    [
        ((4096, 14336), 32, (2048, 512)),
        ((3584, 4096), 32, (1792, 512)),
        ((3584, 4096), 128, (3584, 512)),
        ((4096, 256), 64, (2048, 256)),
        ((4096, 320), 32, None),  # outputs that are no whole number of lanes
        ((96, 128), 32, None),
        ((512, 128), 4, None),
    ],
)
def test_tiles_have_whole_groups(shape, group, tiles):
    form = abstract(shape, group)
    assert tile_sizes(form.q, form.scale) == tiles


def test_what_no_tiles_divide_is_refused():
    x, kernel = jnp.zeros((16, 96), jnp.bfloat16), matrix((96, 128), 32)
    with pytest.raises(ValueError, match=r"no tiles divide the matrix \(96, 128\) with 3 groups"):
        quantized_matmul(x, kernel.q, kernel.scale, kernel.minimum, jnp.float32)


@pytest.mark.parametrize(
    ("equation", "shape", "group"), [("BTD,DNH->BTNH", (256, 2, 64), 32), ("BTNh,NhD->BTD", (2, 128, 256), 32)]
)
def test_products_on_tpus_and_their_gradients(as_on_tpu, equation, shape, group):
    num_inputs = 1 if equation.startswith("BTD") else 2
    axis = num_inputs - 1
    scale = jax.ShapeDtypeStruct((*shape[:axis], shape[axis] // group, *shape[axis + 1 :]), jnp.float16)
    form = QTensor(jax.ShapeDtypeStruct(shape, jnp.int4), scale, scale)
    kernel = quantize(jnp.asarray(RNG.normal(size=shape), jnp.float32), form)
    x = jnp.asarray(RNG.normal(size=(2, 8, *shape[:num_inputs])), jnp.bfloat16)

    def value_and_gradient(per_device):
        multiply = functools.partial(product, equation, kernel=kernel, result_type=jnp.float32, per_device=per_device)
        y, backward = jax.vjp(multiply, x)
        return y, *backward(jnp.sin(y))

    plain = value_and_gradient(None)
    assert not as_on_tpu
    for found, expected in zip(value_and_gradient(lambda f: f), plain, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2, atol=1e-2)
    assert as_on_tpu


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "scheme", "group"),
    [("v5e:2x2", "int4", 32), ("v5e:2x2", "int4", 128), ("v6e:2x2", "int4", 32), ("v6e:2x2", "int8", 32)],
)
def test_the_kernel_compiles_for_tpus(four_tpus, topology, scheme, group):
    """A device's part of a matrix of Llama 3 8B on four devices, and 600 rows."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    kernel = abstract((3584, 4096), group, dtype=scheme, minimum=scheme == "int4")
    place = SingleDeviceSharding(devices[0])
    x, *parts = (
        part and part.update(sharding=place)
        for part in (jax.ShapeDtypeStruct((600, 3584), jnp.bfloat16), kernel.q, kernel.scale, kernel.minimum)
    )
    compiled = jax.jit(quantized_matmul, static_argnums=4).lower(x, *parts, jnp.bfloat16).compile()
    assert "tpu_custom_call" in compiled.as_text()
    padded = 2 * 1024 * (3584 + 4096)  # rows of x and of the result
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * padded + 2 * kernel.scale.size * 2
