"""Adapters against the same model with their product written into its weights, in numpy; and what is trained."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import Config, DataConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from nextllm_jax.diagnostics.diagnosis import diagnose
from nextllm_jax.model import lora
from nextllm_jax.model.accounting import adapter_count, frozen_bytes
from nextllm_jax.model.objective import make_eval_step, next_token
from nextllm_jax.model.quantize import convert
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.sharding import MESH_AXES, make_mesh, on_device, placed, sharding
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.schedule import schedule
from nextllm_jax.training.state import TrainState, abstract_state, shardings_of, state_from, whole_params
from nextllm_jax.training.step import make_train_step, mean_gradient
from tests.parameters import random_params
from tests.training.test_step import make_batch

CONFIG = ModelConfig(
    vocab_size=64, num_layers=3, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=4, head_dim=8, context_length=16,
    layer_pattern=("global", "local"), sliding_window=5, tie_embeddings=False, attention_bias=True, dtype="float32",
)  # fmt: skip
ALL = LoraConfig(rank=3, alpha=12.0)
SOME = LoraConfig(rank=2, alpha=1.0, targets=("o", "down"))
DATA = DataConfig(sequence_length=16, tokenizer="gpt2")
OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup_steps=1, weight_decay=0.0)
EQUATIONS = {"o": "NHR,RD->NHD", "q": "DR,RNH->DNH", "k": "DR,RNH->DNH", "v": "DR,RNH->DNH"}


def base_params():
    return random_params(nn.meta.unbox(abstract_params(CONFIG)))


def random_adapters(config):
    boxed = abstract_params(CONFIG)
    tree = nn.meta.unbox(lora.create(config, boxed, jax.random.key(1)))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), tree)


def frozen_on(config, params):
    boxed = abstract_params(CONFIG)
    wanted = lora.abstract_frozen(config, boxed, on_device(boxed, jax.devices()[0]))
    return lora.Frozen(jax.tree.map(convert, params, wanted), config.alpha / config.rank)


def merged_by_hand(config, params, adapters):
    """W + alpha / rank * A @ B of every adapted matrix, layer by layer."""
    params = jax.tree.map(np.copy, params)
    for block, stacked in ((("layers", "block_0"), True), (("layers", "block_1"), True), (("remainder_0",), False)):
        weights, low = params, adapters
        for name in block:
            weights, low = weights[name], low[name]
        for part in low:
            for module, pair in low[part].items():
                kernel = weights[part][module]["kernel"]
                for layer in range(len(kernel)) if stacked else [...]:
                    equation = EQUATIONS.get(module, "IR,RF->IF")
                    delta = np.einsum(equation, pair["a"][layer], pair["b"][layer])
                    kernel[layer] += np.float32(config.alpha / config.rank) * delta
    return params


APPLY = jax.jit(Transformer(CONFIG).apply)


def apply(variables, batch):
    return np.asarray(APPLY(variables, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)[0])


@pytest.mark.parametrize("config", [ALL, SOME], ids=["all", "some"])
def test_adapters_compute_what_the_merged_weights_do(config):
    params, adapters, batch = base_params(), random_adapters(config), make_batch()
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == adapter_count(CONFIG, config)
    frozen = frozen_on(config, params)
    by_hand = merged_by_hand(config, params, adapters)
    found = apply(lora.variables(adapters, frozen), batch)
    np.testing.assert_allclose(found, apply({"params": by_hand}, batch), rtol=2e-5, atol=2e-5)
    assert np.abs(found - apply({"params": params}, batch)).max() > 0.05
    merged = lora.merge(abstract_params(CONFIG), adapters, frozen, jnp.float32)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, by_hand)


def test_new_adapters_change_nothing_and_alone_have_gradients():
    params, batch = base_params(), make_batch()
    adapters = nn.meta.unbox(lora.create(ALL, abstract_params(CONFIG), jax.random.key(0)))
    frozen = frozen_on(ALL, params)
    np.testing.assert_array_equal(apply(lora.variables(adapters, frozen), batch), apply({"params": params}, batch))
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        assert np.any(np.asarray(leaf)) == (path[-1].key == "a"), path
    model = Transformer(CONFIG)
    gradients = jax.jit(mean_gradient, static_argnums=(0, 1, 4))(
        next_token, model, adapters, batch, 2, frozen
    ).gradients
    assert jax.tree.structure(gradients) == jax.tree.structure(adapters)
    # With B zero the gradient reaches B alone: what the chain rule says of dW, seen through A.
    whole = jax.jit(mean_gradient, static_argnums=(0, 1, 4))(next_token, model, params, batch, 1).gradients
    for block in ("block_0", "block_1"):
        found, full = gradients["layers"][block]["mlp"]["up"], whole["layers"][block]["mlp"]["up"]["kernel"]
        a = np.asarray(adapters["layers"][block]["mlp"]["up"]["a"])
        expected = ALL.alpha / ALL.rank * np.einsum("LDR,LDF->LRF", a, np.asarray(full))
        np.testing.assert_allclose(found["b"], expected, rtol=1e-4, atol=1e-7)
        assert not np.any(np.asarray(found["a"]))


@functools.cache
def train(mesh_config, config, *, steps=3):
    """Losses, state and validation loss after a few steps on a mesh; 8 devices or 1."""
    sizes = [getattr(mesh_config, name) for name in MESH_AXES]
    mesh = make_mesh(mesh_config, jax.devices()[: int(np.prod(sizes))])
    model, optimizer = Transformer(CONFIG), make_optimizer(OPTIMIZER, CONFIG)
    boxed = abstract_params(CONFIG)
    on_mesh = jax.tree.map(convert, base_params(), lora.abstract_frozen(config, boxed, placed(mesh, boxed)))
    with jax.set_mesh(mesh):
        whole = Config(model=CONFIG, optimizer=OPTIMIZER, lora=config, data=DATA, init_from="x")
        state = state_from(on_mesh, model, optimizer, mesh, whole)
        abstract = abstract_state(model, optimizer, mesh, lora=config)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings_of(abstract)
        assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 3 * adapter_count(CONFIG, config)
        before = jax.device_get(state.frozen.params)
        step = make_train_step(
            next_token, model, optimizer, schedule(OPTIMIZER, 10), shardings_of(abstract), accumulation_steps=2
        )
        losses = []
        for _ in range(steps):
            state, metrics = step(state, jax.device_put(make_batch(), sharding(mesh, "batch", "seq")))
            losses.append(float(metrics.nll_sum) / int(metrics.num_tokens))
        batch = jax.device_put(make_batch(1), sharding(mesh, "batch", "seq"))
        score = float(make_eval_step(next_token, model)(state.params, batch, state.frozen)[0])
        merged = float(make_eval_step(next_token, model)(whole_params(state, CONFIG, mesh), batch)[0])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.frozen.params))
    return losses, jax.device_get(state.params), score, merged


@pytest.mark.slow
def test_eight_devices_train_adapters_as_one_does():
    losses, params, score, merged = train(MeshConfig(data=1), ALL)
    assert losses[2] < losses[1] < losses[0]
    assert merged == pytest.approx(score, rel=1e-5)
    sharded = train(MeshConfig(data=2, fsdp=2, tensor=2), ALL)
    np.testing.assert_allclose(sharded[0], losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), sharded[1], params)
    assert sharded[2:] == pytest.approx((score, merged), rel=1e-5)


def test_quantized_weights_are_within_half_a_step_and_train():
    int8 = dataclasses.replace(ALL, frozen="int8")
    frozen, params = frozen_on(int8, base_params()), base_params()
    kernel = params["layers"]["block_0"]["attention"]["o"]["kernel"]
    found = frozen.params["layers"]["block_0"]["attention"]["o"]["kernel"]
    assert (found.q.dtype, found.q.shape, found.scale.shape) == (jnp.int8, kernel.shape, (1, 1, 1, 32))
    back = np.asarray(found.q, np.float32) * np.asarray(found.scale)
    assert (np.abs(back - kernel) <= np.asarray(found.scale) * 0.5001).all()
    np.testing.assert_array_equal(frozen.params["embed"]["embedding"], params["embed"]["embedding"])
    sizes = sum(leaf.size for leaf in jax.tree.leaves(frozen.params) if leaf.dtype == jnp.int8)
    scales = sum(leaf.scale.nbytes for leaf in jax.tree.leaves(frozen.params, is_leaf=is_q) if is_q(leaf))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(frozen.params)) == frozen_bytes(CONFIG, int8) + scales
    assert sizes > adapter_count(CONFIG, int8)

    losses, _, score, merged = train(MeshConfig(data=1), dataclasses.replace(ALL, frozen="int4"))
    assert losses[2] < losses[1] < losses[0]
    assert merged == pytest.approx(score, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "rounding"), [("int8", 1e-3), ("int4", 1e-2)])
def test_eight_devices_train_on_quantized_weights_as_one_does(frozen, rounding):
    lora = dataclasses.replace(ALL, frozen=frozen)
    alone, sharded = (train(mesh, lora) for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(sharded[0], alone[0], rtol=1e-5)
    exact = train(MeshConfig(data=1), ALL)
    assert alone[0][0] == pytest.approx(exact[0][0], rel=rounding)  # later steps also differ in their updates


def is_q(leaf):
    return hasattr(leaf, "scale")


def test_a_bad_adapter_is_found():
    config = Config(
        model=CONFIG, optimizer=OPTIMIZER, lora=ALL, data=DATA, init_from="x",
        training=TrainingConfig(steps=10, global_batch_size=8),
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    adapters = random_adapters(ALL)
    adapters["layers"]["block_1"]["mlp"]["up"]["b"][0, 1, 2] = np.inf
    zero, optimizer = jnp.zeros((), jnp.int32), make_optimizer(OPTIMIZER, CONFIG)
    frozen = frozen_on(ALL, base_params())
    state = TrainState(zero, zero, zero, adapters, optimizer.init(adapters), frozen)
    with jax.set_mesh(mesh):
        found = diagnose(config, Transformer(CONFIG), state, make_batch(), sharding(mesh, "batch", "seq"))
    assert (found.direction, found.place, found.layer) == ("forward", "layer 1 mlp up", 1)
