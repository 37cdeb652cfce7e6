"""Products with 8-bit matrices against the matrices that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.ops.quantized import dequantize, product, quantize

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("equation", "kernel_shape", "input_axes"),
    [("BTD,DF->BTF", (6, 5), (0,)), ("BTD,DNH->BTNH", (6, 3, 4), (0,)), ("BTNh,NhD->BTD", (3, 2, 7), (0, 1))],
)
def test_products_and_their_gradients_are_those_of_the_dequantized_matrix(equation, kernel_shape, input_axes):
    inputs = [kernel_shape[axis] for axis in input_axes]
    x = RNG.normal(size=(2, 3, *inputs)).astype(np.float32)
    kernel = quantize(jnp.asarray(RNG.normal(size=kernel_shape).astype(np.float32)), input_axes)
    dense = np.asarray(kernel.q, np.float32) * np.asarray(kernel.scale)
    np.testing.assert_array_equal(dequantize(kernel, jnp.float32), dense)
    np.testing.assert_allclose(product(equation, x, kernel), np.einsum(equation, x, dense), rtol=1e-5, atol=1e-5)

    def summed(x, kernel):
        return jnp.sum(jnp.sin(product(equation, x, kernel)))

    found, expected = (np.asarray(jax.grad(summed)(x, matrix)) for matrix in (kernel, jnp.asarray(dense)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_no_value_is_off_by_more_than_half_a_step_of_its_channel():
    x = RNG.normal(size=(64, 8)).astype(np.float32) * 10.0 ** np.arange(-4, 4, dtype=np.float32)
    x[:, 3] = 0
    found = quantize(jnp.asarray(x), (0,))
    assert found.q.dtype == jnp.int8
    np.testing.assert_allclose(found.scale[0], np.abs(x).max(0) / 127, rtol=1e-6)
    assert (np.abs(np.asarray(dequantize(found, jnp.float32)) - x) <= np.asarray(found.scale) * 0.50001).all()
    assert np.abs(np.asarray(found.q)).max(0).tolist() == [127, 127, 127, 0, 127, 127, 127, 127]
