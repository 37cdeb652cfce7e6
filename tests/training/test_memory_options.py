"""What saves memory changes where arrays are and when they are made, not what a step computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nextllm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.objective import Batch
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.plan.compile import memory_of
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.program import build_program
from nextllm_jax.training.state import abstract_state, shardings_of
from nextllm_jax.training.step import SKIP_REASONS
from nextllm_jax.training.update import make_update

MODEL = ModelConfig(
    vocab_size=64, num_layers=5, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, context_length=16,
    layer_pattern=("global", "local"), sliding_window=5, dtype="float32",
)  # fmt: skip
CONFIG = Config(
    model=MODEL,
    data=DataConfig(vocab_size=258, tokenizer="gpt2", sequence_length=16),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2),
    mesh=MeshConfig(data=4, fsdp=2),
)
IN_MICROBATCHES = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "training": {"accumulation_steps": 2}}


def make_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (8, 17)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    return Batch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        segment_ids_BT=1 + (positions >= 7).astype(np.int32),
        positions_BT=positions,
        loss_mask_BT=rng.random((8, 16)) < 0.8,
    )


@functools.cache
def run(config: Config):
    """(metrics of the second step, state after it)."""
    mesh = make_mesh(config.mesh)
    program = build_program(config, mesh)
    with jax.set_mesh(mesh):
        state, metrics = program.create_state(), None
        for i in range(2):
            state, metrics = program.train_step(state, jax.device_put(make_batch(i), sharding(mesh, "batch", "seq")))
    return metrics, state


def change(**sections) -> Config:
    """CONFIG with other values in its sections."""
    return dataclasses.replace(
        CONFIG, **{name: dataclasses.replace(getattr(CONFIG, name), **values) for name, values in sections.items()}
    )


def assert_same(config: Config, atol: float = 2e-5) -> None:
    (metrics, state), (expected_metrics, expected) = run(config), run(CONFIG)
    np.testing.assert_allclose(metrics.nll_sum, expected_metrics.nll_sum, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, expected_metrics.grad_norm, rtol=1e-4)
    got, wanted = jax.device_get((state.params, expected.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "save_attention", "full"])
def test_remat_changes_no_gradient(remat):
    assert_same(change(model={"remat": remat}))


def test_offload_without_remat_is_refused():
    with pytest.raises(InputError, match=r"model\.remat_offload"):
        change(model={"remat_offload": True})


def moments(state):
    return {name: optax.tree.get(state.opt_state, name) for name in ("mu", "nu")}


@pytest.mark.slow
def test_moments_divided_over_data_give_the_same_step_in_microbatches():
    assert_same(change(optimizer={"shard_over_data": True}, **IN_MICROBATCHES))


def test_moments_divided_over_data_give_the_same_step():
    config = change(optimizer={"shard_over_data": True})
    assert_same(config)
    _, state = run(config)
    for name, tree in moments(state).items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            held = leaf.addressable_shards[0].data.size / leaf.size
            # Only matrices are divided over fsdp; the last block's scales have 32 numbers, which data divides alone.
            assert held <= 1 / 4, (name, path, leaf.shape, held)
    assert all(held.sharding.is_fully_replicated for held in jax.tree.leaves(state.params["final_norm"]))


def test_a_first_moment_in_bfloat16_is_rounded_and_nothing_else():
    config = change(optimizer={"first_moment_dtype": "bfloat16"})
    _, state = run(config)
    _, expected = run(CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(moments(state)["mu"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(moments(state)["nu"])} == {jnp.dtype("float32")}
    reference = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8, mu_dtype=jnp.bfloat16)
    assert reference.init({"x": jnp.zeros(2)}).mu["x"].dtype == jnp.bfloat16
    for got, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-3)


@pytest.mark.parametrize(
    ("shard_over_data", "others"), [(True, {}), pytest.param(False, IN_MICROBATCHES, marks=pytest.mark.slow)]
)
def test_what_is_offloaded_computes_the_same(shard_over_data, others):
    optimizer = {"offload_state": True, "shard_over_data": shard_over_data}
    config = change(optimizer=optimizer, model={"remat": "full", "remat_offload": True}, **others)
    assert_same(config)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moments(run(config)[1]))} == {"pinned_host"}


def test_a_step_that_is_skipped_leaves_offloaded_moments_as_they_were():
    """The learning rate and the gradient are finite, but the updated parameters might not be."""
    config = change(optimizer={"offload_state": True, "learning_rate": 1e38, "warmup_steps": 0})
    mesh = make_mesh(config.mesh)
    program = build_program(config, mesh)
    with jax.set_mesh(mesh):
        state = program.create_state()
        before = jax.device_get((state.params, state.opt_state))
        state, metrics = program.train_step(state, jax.device_put(make_batch(0), sharding(mesh, "batch", "seq")))
    assert SKIP_REASONS[int(metrics.reason)] == "update"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)


@pytest.mark.tpu
def test_a_tpu_holds_the_moments_of_a_few_layers_at_a_time(four_tpus):
    """The check and the update of 16 layers, compiled for four chips."""
    mesh = make_mesh(MeshConfig(fsdp=4), four_tpus)
    model = dataclasses.replace(MODEL, num_layers=16, embed_dim=1024, mlp_dim=4096, layer_pattern=("global",))
    settings = dataclasses.replace(CONFIG.optimizer, offload_state=True)
    state = abstract_state(Transformer(model), make_optimizer(settings, model), mesh, settings)

    def update(state, gradients):
        update = make_update(
            make_optimizer(settings, model), jnp.float32(1), gradients, optax.tree.norm(gradients), shardings.opt_state
        )
        return update.apply_if(update.is_finite(state), state)

    shardings = shardings_of(state)
    run = jax.jit(update, donate_argnums=0, out_shardings=(shardings.params, shardings.opt_state))
    memory = memory_of(run.lower(state, state.params).compile())
    # Two moments a parameter, which go back to where they were; the arguments are parameters and gradients.
    assert memory.host_bytes == pytest.approx(memory.argument_bytes, rel=0.01)
    assert memory.temporary_bytes < 0.2 * memory.host_bytes
    assert memory.argument_bytes < memory.peak_bytes < memory.argument_bytes + 0.3 * memory.host_bytes
