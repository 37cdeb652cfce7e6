"""Muon in a whole train step: on meshes, with sharded and offloaded moments, in microbatches, and resumed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.config import MeshConfig
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import by_name
from nextllm_jax.plan.collectives import collectives
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training.optimizers.muon import direction
from nextllm_jax.training.program import build_program, to_save
from tests.training.test_memory_options import MODEL, change, make_batch

OPTIMIZER = {"name": "muon", "learning_rate": 0.01, "adamw_learning_rate": 0.02}


def make_program(num_devices, mesh, optimizer, training):
    config = change(optimizer=OPTIMIZER | optimizer, training=training)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    return build_program(config, mesh), mesh


def steps(program, mesh, state, numbers):
    metrics = None
    for i in numbers:
        state, metrics = program.train_step(state, jax.device_put(make_batch(i), sharding(mesh, "batch", "seq")))
    return metrics, state


@functools.cache
def on_one_device():
    program, mesh = make_program(1, {"data": 1}, {}, {})
    with jax.set_mesh(mesh):
        return jax.device_get(steps(program, mesh, program.create_state(), range(2)))


@pytest.mark.parametrize(
    ("mesh", "optimizer", "training"),
    [
        pytest.param({"data": 1, "fsdp": 8}, {}, {}, marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"shard_over_data": True}, {"accumulation_steps": 2}),
        pytest.param({"data": 4, "fsdp": 2}, {"offload_state": True}, {}, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_what_one_gives(mesh, optimizer, training):
    """Two steps in float32. Newton-Schulz enlarges the rounding of gradients, since it makes small directions large."""
    expected_metrics, expected = on_one_device()
    program, mesh = make_program(8, mesh, optimizer, training)
    with jax.set_mesh(mesh):
        metrics, state = jax.device_get(steps(program, mesh, program.create_state(), range(2)))
    np.testing.assert_allclose(metrics.nll_sum, expected_metrics.nll_sum, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norms, expected_metrics.gradient_norms, rtol=1e-4)
    for name, got in by_name(state.params).items():
        np.testing.assert_allclose(got, by_name(expected.params)[name], atol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.opt_state, expected.opt_state)


def test_resuming_is_exact(tmp_path):
    program, mesh = make_program(1, {"data": 1}, {}, {})
    with jax.set_mesh(mesh):
        _, whole = steps(program, mesh, program.create_state(), range(4))
        _, state = steps(program, mesh, program.create_state(), range(2))
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(2, *to_save(state), validation_loss=None)
            checkpoints.wait()
            restored, _ = program.restore_state(checkpoints, 2)
        _, state = steps(program, mesh, restored, range(2, 4))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(whole))


@pytest.mark.parametrize(("shape", "over_data"), [({"fsdp": 4, "tensor": 2}, False), ({"data": 4, "fsdp": 2}, True)])
@pytest.mark.parametrize("layers", [8, 5])
def test_devices_exchange_whole_layers(shape, over_data, layers):
    """A device sends its momentum once and receives the direction once; nothing is sent between iterations."""
    mesh = make_mesh(MeshConfig(**{"data": 1} | shape))
    boxed = abstract_params(dataclasses.replace(MODEL, num_layers=layers, layer_pattern=("global",)))
    weight = boxed["layers"]["block_0"]["attention"]["o"]["kernel"]
    momentum = jax.random.normal(jax.random.key(0), weight.value.shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(momentum, sharding(mesh, *weight.names))
        run = jax.jit(lambda x: direction(weight, x, over_data))
        got, traffic = run(placed), collectives(run.lower(placed).compile().as_text(), mesh.shape).traffic
    np.testing.assert_allclose(got, direction(weight, momentum), atol=1e-4)
    gathers = {"all-gather"} if over_data else set()
    assert {key.kind for key in traffic} == {"all-to-all"} | gathers
    padded = -(-layers // 8) * 8
    whole = jnp.dtype("float32").itemsize * momentum.size / layers * padded
    assert sum(sent.sent_bytes for sent in traffic.values()) < 2 * len(shape) * whole / (2 if over_data else 8)
