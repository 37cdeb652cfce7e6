"""Functions of an expert's rows against a loop over assignments in float64, values and gradients, and their FLOPs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.ops import megablox
from nextllm_jax.ops.grouped import apply_experts, arrange, block_rows, num_rows, tile_rows
from nextllm_jax.ops.quantized import QTensor, dequantize, quantize
from nextllm_jax.ops.routing import Choice, choose, probabilities, within_capacity

RNG = np.random.default_rng(0)
LOADS = {  # the experts of each token; E stands for none
    "uneven": (4, np.minimum(RNG.integers(0, 10, (96, 2)), 3)),
    "empty experts": (16, RNG.integers(5, 8, (50, 3))),
    "a single expert": (4, np.full((64, 2), 2)),
    "some choices are dropped": (4, RNG.integers(0, 5, (64, 2))),
    "all choices are dropped": (4, np.full((8, 2), 4)),
    "one token": (32, np.array([[7, 30]])),
    "large blocks": (2, RNG.integers(0, 2, (1100, 1))),
}


def mlp(product, x, weight, matrices):
    a, b = matrices
    return product((jnp.tanh(product(x, a)) * weight).astype(x.dtype), b)


def summed(x, weight, a, b, d_y, experts, function=mlp):
    groups = arrange(jnp.asarray(experts.reshape(-1), jnp.int32), a.shape[0])
    return jnp.sum(apply_experts(function, x, weight.reshape(-1, 1), [a, b], groups) * d_y)


def loop(x, weight, a, b, d_y, experts):
    """The same in numpy, and the gradients of the first four arguments."""
    value, gradients = 0.0, [np.zeros_like(each) for each in (x, weight, a, b)]
    d_x, d_weight, d_a, d_b = gradients
    for token, k in np.argwhere(experts < len(a)):
        expert = experts[token, k]
        inner = np.tanh(x[token] @ a[expert])
        value += d_y[token] @ (inner * weight[token, k] @ b[expert])
        d_inner = b[expert] @ d_y[token]
        d_weight[token, k] = d_inner @ inner
        d_b[expert] += np.outer(inner * weight[token, k], d_y[token])
        d_before = d_inner * weight[token, k] * (1 - inner**2)
        d_x[token] += a[expert] @ d_before
        d_a[expert] += np.outer(x[token], d_before)
    return value, gradients


def drawn(E, experts, D=6, I=5):  # noqa: E741
    shapes = (len(experts), D), experts.shape, (E, D, I), (E, I, D), (len(experts), D)
    return [RNG.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize("name", LOADS)
def test_values_and_gradients_equal_a_loop_over_assignments(name):
    E, experts = LOADS[name]
    arguments = drawn(E, experts)
    wanted, wanted_gradients = loop(*arguments, experts)
    found = jax.jit(jax.value_and_grad(functools.partial(summed, experts=experts), argnums=(0, 1, 2, 3)))
    value, gradients = found(*(np.float32(each) for each in arguments))
    for mine, other in zip((value, *gradients), (wanted, *wanted_gradients), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4 * max(1, np.abs(other).max()))


@pytest.mark.parametrize("name", LOADS)
def test_the_rows_of_an_expert_follow_each_other_and_no_assignment_is_lost(name):
    E, experts = LOADS[name]
    groups = arrange(jnp.asarray(experts.reshape(-1), jnp.int32), E)
    to_expert = experts.reshape(-1) < E
    rows = np.asarray(groups.row_A)[to_expert]
    assert sorted(rows) == list(range(to_expert.sum())) == list(range(int(groups.rows_E.sum())))
    np.testing.assert_array_equal(groups.assignment_P[rows], np.flatnonzero(to_expert))
    np.testing.assert_array_equal(np.repeat(np.arange(E), groups.rows_E)[rows], experts.reshape(-1)[to_expert])
    assert len(groups.assignment_P) % tile_rows(experts.size) == 0


@pytest.mark.parametrize(("tokens", "chosen", "E"), [(1024, 8, 64), (2048, 2, 8), (32, 8, 128), (1, 8, 128)])
def test_blocks_have_few_rows_beyond_those_of_their_expert(tokens, chosen, E):
    experts = np.argsort(RNG.random((tokens, E)), axis=1)[:, :chosen]
    multiplied = []

    def counting(product, x, weight, matrices):
        jax.debug.callback(lambda: multiplied.append(len(x)))
        return mlp(product, x, weight, matrices)

    arguments = [np.float32(each) for each in drawn(E, experts, D=2, I=2)]
    jax.block_until_ready(jax.jit(functools.partial(summed, experts=experts, function=counting))(*arguments))
    jax.effects_barrier()
    assert experts.size <= sum(multiplied) <= 1.25 * experts.size
    assert set(multiplied) <= set(block_rows(experts.size, E))


def test_a_program_multiplies_each_row_with_one_matrix_in_both_passes():
    """`jax.lax.ragged_dot` multiplies with all E matrices on a CPU."""
    E, I, D, tokens = 16, 32, 48, 512  # noqa: E741
    experts = RNG.integers(0, E, (tokens, 2))
    found = jax.grad(functools.partial(summed, experts=experts), argnums=(0, 1, 2, 3))
    compiled = jax.jit(found).lower(*(np.float32(each) for each in drawn(E, experts, D, I))).compile()
    dots = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", compiled.as_text() or "")
    # Per size of block: the inner values again, their gradients, and those of rows and matrices.
    blocks = [f"{R},{width}" for R in block_rows(2 * tokens, E) for width in (I, I, D)]
    assert sorted(dots) == sorted([*blocks, *2 * [f"{D},{I}", f"{I},{D}"]])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_matrices_are_multiplied_as_their_values(scheme):
    E, experts = LOADS["uneven"]
    x, weight, *kernels, d_y = drawn(E, experts, 8, 6)
    quantized = []
    for kernel in kernels:
        groups = 1 if scheme == "int8" else 2
        like = QTensor(jnp.zeros(kernel.shape, scheme), jnp.zeros((E, groups, kernel.shape[2])))
        quantized.append(quantize(jnp.asarray(kernel, jnp.float32), like))
    values = (np.asarray(dequantize(kernel, jnp.float32), np.float64) for kernel in quantized)
    wanted, wanted_gradients = loop(x, weight, *values, d_y, experts)
    found = jax.jit(jax.value_and_grad(functools.partial(summed, experts=experts), argnums=(0, 1)))
    value, gradients = found(np.float32(x), np.float32(weight), *quantized, np.float32(d_y))
    np.testing.assert_allclose(value, wanted, rtol=1e-4)
    for mine, other in zip(gradients, wanted_gradients, strict=False):
        np.testing.assert_allclose(mine, other, atol=1e-4)


@pytest.mark.parametrize("name", ["uneven", "empty experts", "some choices are dropped", "large blocks"])
def test_megablox_equals_a_loop_over_experts_in_its_interpreter(name):
    E, experts = LOADS[name]
    rows_E = np.bincount(experts.reshape(-1), minlength=E)[:E]
    P, I, O = num_rows(experts.size), 24, 40  # noqa: E741
    x, kernel, d_y = (np.float32(RNG.normal(size=shape)) for shape in ((P, I), (E, I, O), (P, O)))
    tile = tile_rows(experts.size)
    found, pull = jax.vjp(lambda x, kernel: megablox.product(x, kernel, jnp.asarray(rows_E), tile, True), x, kernel)
    d_x, d_kernel = pull(d_y)
    end_E = np.cumsum(rows_E)
    for expert, end in enumerate(end_E):
        rows = slice(end - rows_E[expert], end)
        np.testing.assert_allclose(found[rows], x[rows] @ kernel[expert], atol=1e-4)
        np.testing.assert_allclose(d_x[rows], d_y[rows] @ kernel[expert].T, atol=1e-4)
        np.testing.assert_allclose(d_kernel[expert], x[rows].T @ d_y[rows], atol=1e-3)


def test_a_bias_changes_the_choice_but_not_the_weights():
    scores = probabilities(jnp.asarray([[[2.0, 1.0, 0.0, -1.0]]]), "sigmoid")
    plain = choose(scores, None, 2, normalize=False, scale=2.5)
    biased = choose(scores, jnp.asarray([0.0, -1.0, 0.0, 0.0]), 2, normalize=False, scale=2.5)
    assert plain.expert_BTK.tolist() == [[[0, 1]]]
    assert biased.expert_BTK.tolist() == [[[0, 2]]]
    np.testing.assert_allclose(biased.weight_BTK, 2.5 * scores[..., jnp.array([0, 2])])


def test_an_expert_takes_the_first_tokens_of_a_sequence_up_to_its_capacity():
    experts = jnp.asarray([[[0, 1], [0, 2], [0, 1], [2, 1]], [[3, 0], [3, 0], [1, 0], [1, 0]]])
    limited = within_capacity(Choice(experts, jnp.ones(experts.shape)), 4, 1.0)  # 2 tokens of each sequence
    assert limited.expert_BTK.tolist() == [[[0, 1], [0, 2], [4, 1], [2, 4]], [[3, 0], [3, 0], [1, 4], [1, 4]]]


@pytest.mark.parametrize("factor", [1e30, float("inf")])
def test_a_huge_capacity_drops_nothing(factor):
    """Such a factor overflowed int32, and an infinite one has no integer."""
    experts = jnp.asarray([[[0], [0], [1]]])
    limited = within_capacity(Choice(experts, jnp.ones(experts.shape)), 4, factor)
    np.testing.assert_array_equal(limited.expert_BTK, experts)


@pytest.mark.tpu
def test_tpus_multiply_by_megablox_with_little_memory(four_tpus):
    """All products and their gradients are kernels, and need no copy of the matrices."""
    E, I, D, tokens = 8, 256, 384, 1024  # noqa: E741
    experts = RNG.integers(0, E, (tokens, 2))
    place = jax.sharding.SingleDeviceSharding(four_tpus[0])
    types = jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32
    shapes = [
        jax.ShapeDtypeStruct(each.shape, dtype, sharding=place)
        for each, dtype in zip(drawn(E, experts, D, I), types, strict=True)
    ]
    found = jax.value_and_grad(functools.partial(summed, experts=experts), argnums=(0, 1, 2, 3))
    with jax.default_matmul_precision("default"):
        compiled = jax.jit(found).lower(*shapes).compile()
    text = compiled.as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 2 + 5  # the inner values are computed twice
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 2 * num_rows(2 * tokens) * (I + D)
