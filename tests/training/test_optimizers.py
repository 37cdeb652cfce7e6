"""AdamW against optax's, Muon against numpy's Newton-Schulz on single matrices; which parameters get which."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nextllm_jax.config import Config, LoraConfig, ModelConfig, OptimizerConfig
from nextllm_jax.config.optimizer import LARGEST_DIRECTION
from nextllm_jax.errors import InputError
from nextllm_jax.model.lora import create
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.optimizers.parts import decay_mask
from tests.parameters import random_params

MODEL = ModelConfig(vocab_size=8, num_layers=1, embed_dim=4, mlp_dim=6, num_heads=2, num_kv_heads=1, head_dim=2,
                    attention_bias=True, qk_norm=True)  # fmt: skip
PARAMS = random_params(nn.meta.unbox(abstract_params(MODEL)))


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_decay_skips_norms_and_biases_and_embeddings_by_choice(decay_embeddings):
    config = OptimizerConfig(decay_embeddings=decay_embeddings)
    decays = {"kernel": True, "bias": False, "scale": False, "embedding": decay_embeddings}
    expected = jax.tree_util.tree_map_with_path(lambda path, _: decays[path[-1].key], PARAMS)
    assert decay_mask(config, MODEL, PARAMS) == expected
    boxed = decay_mask(config, MODEL, abstract_params(MODEL))
    assert jax.tree.leaves(boxed) == jax.tree.leaves(expected)
    adapters = create(LoraConfig(rank=1), abstract_params(MODEL), jax.random.key(0))
    assert not any(jax.tree.leaves(decay_mask(config, MODEL, adapters)))


def test_updates_equal_optax_adamw_with_clipping():
    config = OptimizerConfig(weight_decay=0.3, clip_norm=0.5)
    ours = make_optimizer(config, MODEL)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3, mask=lambda p: decay_mask(config, MODEL, p)),
    )
    our_params = their_params = PARAMS
    our_state, their_state = ours.init(our_params), theirs.init(their_params)
    for step in range(3):
        gradients = jax.tree.map(lambda p, step=step: jnp.sin(p * 3 + step), PARAMS)
        updates, our_state = ours.update(gradients, our_state, our_params)
        our_params = optax.apply_updates(our_params, jax.tree.map(lambda u: -0.01 * u, updates))
        updates, their_state = theirs.update(gradients, their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), our_params, their_params)


MUON = OptimizerConfig(name="muon", learning_rate=0.02, adamw_learning_rate=0.005, weight_decay=0.3, clip_norm=0.5)
STACKED = dataclasses.replace(MODEL, num_layers=3, layer_pattern=("global", "local"))  # a stack of 1 and a remainder
STACKED_PARAMS = random_params(nn.meta.unbox(abstract_params(STACKED)))


def newton_schulz(matrix):
    """Five iterations of Jordan's polynomial, which pushes all singular values to about 1."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def steps_of(config, num_steps, model=STACKED, params=STACKED_PARAMS):
    """(gradients, direction, parameters) of each of the first steps."""
    optimizer = make_optimizer(config, model)
    state, found = optimizer.init(params), []
    for step in range(num_steps):
        gradients = jax.tree.map(lambda p, step=step: jnp.sin(p * 30 + step), params)
        direction, state = jax.jit(optimizer.update)(gradients, state, params)
        found.append((gradients, direction, params))
        params = optax.apply_updates(params, jax.tree.map(lambda u: -config.learning_rate * u, direction))
    return found


MATRICES = {"q": (1, (4, 4)), "k": (1, (4, 2)), "o": (2, (4, 4)), "gate": (1, (4, 6)), "down": (1, (6, 4))}


@pytest.mark.parametrize("layer", [("layers", "block_0"), ("layers", "block_1"), ("remainder_0",)])
def test_the_direction_of_each_matrix_is_that_of_its_layer_alone(layer):
    """Kernels are stacked over layers and may have several input or output axes; Muon sees matrices."""
    steps = steps_of(MUON, 3)
    for name, (num_inputs, shape) in MATRICES.items():
        momentum = np.zeros(shape)
        for gradients, direction, params in steps:
            clip = 0.5 / float(optax.tree.norm(gradients))
            gradient, got, weight = (
                kernel(tree, layer, name).astype(np.float64).reshape(shape) for tree in (gradients, direction, params)
            )
            momentum = 0.95 * momentum + gradient * clip
            expected = newton_schulz(gradient * clip + 0.95 * momentum) * 0.2 * np.sqrt(max(shape)) + 0.3 * weight
            np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=f"{name} with {num_inputs} input axes")


