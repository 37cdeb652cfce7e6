"""Bad steps: whatever is not finite, and spikes, change neither parameters nor optimizer state."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.objective import Batch, next_token
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training import program as program_module
from nextllm_jax.training import step as step_module
from nextllm_jax.training.program import build_program, to_save
from nextllm_jax.training.state import recent_losses, require_finite, with_recent_losses
from nextllm_jax.training.step import SKIP_REASONS

CONFIG = Config(
    model=ModelConfig(vocab_size=320, num_layers=1, embed_dim=8, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=8,
                      context_length=8, dtype="float32"),
    data=DataConfig(vocab_size=320, sequence_length=8),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2),
    training=TrainingConfig(steps=30, global_batch_size=4, accumulation_steps=2, spike_factor=3.0,
                            spike_window_steps=3),
)  # fmt: skip
NAN_LOSS, INF_LEAF, HUGE_PARTS, INF_RATE, SPIKE = range(1, 6)
CASES = {"loss": NAN_LOSS, "gradient": INF_LEAF, "gradient of the sum alone": HUGE_PARTS, "update": INF_RATE}


def make_batch(seed, poison=0):
    """A batch whose first position says what goes wrong in its step; positions drive RoPE alone."""
    tokens, targets = np.random.default_rng(seed).integers(0, 320, (2, 4, 8), np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), tokens.shape).copy()
    positions[:, 0] = poison
    return Batch(tokens, targets, np.ones_like(tokens), positions, np.ones_like(tokens, dtype=bool))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def program(mesh):
    """The real step on top of passes that a batch can poison, compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        plain_gradient, plain_schedule = step_module.mean_gradient, program_module.schedule

        def objective(model, params, batch, frozen):
            nll, count, metrics = next_token(model, params, batch, frozen)
            poison, value = batch.positions_BT[0, 0], params["final_norm"]["scale"][0]
            nll = jnp.where(poison == NAN_LOSS, jnp.nan, nll)
            nll = jnp.where(poison == SPIKE, 100 * nll, nll)
            # No loss, and a gradient that is finite in each microbatch: two of them overflow.
            huge = jnp.where(poison == HUGE_PARTS, 2e38, 0.0) * (value - jax.lax.stop_gradient(value))
            return nll + huge, count, metrics._replace(nll=nll)

        def mean_gradient(objective, model, params, batch, *others, **options):
            found = plain_gradient(objective, model, params, batch, *others, **options)
            kernel = found.gradients["layers"]["block_0"]["attention"]["q"]["kernel"]
            poisoned = kernel.at[0, 0, 0, 0].set(
                jnp.where(batch.positions_BT[0, 0] == INF_LEAF, jnp.inf, kernel[0, 0, 0, 0])
            )
            found.gradients["layers"]["block_0"]["attention"]["q"]["kernel"] = poisoned
            # The schedule sees no batch; it takes its factor from here while the step is traced.
            rate = jnp.where(batch.positions_BT[0, 0] == INF_RATE, jnp.inf, 1.0)
            RATE.append(rate)
            return found

        patch.setattr(step_module, "mean_gradient", mean_gradient)
        patch.setattr(program_module, "schedule", lambda *_: lambda step: plain_schedule(*_)(step) * RATE.pop())
        with jax.set_mesh(mesh):
            program = build_program(CONFIG, mesh, objective)
            program.train_step(program.create_state(), put(mesh, make_batch(0)))
        yield program


RATE: list[jax.Array] = []


def put(mesh, batch):
    return jax.device_put(batch, sharding(mesh, "batch", "seq"))


def run(program, mesh, state, batches):
    found = []
    with jax.set_mesh(mesh):
        for batch in batches:
            state, metrics = program.train_step(state, put(mesh, batch))
            found.append(jax.device_get(metrics))
    return state, found


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), jax.device_get(other))


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_is_not_finite_reaches_parameters_or_moments(program, mesh, case):
    state, _ = run(program, mesh, program.create_state(), [make_batch(0)])
    before = jax.device_get(state)
    state, (bad, worse) = run(program, mesh, state, [make_batch(1, CASES[case])] * 2)
    assert SKIP_REASONS[bad.reason] == case.split()[0]
    assert (bool(bad.skipped), int(bad.skipped_in_a_row), int(worse.skipped_in_a_row)) == (True, 1, 2)
    assert (int(state.step), int(state.skipped)) == (3, 2)
    assert_equal(state.params, before.params)
    assert_equal(state.opt_state, before.opt_state)
    assert len(recent_losses(state)) == (1 if case == "loss" else 3), "only finite losses are remembered"
    state, (good,) = run(program, mesh, state, [make_batch(2)])
    assert (bool(good.skipped), int(good.skipped_in_a_row), int(state.skipped)) == (False, 0, 2)
    require_finite(state, "runs/x")


