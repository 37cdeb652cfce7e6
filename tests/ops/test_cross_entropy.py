"""The chunked loss against optax on whole logits: values, gradients, memory and collectives."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nextllm_jax.ops.cross_entropy import Layout, cross_entropy


def plain(hidden_BTD, head_VD, targets_BT, mask_BT, logit_divisor=1.0, soft_cap=None):
    logits = jnp.einsum("BTD,VD->BTV", hidden_BTD.astype(jnp.float32), head_VD.astype(jnp.float32)) / logit_divisor
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets_BT) * mask_BT)


def inputs(B=3, T=37, D=16, V=50, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, size=(B, T)), jnp.int32)
    return hidden, head, targets, jnp.asarray(rng.random((B, T)) < 0.7)


def value_and_gradients(loss, hidden, head, targets, mask):
    """Of a mean, so that the cotangent of the sum is not 1."""
    mean = lambda hidden, head: loss(hidden, head, targets, mask) / 7.0  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(hidden, head)
    return value, *gradients


@pytest.mark.parametrize("chunk_tokens", [1, 30, 10_000])
def test_values_and_gradients_equal_optax_for_any_chunk(chunk_tokens):
    arguments = inputs()
    chunked = lambda *args: cross_entropy(*args, chunk_tokens=chunk_tokens)  # noqa: E731
    ours, expected = value_and_gradients(chunked, *arguments), value_and_gradients(plain, *arguments)
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(chunked)(*arguments) / 7.0, ours[0], rtol=1e-6)


@pytest.mark.parametrize("finish", [{"logit_divisor": 3.0}, {"soft_cap": 4.0}, {"logit_divisor": 0.5, "soft_cap": 5.0}])
def test_divided_and_bounded_logits_equal_optax(finish):
    arguments = inputs()
    chunked = lambda *args: cross_entropy(*args, chunk_tokens=30, **finish)  # noqa: E731
    ours = value_and_gradients(chunked, *arguments)
    expected = value_and_gradients(functools.partial(plain, **finish), *arguments)
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_normalizes_and_sums_the_head_gradient_in_float32():
    hidden, head, targets, mask = inputs(T=200, V=300, dtype=jnp.bfloat16)
    head = head.astype(jnp.bfloat16).astype(jnp.float32)
    ours = value_and_gradients(cross_entropy, hidden, head, targets, mask)
    expected = value_and_gradients(plain, hidden, head, targets, mask)
    assert [x.dtype for x in ours] == [jnp.float32, jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    for mine, other in zip(ours[1:], expected[1:], strict=True):
        error = np.linalg.norm(np.asarray(mine, np.float32) - np.asarray(other, np.float32))
        assert error < 4e-3 * np.linalg.norm(np.asarray(other, np.float32))


def test_large_logits_stay_finite():
    hidden, head, targets, mask = inputs()
    ours = value_and_gradients(cross_entropy, hidden * 1e3, head, targets, mask)
    expected = value_and_gradients(plain, hidden * 1e3, head, targets, mask)
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-3)


def test_masked_tokens_leave_no_trace():
    hidden, head, targets, mask = inputs()
    mask = mask.at[1].set(False)
    _, d_hidden, _ = ours = value_and_gradients(cross_entropy, hidden, head, targets, mask)
    assert (d_hidden[~mask] == 0).all()
    other = value_and_gradients(cross_entropy, hidden.at[1].set(5.0), head, targets.at[1].set(0), mask)
    for mine, changed in zip(ours, other, strict=True):
        np.testing.assert_array_equal(mine, changed)


def test_memory_at_a_large_vocabulary_is_a_fraction_of_the_plain_loss():
    B, T, D, V = 2, 1024, 64, 128_256
    shapes = [jax.ShapeDtypeStruct(*x) for x in (((B, T, D), jnp.float32), ((V, D), jnp.float32))]
    targets, mask = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), jnp.bool_)

    def temporary_bytes(loss):
        gradients = jax.grad(lambda hidden, head: loss(hidden, head, targets, mask), argnums=(0, 1))
        memory = jax.jit(gradients).lower(*shapes).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes(plain) > B * T * V * 4
    assert temporary_bytes(functools.partial(cross_entropy, chunk_tokens=512)) < 0.4 * B * T * V * 4


def collectives(compiled) -> tuple[list[str], list[str]]:
    """Result shapes of the collectives (outside, inside) loops of a compiled program."""
    outside, inside = [], []
    pattern = r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for line in compiled.as_text().splitlines():
        found = re.search(pattern, line)
        if found:
            (inside if "while" in line.split("op_name=")[-1] else outside).append(found[1])
    return outside, inside


LAYOUT = Layout(("data", "fsdp"), ("sequence",), ("tensor",), ("fsdp",))


@pytest.mark.parametrize("vocab_size", [320, 48])  # more rows than tokens that share them, and fewer
@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 8, 1, 1), (1, 1, 4, 2)])
def test_divided_over_devices_it_is_the_same_and_reduces_the_head_gradient_once(shape, vocab_size):
    D = 32
    arguments = inputs(B=16, T=24, D=D, V=vocab_size)
    options = {"chunk_tokens": 32, "logit_divisor": 1.5, "soft_cap": 9.0}
    expected = value_and_gradients(functools.partial(plain, logit_divisor=1.5, soft_cap=9.0), *arguments)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "sequence", "tensor"), axis_types=(AxisType.Auto,) * 4)
    tokens, head = PartitionSpec(("data", "fsdp"), "sequence"), PartitionSpec("tensor", "fsdp")
    layout = [NamedSharding(mesh, spec) for spec in (tokens, head, tokens, tokens)]

    def mean(hidden, head, targets, mask):
        return cross_entropy(hidden, head, targets, mask, layout=LAYOUT, **options) / 7.0

    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x, sharding in zip(arguments, layout, strict=True)]
        step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)), out_shardings=(None, tuple(layout[:2])))
        compiled = step.lower(*placed).compile()
        value, gradients = compiled(*placed)
        np.testing.assert_allclose(jax.jit(mean)(*placed), expected[0], rtol=1e-5)
    for mine, other in zip((value, *gradients), expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)

    data, fsdp, sequence, tensor = shape
    outside, inside = collectives(compiled)
    head_sizes = {vocab_size * D // parts for parts in (tensor, tensor * fsdp)}
    # Chunks exchange tokens and what belongs to them; the head and its gradient travel outside of the loop, once each.
    assert not (inside and tensor == 1 and (fsdp == 1 or vocab_size == 48))
    assert all(sizes(line)[0] <= 32 * D for line in inside)
    travels = sum(max(sizes(line)) in head_sizes for line in outside)
    assert travels <= (2 * (fsdp > 1)) + (data * sequence > 1)


@pytest.mark.parametrize("axis", range(4))
def test_bfloat16_is_summed_over_one_axis_of_a_mesh(axis):
    """The tokens outnumber the vocabulary, so the head's gradient is summed over each axis that divides tokens."""
    mesh = jax.make_mesh(
        tuple(2 if i == axis else 1 for i in range(4)),
        ("data", "fsdp", "sequence", "tensor"),
        axis_types=(AxisType.Auto,) * 4,
        devices=jax.devices()[:2],
    )
    arguments = inputs(B=4, T=24, D=32, V=48, dtype=jnp.bfloat16)
    with jax.set_mesh(mesh):
        ours = value_and_gradients(functools.partial(cross_entropy, layout=LAYOUT), *arguments)
    for mine, alone in zip(ours, value_and_gradients(cross_entropy, *arguments), strict=True):
        mine, alone = np.asarray(mine, np.float32), np.asarray(alone, np.float32)
        assert np.linalg.norm(mine - alone) < 0.01 * np.linalg.norm(alone)


def sizes(shapes: str) -> list[int]:
    """Elements of the arrays in the result type of an HLO instruction."""
    return [math.prod(map(int, dims.split(","))) if dims else 1 for dims in re.findall(r"\w\d+\[([\d,]*)\]", shapes)]


def test_an_axis_that_divides_the_head_but_no_tokens_is_refused():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="sharded over"):
        cross_entropy(*inputs(V=48), layout=Layout(embed=("fsdp",)))
