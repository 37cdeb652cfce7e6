import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nextllm_jax.config import LoraConfig, ModelConfig, OptimizerConfig
from nextllm_jax.model.lora import create
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.training.optimizer import decay_mask, describe_warmup, make_optimizer, schedule
from tests import reference


def rates(steps=100, **settings):
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, **settings), steps)
    return np.array([rate(step) for step in range(steps)])


def test_cosine_warms_up_from_the_first_step_and_ends_at_the_final_rate():
    got = rates(final_learning_rate_fraction=0.1)
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-6)
    progress = np.arange(90) / 89
    np.testing.assert_allclose(got[10:], 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-5)


def test_linear_constant_and_wsd():
    np.testing.assert_allclose(rates(schedule="linear", final_learning_rate_fraction=0.0)[10:], 1 - np.arange(90) / 89,
                               atol=1e-6)  # fmt: skip
    np.testing.assert_allclose(rates(schedule="constant")[10:], 1.0)
    wsd = rates(schedule="wsd", decay_steps_fraction=0.2, final_learning_rate_fraction=0.0)
    np.testing.assert_allclose(wsd[10:80], 1.0)
    assert np.all(np.diff(wsd[80:]) < 0)
    assert wsd[-1] == pytest.approx(0, abs=1e-6)


def rates_and_beyond(config, steps):
    """The rates of a schedule's steps, and those of some later steps."""
    later = steps + np.array([0, 1, steps, 10 * steps])
    return np.split(np.array(jax.vmap(schedule(config, steps))(np.r_[:steps, later])), [steps])


@pytest.mark.parametrize(
    ("kind", "fraction"),
    [("cosine", 0.2), ("linear", 0.2), ("constant", 0.2), ("wsd", 0.0), ("wsd", 0.2), ("wsd", 0.6), ("wsd", 1.0)],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_schedule_rises_stays_and_falls_to_the_final_rate_at_its_last_step(kind, fraction, steps):
    for asked in (0, 1, 2, 4, 9):
        config = OptimizerConfig(schedule=kind, learning_rate=1.0, warmup_steps=asked, decay_steps_fraction=fraction)
        warmup = config.warmup_length(steps)
        got, beyond = rates_and_beyond(config, steps)
        final = 1.0 if kind == "constant" else np.float32(0.1)
        assert {got[-1], *beyond} == {final}, warmup
        if steps > 1:
            assert got.max() == 1, warmup
        np.testing.assert_allclose(got[:warmup], np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
        assert np.all(np.diff(got[max(warmup - 1, 0) :]) <= 0), warmup
        if kind == "wsd":
            falling = np.flatnonzero(got[warmup:] < 1) + warmup
            assert len(falling) == max(min(round(steps * fraction), steps - warmup - 1), 1), warmup
            np.testing.assert_allclose(np.diff(got[falling]), -0.9 / len(falling), atol=1e-6)


def test_schedule_steps_fixes_the_past_when_a_run_is_extended():
    config = OptimizerConfig(warmup_steps=5, schedule_steps=50)
    short, extended = schedule(config, 50), schedule(config, 80)
    assert [float(short(s)) for s in range(50)] == [float(extended(s)) for s in range(50)]


@pytest.mark.parametrize(
    ("settings", "steps", "warmup"),
    [
        ({"warmup_steps": 50}, 20, 10),
        ({"warmup_steps": 50}, 100, 50),
        ({"warmup_steps": 50}, 99, 49),
        ({"warmup_steps": 50}, 1, 0),
        ({"warmup_steps": 50, "schedule_steps": 30}, 500, 15),
        ({"warmup_steps": 50, "schedule_steps": 500}, 20, 50),
        ({"warmup_steps": 0}, 20, 0),
    ],
)
def test_the_warmup_takes_at_most_half_of_the_schedule_and_says_so(settings, steps, warmup):
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", **settings)
    assert config.warmup_length(steps) == warmup
    rates = np.array(jax.vmap(schedule(config, steps))(np.arange(warmup + 2)))
    np.testing.assert_allclose(rates[:warmup], np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
    assert rates[warmup + 1] < 1
    said = describe_warmup(config, steps)
    assert (said is None) == (warmup == config.warmup_steps)
    assert said is None or said.startswith(f"warming up for {warmup} steps instead of optimizer.warmup_steps 50")


MODEL = ModelConfig(vocab_size=8, num_layers=1, embed_dim=4, mlp_dim=6, num_heads=2, num_kv_heads=1, head_dim=2,
                    attention_bias=True, qk_norm=True)  # fmt: skip
PARAMS = reference.random_params(nn.meta.unbox(abstract_params(MODEL)))


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
