"""What only an NVIDIA GPU can show; skipped elsewhere.

TEST_PLATFORMS=cuda,cpu python -m pytest -o addopts="" -m gpu
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from nextllm_jax.model.objective import Batch
from nextllm_jax.ops.cudnn import cudnn_attention
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training.program import build_program
from tests.ops.test_attention import inputs, reference, segments, value_and_gradients, visible
from tests.runs import metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU and TEST_PLATFORMS=cuda,cpu"),
]

CASES = {  # T, N, K, H, documents, window
    "plain": (128, 4, 4, 64, False, None),
    "three queries a key, odd blocks": (330, 6, 2, 128, False, None),
    "documents": (330, 4, 1, 64, True, None),
    "window": (1024, 4, 2, 64, False, 100),
    "documents, window": (512, 4, 2, 128, True, 70),
}


@pytest.fixture(autouse=True)
def full_float32_products():
    with jax.default_matmul_precision("highest"):
        yield


def relative_error(got, wanted) -> float:
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("case", CASES)
def test_cudnn_values_and_gradients_equal_the_reference(case):
    T, N, K, H, documents, window = CASES[case]
    arrays = [x.astype(jnp.bfloat16) for x in inputs(T=T, N=N, K=K, H=H)]
    ids = segments(2, T) if documents else None
    ours = value_and_gradients(lambda q, k, v: cudnn_attention(q, k, v, segment_ids_BT=ids, window=window), *arrays)
    seen = visible(2, T, window, ids)
    wide = [x.astype(jnp.float32) for x in arrays]
    plain = value_and_gradients(lambda q, k, v: reference(q, k, v, seen), *wide)
    for mine, other in zip(ours, plain, strict=True):
        assert relative_error(mine, other) < 1e-2


def test_another_document_does_not_change_a_bit_of_cudnn():
    T, cut = 320, 167
    arrays = [x.astype(jnp.bfloat16) for x in inputs(T=T, H=64)]
    ids = jnp.broadcast_to(jnp.where(jnp.arange(T) < cut, 1, 2), (2, T))

    def attend(q, k, v):
        return cudnn_attention(q, k, v, segment_ids_BT=ids)

    here = value_and_gradients(attend, *arrays)
    there = value_and_gradients(attend, *(x.at[:, :cut].multiply(-3.7) for x in arrays))
    for mine, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(mine[:, cut:], other[:, cut:])
        assert (mine[:, :cut] != other[:, :cut]).any()


CONFIG = Config(
    model=ModelConfig(
        vocab_size=256, num_layers=4, embed_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=2, head_dim=64,
        layer_pattern=("global", "local"), sliding_window=50, dtype="float32",
    ),
    data=DataConfig(vocab_size=258, tokenizer="gpt2", sequence_length=128),
    optimizer=OptimizerConfig(learning_rate=0.003, warmup_steps=2),
    training=TrainingConfig(global_batch_size=8),
)  # fmt: skip


def changed(**sections) -> Config:
    return dataclasses.replace(
        CONFIG, **{name: dataclasses.replace(getattr(CONFIG, name), **values) for name, values in sections.items()}
    )


def make_batch(seed: int) -> Batch:
    """Random tokens in two documents a sequence."""
    tokens = np.random.default_rng(seed).integers(0, 256, (8, 129)).astype(np.int32)
    positions = np.broadcast_to(np.arange(128, dtype=np.int32), (8, 128))
    return Batch(tokens[:, :-1], tokens[:, 1:], 1 + (positions >= 77).astype(np.int32), positions, positions != 76)


def train(config: Config, platform: str, steps: int = 4):
    """The losses of a few steps on the first device of a platform, and the state after them."""
    mesh = make_mesh(config.mesh, jax.devices(platform)[:1])
    with jax.set_mesh(mesh):
        program = build_program(config, mesh)
        state, losses = program.create_state(), []
        for i in range(steps):
            state, metrics = program.train_step(state, jax.device_put(make_batch(i), sharding(mesh, "batch", "seq")))
            losses.append(float(metrics.nll_sum / metrics.num_tokens))
    return np.array(losses), state


def assert_near(state, expected, atol: float) -> None:
    got, wanted = jax.device_get((state.params, expected.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, wanted)


def test_float32_training_has_the_losses_and_parameters_of_the_cpu():
    (losses, state), (expected_losses, expected) = train(CONFIG, "gpu"), train(CONFIG, "cpu")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_near(state, expected, atol=5e-4)


def test_cudnn_trains_as_xla_does_in_bfloat16():
    choices = {name: changed(model={"attention": name, "dtype": "bfloat16"}) for name in ("auto", "xla")}
    assert build_program(choices["auto"], make_mesh(CONFIG.mesh, jax.devices()[:1])).model.kernel.name == "cudnn"
    (losses, _), (expected_losses, _) = (train(config, "gpu", steps=20) for config in choices.values())
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-3)


@pytest.mark.parametrize("remat", ["dots", "save_attention", "full"])
def test_activations_and_moments_on_the_host_compute_the_same(remat):
    config = changed(model={"remat": remat, "remat_offload": True}, optimizer={"offload_state": True})
    (losses, state), (expected_losses, expected) = train(config, "gpu"), train(CONFIG, "gpu")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_near(state, expected, atol=5e-4)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host"}


def test_the_commands_on_a_gpu_have_the_losses_and_the_text_of_the_cpu(trained, door):
    assert re.search(r"1 x NVIDIA", trained.log.stderr)
    door.run("train.py", "--config", "config.py", JAX_PLATFORMS="cpu")
    ours, expected = (
        {line["step"]: line["loss"] for line in metrics(one.directory / "runs" / "config", "train")}
        for one in (trained, door)
    )
    np.testing.assert_allclose([ours[step] for step in expected], list(expected.values()), rtol=1e-3)
    command = ["sample.py", "--checkpoint", door.directory / "runs/config", "--prompt", "the cat", "--temperature", "0"]
    command += ["--max-new-tokens", "60"]
    texts = {trained.run(*command, JAX_PLATFORMS=platform).stdout for platform in ("cuda", "cpu")}
    assert len(texts) == 1
