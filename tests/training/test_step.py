"""The train step against one device, one big batch, and plain optax; skipped updates."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nextllm_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from nextllm_jax.model.attention_kernel import AttentionKernel
from nextllm_jax.model.objective import Batch, make_eval_step, next_token
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.plan.collectives import collectives
from nextllm_jax.sharding import MESH_AXES, make_mesh, sharding
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.schedule import schedule
from nextllm_jax.training.state import abstract_state, create_state, shardings_of
from nextllm_jax.training.step import make_train_step

CONFIG = ModelConfig(
    vocab_size=64, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=4, head_dim=8, context_length=16
)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=2)
B, T = 8, 16


def make_batch(seed=0):
    """Packed documents of uneven lengths, with unequal numbers of loss-bearing tokens in the rows."""
    rng = np.random.default_rng(seed)
    tokens_BT1 = rng.integers(0, CONFIG.vocab_size, (B, T + 1)).astype(np.int32)
    boundary_B = rng.integers(2, T, B)
    index_T = np.arange(T)
    second_BT = index_T[None] >= boundary_B[:, None]
    mask_BT = (index_T[None] < rng.integers(3, T + 1, B)[:, None]) & (index_T[None] + 1 != boundary_B[:, None])
    positions_BT = np.where(second_BT, index_T[None] - boundary_B[:, None], index_T[None])
    return Batch(
        tokens_BT=tokens_BT1[:, :-1],
        targets_BT=tokens_BT1[:, 1:],
        segment_ids_BT=1 + second_BT.astype(np.int32),
        positions_BT=positions_BT.astype(np.int32),
        loss_mask_BT=mask_BT,
    )


def run(mesh_config, *, steps=3, accumulation_steps=1, batches=None, config=CONFIG, dtype="float32", **kernel):
    """Losses, last gradient norm and final parameters of a few steps on a mesh of simulated devices."""
    sizes = [getattr(mesh_config, name) for name in MESH_AXES]
    mesh = make_mesh(mesh_config, jax.devices()[: int(np.prod(sizes))])
    model = Transformer(config, jnp.dtype(dtype), **kernel)
    optimizer = make_optimizer(OPTIMIZER, config)
    with jax.set_mesh(mesh):
        state = create_state(model, optimizer, mesh, seed=0)
        step = make_train_step(
            next_token,
            model,
            optimizer,
            schedule(OPTIMIZER, 10),
            shardings_of(state),
            accumulation_steps=accumulation_steps,
        )
        losses, metrics = [], None
        for i in range(steps):
            batch = batches[i] if batches else make_batch(i)
            state, metrics = step(state, jax.device_put(batch, sharding(mesh, "batch", "seq")))
            losses.append(float(metrics.nll_sum) / int(metrics.num_tokens))
    return losses, metrics, jax.device_get(state)


@pytest.fixture(scope="module")
def one_device():
    return run(MeshConfig(data=1))


WIDE = dataclasses.replace(CONFIG, num_heads=8, num_kv_heads=8)  # for tensor 8
FACTORIZATIONS = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]
COVERING = [(2, 2, 1, 2), (1, 2, 2, 2), (1, 8, 1, 1), (2, 1, 4, 1)]  # each axis with each other one; the rest is slow


@pytest.mark.parametrize(
    ("data", "fsdp", "sequence", "tensor"),
    [sizes if sizes in COVERING else pytest.param(*sizes, marks=pytest.mark.slow) for sizes in FACTORIZATIONS],
)
def test_every_mesh_gives_what_one_device_gives(one_device, data, fsdp, sequence, tensor):
    """Losses, gradients (their norms by layer, and the first moments of AdamW) and parameters, in float32."""
    mesh = MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor, slices=data)
    config = WIDE if tensor == 8 else CONFIG
    alone = run(MeshConfig(data=1), config=WIDE) if tensor == 8 else one_device
    assert_same(run(mesh, config=config), alone)


def assert_same(found, expected):
    (losses, metrics, state), (losses_1, metrics_1, state_1) = found, expected
    np.testing.assert_allclose(losses, losses_1, rtol=2e-5)
    np.testing.assert_allclose(metrics.grad_norm, metrics_1.grad_norm, rtol=2e-4)
    np.testing.assert_allclose(metrics.gradient_norms, metrics_1.gradient_norms, rtol=1e-3)
    np.testing.assert_allclose(metrics.activation_rms, metrics_1.activation_rms, rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.opt_state, state_1.opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), state.params, state_1.params)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, sequence=2),
        pytest.param(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), marks=pytest.mark.slow),
    ],
)
def test_bfloat16_trains_on_a_mesh(one_device, mesh):
    losses, metrics, _ = run(mesh, dtype="bfloat16", kernel=AttentionKernel("blockwise", (8, 8)))
    np.testing.assert_allclose(losses, one_device[0], rtol=5e-3)
    np.testing.assert_allclose(metrics.grad_norm, one_device[1].grad_norm, rtol=0.03)


@pytest.mark.parametrize(
    ("mesh", "accumulation_steps"),
    [
        (MeshConfig(data=1), 2),
        (MeshConfig(data=2, fsdp=2), 2),
        (MeshConfig(data=2, sequence=2, tensor=2), 4),
        (MeshConfig(data=2, fsdp=2, tensor=2), 2),
        pytest.param(MeshConfig(data=4), 2, marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, sequence=4), 2, marks=pytest.mark.slow),
    ],
)
def test_accumulation_equals_the_big_batch_with_unequal_valid_tokens(one_device, mesh, accumulation_steps):
    kernel = {"kernel": AttentionKernel("blockwise", (8, 8))} if mesh.sequence == 4 else {}
    assert_same(run(mesh, accumulation_steps=accumulation_steps, **kernel), one_device)


def test_what_is_sent_over_data_does_not_grow_with_the_accumulation_steps():
    """Each device's gradients are summed once, in float32, and a few scalars; not once for each microbatch."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    model, optimizer = Transformer(CONFIG, jnp.dtype("float32")), make_optimizer(OPTIMIZER, CONFIG)
    with jax.set_mesh(mesh):
        state = abstract_state(model, optimizer, mesh)
        step = make_train_step(
            next_token, model, optimizer, schedule(OPTIMIZER, 10), shardings_of(state), accumulation_steps=2
        )
        batch = jax.device_put(make_batch(), sharding(mesh, "batch", "seq"))
        hlo = step.lower(state, batch).compile().as_text()
    traffic = collectives(hlo, mesh.shape).traffic
    over_data = sum(sent.sent_bytes for key, sent in traffic.items() if "data" in key.axes or key.axes == "other")
    gradients = sum(4 * np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    assert gradients <= over_data < 1.02 * gradients  # of two devices each sends as much as it holds


def test_the_first_step_is_plain_adamw_on_the_mean_loss():
    model, batch = Transformer(CONFIG, jnp.float32), make_batch()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = jax.device_get(create_state(model, make_optimizer(OPTIMIZER, CONFIG), mesh, seed=0).params)

    def mean_loss(params):
        variables = {"params": params}
        hidden, _ = model.apply(variables, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        logits = model.apply(variables, hidden, method="logits")
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets_BT)
        return jnp.sum(nll * batch.loss_mask_BT) / np.sum(batch.loss_mask_BT)

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params)
    optimizer = make_optimizer(OPTIMIZER, CONFIG)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    expected = optax.apply_updates(params, jax.tree.map(lambda u: -0.005 * u, updates))
    losses, metrics, state = run(MeshConfig(data=1), steps=1)
    assert losses[0] == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-4)
    assert float(metrics.learning_rate) == pytest.approx(0.005)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, expected)


