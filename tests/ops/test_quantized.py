"""Quantized matrices and products with them, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nextllm_jax.ops import quantized
from nextllm_jax.ops.cpu_product import cpu_product
from nextllm_jax.ops.product import _grouped_product, product
from nextllm_jax.ops.quantized import QTensor, dequantize, pack, quantize, take_rows, unpack

RNG = np.random.default_rng(0)
FORMS = {
    "int8 by channel": ("int8", None, np.float32, False),
    "int8 in groups": ("int8", 4, np.float16, False),
    "int4": ("int4", 4, np.float16, False),
    "int4 with minimum": ("int4", 4, np.float16, True),
}


def like(shape, axis, form):
    """The abstract QTensor of a matrix that is grouped along one axis."""
    dtype, group, scale_type, has_minimum = FORMS[form]
    scale_shape = list(shape)
    scale_shape[axis] = shape[axis] // group if group else 1
    scale = jax.ShapeDtypeStruct(tuple(scale_shape), scale_type)
    return QTensor(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), scale, scale if has_minimum else None)


def by_hand(x, form):
    """What a matrix [inputs, outputs] becomes, group by group."""
    group = FORMS[form][1] or len(x)
    made = np.zeros_like(x)
    for column in range(x.shape[1]):
        for start in range(0, len(x), group):
            made[start : start + group, column] = rounded(x[start : start + group, column], form)
    return made


def rounded(values, form, part=1.0):
    """The values of a group in steps that reach over a part of their range."""
    dtype, _, scale_type, has_minimum = FORMS[form]
    if has_minimum:
        low, high = values.min() * np.float32(part), values.max() * np.float32(part)
        low, scale = (scale_type(value).astype(np.float32) for value in (low, (high - low) / np.float32(15)))
        return np.clip(np.round((values - low) / scale), 0, 15) * scale + low
    extreme = values[np.abs(values).argmax()] * np.float32(part)
    least, greatest = (-8, 7) if dtype == "int4" else (-128, 127)
    scale = scale_type(extreme / np.float32(-8) if dtype == "int4" else np.abs(extreme) / np.float32(127))
    return np.clip(np.round(values / scale.astype(np.float32)), least, greatest) * scale.astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_quantizing_is_what_a_loop_over_groups_does(form):
    x = RNG.normal(size=(12, 5)).astype(np.float32)
    found = quantize(jnp.asarray(x), like((12, 5), 0, form))
    np.testing.assert_allclose(dequantize(found, jnp.float32), by_hand(x, form), rtol=1e-6, atol=1e-6)
    assert found.q.dtype == FORMS[form][0]
    assert found.scale.dtype == FORMS[form][2]


@pytest.mark.parametrize("form", ["int4", "int4 with minimum"])
def test_the_range_that_costs_least_is_found(form):
    """One outlier of many values is cut off for the finer steps of the others, unless it matters more than they do."""
    x = RNG.normal(size=(64, 1)).astype(np.float32)
    x[0] = 5.0
    group = quantized.QTensor(jax.ShapeDtypeStruct((64, 1), jnp.int4), jax.ShapeDtypeStruct((1, 1), np.float16))
    group = dataclasses.replace(group, minimum=group.scale if FORMS[form][3] else None)
    for outlier in (1.0, 1e4):
        importance = np.ones_like(x)
        importance[0] = outlier
        scale, minimum = quantized.fit(x, group, (0,), importance)
        found = quantized.values_of(quantized.steps_of(x, scale, minimum, jnp.int4), scale, minimum, jnp.int4)
        tried = [rounded(x[:, 0], form, part) for part in np.float32([1, *quantized._NARROWER])]
        errors = [(np.square(one - x[:, 0]) * importance[:, 0]).sum() for one in tried]
        np.testing.assert_allclose(found[:, 0], tried[np.argmin(errors)], rtol=1e-5, atol=1e-5)
        assert (np.argmin(errors) == 0) == (outlier > 1)


PRODUCTS = pytest.mark.parametrize(
    ("equation", "kernel_shape", "axis", "outer"),
    [
        ("BTD,DF->BTF", (8, 5), 0, ()),
        ("BTD,DNH->BTNH", (8, 3, 4), 0, ()),
        ("BTNh,NhD->BTD", (3, 8, 7), 1, (0,)),
        ("BTD,VD->BTV", (6, 8), 1, ()),
    ],
)


@pytest.mark.parametrize("form", FORMS)
@PRODUCTS
def test_products_and_their_gradients_are_those_of_the_dequantized_matrix(equation, kernel_shape, axis, outer, form):
    form_like = like(kernel_shape, axis, form)
    if FORMS[form][1] is None:  # a scale for all inputs
        shape = tuple(1 if i in outer else size for i, size in enumerate(form_like.scale.shape))
        form_like = QTensor(form_like.q, form_like.scale.update(shape=shape))
    x = RNG.normal(size=(2, 3, *(kernel_shape[i] for i in (*outer, axis)))).astype(np.float32)
    kernel = quantize(jnp.asarray(RNG.normal(size=kernel_shape).astype(np.float32)), form_like)
    dense = np.asarray(dequantize(kernel, jnp.float32))
    expected = np.einsum(equation, x, dense)
    # Of six rows, a CPU rounds what it multiplies with int8 by channel to 1/32,258 of the greatest.
    tolerance = 1e-5 if FORMS[form][1] else 2e-4
    np.testing.assert_allclose(product(equation, x, kernel), expected, rtol=tolerance, atol=tolerance)
    many = product(equation, np.concatenate([x, -x]), kernel)
    np.testing.assert_allclose(many, np.concatenate([expected, -expected]), rtol=1e-5, atol=1e-5)
    half = product(equation, jnp.asarray(x, jnp.bfloat16), kernel, jnp.float32)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, rtol=0.05, atol=0.05)
    if kernel_shape == (6, 8):
        return  # the head, which is never differentiated in this way

    def summed(x, kernel):
        return jnp.sum(jnp.sin(product(equation, x, kernel)))

    found, expected = (np.asarray(jax.grad(summed)(x, matrix)) for matrix in (kernel, jnp.asarray(dense)))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("num_outputs", [100, 128, 300])
@pytest.mark.parametrize("rows", [3, 20])
def test_a_cpu_multiplies_with_int8_whatever_the_number_of_outputs(num_outputs, rows):
    """Many rows meet tiles of 128 outputs and what is left over."""
    x, q = RNG.normal(size=(rows, 16)).astype(np.float32), RNG.integers(-127, 128, (16, num_outputs)).astype(np.int8)
    found = jax.jit(lambda x, q: cpu_product(x, q, 1, inputs_first=True))(x, q)
    np.testing.assert_allclose(found, x @ q.astype(np.float32), rtol=1e-4, atol=0.05 if rows == 3 else 1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("form", ["int4", "int4 with minimum"])
@PRODUCTS
def test_partial_sums_of_groups_that_are_scaled_are_the_product(equation, kernel_shape, axis, outer, form, rows):
    """What accelerators do for few rows, in one program."""
    x = RNG.normal(size=(rows, 1, *(kernel_shape[i] for i in (*outer, axis)))).astype(np.float32)
    kernel = quantize(jnp.asarray(RNG.normal(size=kernel_shape).astype(np.float32)), like(kernel_shape, axis, form))
    expected = np.einsum(equation, x, dequantize(kernel, jnp.float32))
    found = jax.jit(_grouped_product, static_argnums=(0, 3))(equation, x, kernel, (*outer, axis))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_table(form):
    table = quantize(jnp.asarray(RNG.normal(size=(6, 8)).astype(np.float32)), like((6, 8), 1, form))
    ids = np.array([[0, 5, 2]])
    np.testing.assert_array_equal(take_rows(table, ids, jnp.float32), np.asarray(dequantize(table, jnp.float32))[ids])


def test_no_value_is_off_by_more_than_half_a_step_of_its_channel():
    x = RNG.normal(size=(64, 8)).astype(np.float32) * 10.0 ** np.arange(-4, 4, dtype=np.float32)
    x[:, 3] = 0
    found = quantize(jnp.asarray(x), like((64, 8), 0, "int8 by channel"))
    np.testing.assert_allclose(found.scale[0], np.abs(x).max(0) / 127, rtol=1e-6)
    assert (np.abs(np.asarray(dequantize(found, jnp.float32)) - x) <= np.asarray(found.scale) * 0.50001).all()
    assert np.abs(np.asarray(found.q)).max(0).tolist() == [127, 127, 127, 0, 127, 127, 127, 127]


def test_files_hold_two_values_in_a_byte():
    q = RNG.integers(-8, 8, (2, 3, 6)).astype(ml_dtypes.int4)
    packed = pack(QTensor(jnp.asarray(q), jnp.ones((2, 1, 6))))
    unsigned = q.astype(np.int8).astype(np.uint8) & 15
    np.testing.assert_array_equal(packed.q, unsigned[..., ::2] + 16 * unsigned[..., 1::2])
    assert packed.q.dtype == jnp.uint8
    again = unpack(packed)
    assert again.q.dtype == jnp.int4
    np.testing.assert_array_equal(again.q.astype(jnp.int8), q.astype(np.int8))
