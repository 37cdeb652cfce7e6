"""GPTQ against the formulas of its paper in float64 numpy, where each step inverts the Hessian that is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.ops.gptq import quantize_for_inputs
from nextllm_jax.ops.quantized import QTensor, dequantize, fit, quantize

INPUTS, OUTPUTS, GROUP = 24, 5, 8


def abstract(shape, *, group, symmetric):
    scale = jax.ShapeDtypeStruct((shape[0] // group, *shape[1:]), jnp.float16)
    return QTensor(jax.ShapeDtypeStruct(shape, jnp.int4), scale, None if symmetric else scale)


def by_the_paper(w, hessian, like):
    """Rounds one input, then moves all that are left to where they make up for it best."""
    w, hessian = w.astype(np.float64), hessian.astype(np.float64)
    importance = np.diag(hessian)
    hessian = hessian + 0.01 * importance.mean() * np.eye(len(w))
    values = np.zeros_like(w)
    for i in range(len(w)):
        if i % GROUP == 0:
            rows = jnp.asarray(w[i : i + GROUP], jnp.float32)
            scale, minimum = fit(rows, like, (0,), jnp.asarray(importance[i : i + GROUP, None], jnp.float32))
            scale = np.asarray(scale[0], np.float64)
            least = 0.0 if minimum is None else np.asarray(minimum[0], np.float64) + 8 * scale
        values[i] = np.clip(np.round((w[i] - least) / scale), -8, 7) * scale + least
        inverse = np.linalg.inv(hessian[i:, i:])
        w[i:] -= np.outer(inverse[0] / inverse[0, 0], w[i] - values[i])
    return values


@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_the_formulas_of_the_paper(symmetric):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, INPUTS)) @ rng.normal(size=(INPUTS, INPUTS))
    w = rng.normal(size=(INPUTS, OUTPUTS))
    hessian = (x.T @ x).astype(np.float32)
    like = abstract((INPUTS, OUTPUTS), group=GROUP, symmetric=symmetric)
    found = quantize_for_inputs(jnp.asarray(w, jnp.float32), jnp.asarray(hessian), like)
    assert (found.q.shape, found.q.dtype, found.scale.dtype) == (like.q.shape, jnp.int4, jnp.float16)
    values = np.asarray(dequantize(found, jnp.float32))
    np.testing.assert_allclose(values, by_the_paper(w, hessian, like), atol=1e-2)
    alone = dequantize(quantize(jnp.asarray(w, jnp.float32), like), jnp.float32)
    assert np.linalg.norm(x @ (values - w)) < 0.8 * np.linalg.norm(x @ (np.asarray(alone) - w))


def test_several_input_and_output_axes_are_one_of_each():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(100, INPUTS)).astype(np.float32)
    w = rng.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    flat = quantize_for_inputs(w, x.T @ x, abstract((INPUTS, OUTPUTS), group=GROUP, symmetric=False))
    scale = jax.ShapeDtypeStruct((3, 1, OUTPUTS), jnp.float16)
    like = QTensor(jax.ShapeDtypeStruct((3, 8, OUTPUTS), jnp.int4), scale, scale)
    heads = quantize_for_inputs(w.reshape(3, 8, OUTPUTS), x.T @ x, like)
    for ours, theirs in zip(jax.tree.leaves(heads), jax.tree.leaves(flat), strict=True):
        np.testing.assert_array_equal(np.asarray(ours).ravel(), np.asarray(theirs).ravel())


def test_inputs_that_are_always_zero_do_not_matter():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(100, INPUTS)).astype(np.float32)
    x[:, 3] = 0
    w = rng.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    found = quantize_for_inputs(w, x.T @ x, abstract((INPUTS, OUTPUTS), group=GROUP, symmetric=False))
    assert np.isfinite(np.asarray(dequantize(found, jnp.float32))).all()
