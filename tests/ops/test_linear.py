"""linear against the plain einsum and its automatic derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.ops.linear import linear

SHAPES = {
    "BTD,DF->BTF": ((2, 5, 6), (6, 7)),
    "BTD,DNH->BTNH": ((2, 5, 6), (6, 3, 4)),
    "BTNh,NhD->BTD": ((2, 5, 3, 4), (3, 4, 6)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation", SHAPES)
def test_value_and_gradients_are_those_of_the_einsum(equation, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    # Whole numbers of a few bits: every sum is exact in bfloat16's products, and rounds once at the end.
    x_shape, kernel_shape = SHAPES[equation]
    x = jax.random.randint(keys[0], x_shape, -4, 5).astype(dtype)
    kernel = jax.random.randint(keys[1], kernel_shape, -4, 5).astype(dtype)
    d_y = jax.random.randint(keys[2], jnp.einsum(equation, x, kernel).shape, -4, 5).astype(dtype)
    y, derivative = jax.vjp(lambda x, kernel: linear(equation, x, kernel), x, kernel)
    y_plain, derivative_plain = jax.vjp(lambda x, kernel: jnp.einsum(equation, x, kernel), x, kernel)
    for ours, plain in zip((y, *derivative(d_y)), (y_plain, *derivative_plain(d_y)), strict=True):
        assert ours.dtype == plain.dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(plain, np.float32))


def test_the_kernels_gradient_is_made_as_it_is_kept():
    """No product whose result has to be turned over, in the program that XLA is given."""
    x, kernel = jnp.ones((2, 5, 6)), jnp.ones((6, 7))
    text = jax.jit(jax.grad(lambda kernel: linear("BTD,DF->BTF", x, kernel).sum())).lower(kernel).as_text()
    assert "stablehlo.dot_general" in text
    assert "stablehlo.transpose" not in text
    plain = jax.jit(jax.grad(lambda kernel: jnp.einsum("BTD,DF->BTF", x, kernel).sum())).lower(kernel).as_text()
    assert "stablehlo.transpose" in plain  # what the function exists to avoid