def test_a_spike_is_skipped_once_the_window_is_full(program, mesh):
    state, found = run(program, mesh, program.create_state(), [make_batch(i) for i in range(2)])
    assert all(math.isnan(metrics.loss_limit) for metrics in found)
    _, (metrics,) = run(program, mesh, jax.tree.map(jnp.copy, state), [make_batch(9, SPIKE)])
    assert not metrics.skipped, "two losses are no median of three"
    state, _ = run(program, mesh, state, [make_batch(2)])
    losses, before = recent_losses(state), jax.device_get(state.params)
    state, (spike,) = run(program, mesh, state, [make_batch(9, SPIKE)])
    assert SKIP_REASONS[spike.reason] == "spike"
    assert float(spike.loss_limit) == pytest.approx(3 * np.median(losses))
    assert_equal(state.params, before)
    loss = float(spike.nll_sum) / int(spike.num_tokens)
    assert recent_losses(state) == [*losses[1:], pytest.approx(loss)]
    state, (good, *more) = run(program, mesh, state, [make_batch(3), *(make_batch(i, SPIKE) for i in (9, 10))])
    assert not good.skipped, "one spike moves no median of three"
    assert [bool(metrics.skipped) for metrics in more] == [True, False], "losses that stay high become the median"


def test_the_window_survives_a_checkpoint_bit_for_bit(program, mesh, tmp_path):
    batches = [make_batch(i, SPIKE if i in (2, 7, 9) else 0) for i in range(12)]
    whole, losses = run(program, mesh, program.create_state(), batches)
    state, first = run(program, mesh, program.create_state(), batches[:6])
    items, facts = to_save(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, items, json.loads(json.dumps(facts)), validation_loss=None)
        checkpoints.wait()
        restored, _ = program.restore_state(checkpoints, 6)
    assert_equal(restored, state)
    state, rest = run(program, mesh, restored, batches[6:])
    assert_equal(state, whole)
    assert [bool(metrics.skipped) for metrics in first + rest] == [bool(metrics.skipped) for metrics in losses]
    assert [step for step, metrics in enumerate(losses) if metrics.skipped] == [7, 9], "step 2: no full window"


def test_the_window_may_change_its_size_and_be_off(program, mesh):
    state = with_recent_losses(program.create_state(), [1.0, 2.0, 3.0, 0.1], 3, mesh)
    assert recent_losses(state) == [2.0, 3.0, float(np.float32(0.1))]
    longer = with_recent_losses(state, recent_losses(state), 5, mesh)
    assert np.isnan(longer.recent_losses[:2]).all()
    assert recent_losses(longer) == recent_losses(state)
    assert with_recent_losses(state, [1.0], 0, mesh).recent_losses is None


def test_without_spikes_there_is_no_state_for_them(mesh):
    off = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, spike_factor=0.0))
    program = build_program(off, mesh)
    assert program.abstract_state.recent_losses is None
    assert to_save(program.abstract_state)[1] == {}


def test_a_state_that_is_not_finite_is_refused_by_name(program):
    state = program.create_state()
    state.params["layers"]["block_0"]["mlp"]["up"]["kernel"] *= jnp.inf
    with pytest.raises(InputError, match=r"params/layers/block_0/mlp/up/kernel .*model.init_std"):
        require_finite(state, "runs/x")
    with pytest.raises(InputError, match=r"of checkpoint 7 in runs/x"):
        require_finite(dataclasses.replace(state, step=jnp.asarray(7)), "runs/x")


@pytest.mark.parametrize("factor", [1.0, 0.5, -1.0])
def test_a_factor_that_would_skip_common_steps_is_refused(factor):
    with pytest.raises(InputError, match=r"training.spike_factor"):
        TrainingConfig(spike_factor=factor)