def test_a_non_finite_step_updates_nothing_and_counts():
    """A poisoned parameter makes the loss NaN; restoring it lets training go on."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model, optimizer = Transformer(CONFIG, jnp.float32), make_optimizer(OPTIMIZER, CONFIG)
    with jax.set_mesh(mesh):
        state = create_state(model, optimizer, mesh, seed=0)
        step = make_train_step(next_token, model, optimizer, schedule(OPTIMIZER, 10), shardings_of(state))
        batch = jax.device_put(make_batch(), sharding(mesh, "batch", "seq"))
        scale = jnp.copy(state.params["final_norm"]["scale"])
        state.params["final_norm"]["scale"] = scale.at[0].set(jnp.nan)
        before = jax.device_get(state)
        state, metrics = step(state, batch)
        assert bool(metrics.skipped)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before.params)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), before.opt_state)
        state, metrics = step(state, batch)
        assert (int(state.step), int(state.skipped), int(metrics.skipped_in_a_row)) == (2, 2, 2)
        state.params["final_norm"]["scale"] = scale
        state, metrics = step(state, batch)
        assert not bool(metrics.skipped)
        assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 2, 0)


def test_evaluation_step_sums_over_the_mask():
    model, batch = Transformer(CONFIG, jnp.float32), make_batch()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = create_state(model, make_optimizer(OPTIMIZER, CONFIG), mesh, seed=0).params
    nll, count = make_eval_step(next_token, model)(params, batch)
    nothing = batch._replace(loss_mask_BT=np.zeros_like(batch.loss_mask_BT))
    assert int(count) == batch.loss_mask_BT.sum()
    assert float(nll) / int(count) == pytest.approx(np.log(CONFIG.vocab_size), rel=0.05)
    assert [float(x) for x in make_eval_step(next_token, model)(params, nothing)] == [0.0, 0]