def kernel(tree, layer, name):
    for step in (*layer, "attention" if name in "qkvo" else "mlp", name, "kernel"):
        tree = tree[step]
    return np.asarray(tree[0] if layer[0] == "layers" else tree)


def test_a_stack_is_orthogonalized_layer_by_layer():
    deep = dataclasses.replace(MODEL, num_layers=3)
    params = random_params(nn.meta.unbox(abstract_params(deep)))
    ((gradients, direction, _),) = steps_of(dataclasses.replace(MUON, weight_decay=0.0), 1, deep, params)
    for name, (_, shape) in MATRICES.items():
        part = "attention" if name in "qkvo" else "mlp"
        got, gradient = (tree["layers"]["block_0"][part][name]["kernel"] for tree in (direction, gradients))
        for layer in range(3):
            expected = newton_schulz(np.asarray(gradient[layer], np.float64).reshape(shape)) * 0.2 * np.sqrt(max(shape))
            np.testing.assert_allclose(got[layer].reshape(shape), expected, atol=1e-4)


def test_muon_leaves_embeddings_norms_and_biases_to_adamw_at_its_own_rate():
    adamw = dataclasses.replace(MUON, name="adamw", adamw_learning_rate=None, learning_rate=0.005)
    muon_step, adamw_step = steps_of(MUON, 1)[0], steps_of(adamw, 1)[0]

    def check(path, ours, theirs):
        if path[-1].key != "kernel":
            np.testing.assert_allclose(0.02 * ours, 0.005 * theirs, rtol=1e-5)

    jax.tree_util.tree_map_with_path(check, muon_step[1], adamw_step[1])


def test_the_first_step_is_that_of_optax_muon():
    """Up to a factor: optax scales it by the shape, in ways that depend on its version."""
    config = dataclasses.replace(MUON, weight_decay=0.0, adamw_learning_rate=None)
    ((gradients, direction, _),) = steps_of(config, 1)
    for name in ("gate", "down"):
        gradient = jnp.asarray(kernel(gradients, ("remainder_0",), name))
        theirs = optax.contrib.scale_by_muon(weight_dimension_numbers=optax.contrib.MuonDimensionNumbers())
        updates, _ = theirs.update(gradient, theirs.init(gradient))
        got = kernel(direction, ("remainder_0",), name)
        np.testing.assert_allclose(got / np.linalg.norm(got), updates / np.linalg.norm(updates), atol=1e-4)


def test_the_momentum_is_the_only_moment_of_a_matrix():
    boxed = jax.eval_shape(lambda: make_optimizer(MUON, STACKED).init(abstract_params_zeros()))
    counts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed):
        keys = [step.key for step in path if isinstance(step, jax.tree_util.DictKey)]
        if leaf.ndim:
            counts.setdefault(keys[-1], []).append("/".join(keys))
    for kind, names in counts.items():
        assert len(names) == len(set(names)) * (1 if kind == "kernel" else 2), kind


def abstract_params_zeros():
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), STACKED_PARAMS)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_directions_are_finite_and_bounded_for_every_gradient_with_a_finite_norm(name):
    """So a step can be skipped before its update is computed; see `Update.is_finite`."""
    config = OptimizerConfig(name=name, clip_norm=float("inf"), weight_decay=0.0)
    optimizer = make_optimizer(config, MODEL)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for scale in (1e17, 0.0, 1e-30, 1e-45, 1e17, 1e-20, 0.0):
        gradients = jax.tree.map(lambda p, scale=scale: jnp.sign(p) * scale, PARAMS)
        assert np.isfinite(optax.tree.norm(gradients))
        direction, state = update(gradients, state, PARAMS)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(direction)) < LARGEST_DIRECTION


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adamw_learning_rate": 0.1}, r"optimizer\.adamw_learning_rate .*optimizer\.name muon"),
        ({"name": "muon", "adamw_learning_rate": 0.0}, r"optimizer\.adamw_learning_rate is 0.0"),
        ({"name": "lion"}, r"optimizer\.name is 'lion'"),
        ({"eps": 1e-35}, r"optimizer\.eps 1e-35"),
        ({"weight_decay": float("inf")}, r"optimizer\.weight_decay is inf"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**change)


def test_muon_refuses_adapters():
    with pytest.raises(InputError, match=r"lora\.rank is 4.*optimizer\.name"):
        Config(init_from="runs/x", lora=LoraConfig(rank=4), optimizer=OptimizerConfig(name="muon"))
