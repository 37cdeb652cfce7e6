"""Grouped products against a loop over assignments in float64, values and gradients, and their FLOPs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.ops import megablox
from nextllm_jax.ops.grouped import arrange, block_rows, collect, grouped_product, num_rows, spread, tile_rows
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


def loop(x, kernel, weights, experts):
    """sum of `weights` times the outputs of each token, and its gradients: (value, d x, d kernel)."""
    value, d_x, d_kernel = 0.0, np.zeros_like(x), np.zeros_like(kernel)
    for token, chosen in enumerate(experts):
        for expert in chosen[chosen < len(kernel)]:
            value += weights[token] @ (x[token] @ kernel[expert])
            d_x[token] += kernel[expert] @ weights[token]
            d_kernel[expert] += np.outer(x[token], weights[token])
    return value, d_x, d_kernel


def summed(x, kernel, weights, experts, num_experts, product=grouped_product):
    groups = arrange(jnp.asarray(experts.reshape(-1), jnp.int32), num_experts)
    return jnp.sum(collect(product(spread(x, groups), kernel, groups), groups, len(x)) * weights)


@pytest.mark.parametrize("name", LOADS)
def test_values_and_gradients_equal_a_loop_over_assignments(name):
    E, experts = LOADS[name]
    x, kernel, weights = (RNG.normal(size=shape) for shape in ((len(experts), 6), (E, 6, 5), (len(experts), 5)))
    wanted = loop(x, kernel, weights, experts)
    found = functools.partial(summed, experts=experts, num_experts=E)
    arguments = (np.float32(each) for each in (x, kernel, weights))
    value, gradients = jax.jit(jax.value_and_grad(found, argnums=(0, 1)))(*arguments)
    for mine, other in zip((value, *gradients), wanted, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4 * max(1, np.abs(other).max()))


def test_rows_of_an_expert_are_whole_blocks_and_no_assignment_is_lost():
    E, experts = LOADS["uneven"]
    groups = arrange(jnp.asarray(experts.reshape(-1), jnp.int32), E)
    R = block_rows(experts.size, E)
    assert R == 16
    assert (np.asarray(groups.rows_E) % R == 0).all()
    np.testing.assert_array_equal(groups.assignment_P[groups.row_A], np.arange(experts.size))
    first_E = np.cumsum(groups.rows_E) - groups.rows_E
    expert_P = np.repeat(np.arange(E), groups.rows_E)
    np.testing.assert_array_equal(expert_P[groups.row_A], experts.reshape(-1))
    assert first_E[0] == 0


@pytest.mark.parametrize(("tokens", "chosen", "E"), [(4096, 8, 64), (4096, 2, 8), (32, 8, 128), (1, 8, 128)])
def test_blocks_are_padded_by_at_most_a_quarter_of_equal_loads(tokens, chosen, E):
    A = tokens * chosen
    R = block_rows(A, E)
    assert min(A, E) * R / 2 <= (A / 4 if A >= 2 * E else A)  # half a block is padding, on average
    assert tile_rows(A, E) % R == 0
    assert arrange(jnp.zeros(A, jnp.int32), E).assignment_P.shape[0] % tile_rows(A, E) == 0


def test_a_program_multiplies_each_row_with_one_matrix_in_both_passes():
    """`jax.lax.ragged_dot` multiplies with all E matrices on a CPU. The compiler counts the body of a loop once."""
    E, I, O, tokens = 16, 32, 48, 512  # noqa: E741
    experts = RNG.integers(0, E, (tokens, 2))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, I), (E, I, O), (tokens, O))]
    found = functools.partial(summed, experts=experts, num_experts=E)
    compiled = jax.jit(jax.grad(found, argnums=(0, 1))).lower(*shapes).compile()
    R = block_rows(2 * tokens, E)
    dots = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", compiled.as_text() or "")
    assert sorted(dots) == sorted([f"{R},{I}", f"{I},{O}"])  # the gradients; the value itself is not needed
    blocks = int(arrange(jnp.asarray(experts.reshape(-1), jnp.int32), E).rows_E.sum()) // R
    assert blocks * R <= 1.5 * 2 * tokens
    assert (compiled.cost_analysis() or {})["flops"] < 2 * 2 * R * I * O + 100 * 2 * tokens * max(E, O)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_matrices_are_multiplied_as_their_values(scheme):
    E, experts = LOADS["uneven"]
    x, kernel, weights = (RNG.normal(size=shape) for shape in ((len(experts), 8), (E, 8, 6), (len(experts), 6)))
    like = QTensor(jnp.zeros((E, 8, 6), scheme), jnp.zeros((E, 1 if scheme == "int8" else 2, 6)))
    quantized = quantize(jnp.asarray(kernel, jnp.float32), like)
    wanted = loop(x, np.asarray(dequantize(quantized, jnp.float32), np.float64), weights, experts)
    found = functools.partial(summed, experts=experts, num_experts=E)
    arguments = np.float32(x), quantized, np.float32(weights)
    value, d_x = jax.jit(jax.value_and_grad(found))(*arguments)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-4)
    np.testing.assert_allclose(d_x, wanted[1], atol=1e-4)


@pytest.mark.parametrize("name", ["uneven", "some choices are dropped", "large blocks"])
def test_megablox_equals_the_loop_in_its_interpreter(name):
    E, experts = LOADS[name]
    groups = arrange(jnp.asarray(experts.reshape(-1), jnp.int32), E)
    P, I, O = len(groups.assignment_P), 24, 40  # noqa: E741
    x, kernel, d_y = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((P, I), (E, I, O), (P, O)))
    wanted, pull = jax.vjp(lambda x, kernel: grouped_product(x, kernel, groups), x, kernel)
    used = int(groups.rows_E.sum())
    d_y = d_y.at[used:].set(0)
    d_x, d_kernel = pull(d_y)
    arguments = {"rows_E": groups.rows_E, "tile_rows": tile_rows(experts.size, E), "interpret": True}
    found = megablox.product(x, kernel, **arguments, transposed=False)
    np.testing.assert_allclose(found[:used], wanted[:used], atol=1e-4)
    found = megablox.product(d_y, kernel, **arguments, transposed=True)
    np.testing.assert_allclose(found[:used], d_x[:used], atol=1e-4)
    np.testing.assert_allclose(megablox.kernel_gradient(x, d_y, **arguments), d_kernel, atol=1e-3)


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


@pytest.mark.tpu
def test_tpus_multiply_by_megablox_with_little_memory(four_tpus):
    """Both gradients of the product are kernels, and need no copy of the matrices."""
    E, I, O, tokens = 8, 256, 384, 1024  # noqa: E741
    experts = RNG.integers(0, E, (tokens, 2))
    place = jax.sharding.SingleDeviceSharding(four_tpus[0])
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in (((tokens, I), jnp.bfloat16), ((E, I, O), jnp.bfloat16), ((tokens, O), jnp.float32))
    ]
    found = functools.partial(summed, experts=experts, num_experts=E)
    with jax.default_matmul_precision("default"):
        compiled = jax.jit(jax.value_and_grad(found, argnums=(0, 1))).lower(*shapes).compile()
    text = compiled.as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    memory = compiled.memory_analysis()
    rows = num_rows(2 * tokens, E)
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 2 * rows * (I + O)
