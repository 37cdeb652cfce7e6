"""The moving average of the weights: what it holds, and that checkpoints hold it as their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.config import MeshConfig, TrainingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.weights import by_name
from nextllm_jax.sharding import make_mesh
from nextllm_jax.training.program import build_program, to_save
from tests.training.test_memory_options import change
from tests.training.test_muon import steps

DECAY = 0.3


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def test_the_average_is_evaluated_saved_and_resumed(tmp_path):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    program = build_program(change(training={"ema_decay": DECAY}), mesh)
    with jax.set_mesh(mesh):
        state = program.create_state()
        assert_equal(state.average, state.params)
        expected = by_name(jax.device_get(state.params))
        for step in range(4):
            _, state = steps(program, mesh, state, [step])
            decay = min(DECAY, (1 + step) / (10 + step))
            after = by_name(jax.device_get(state.params))
            expected = {name: decay * old + (1 - decay) * after[name] for name, old in expected.items()}
        for name, got in by_name(state.average).items():
            np.testing.assert_allclose(got, expected[name], atol=1e-6, err_msg=name)

        items, facts = to_save(state)
        assert_equal(items["params"], state.average)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(4, items, facts, validation_loss=None)
            checkpoints.wait()
            restored, _ = program.restore_state(checkpoints, 4)
        assert_equal(restored, state)

        restored.params["final_norm"]["scale"] *= jnp.nan
        metrics, skipped = steps(program, mesh, restored, [5])
    assert metrics.skipped
    assert_equal(skipped.average, items["params"])


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(InputError, match=r"training\.ema_decay"):
        TrainingConfig(ema_decay=decay)
