"""Training with experts: exact resuming, Muon by expert, adapters of experts, and what is reported."""

import io
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config, DataConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from nextllm_jax.model import lora
from nextllm_jax.model.moe import RouterSums
from nextllm_jax.model.quantize import convert
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.model.weights import by_name
from nextllm_jax.ops.quantized import QTensor
from nextllm_jax.sharding import make_mesh, on_device, sharding
from nextllm_jax.training.metrics import expert_record
from nextllm_jax.training.optimizers.muon import direction
from nextllm_jax.training.optimizers.parts import decay_mask
from nextllm_jax.training.pictures import draw_experts
from nextllm_jax.training.program import build_program, to_save
from nextllm_jax.training.writers import MetricsWriter
from tests.parameters import random_params
from tests.training.test_step import make_batch
from tests.training.test_writers import events, train_record

MODEL = ModelConfig(
    vocab_size=64, num_layers=3, embed_dim=16, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8, context_length=16,
    num_experts=4, expert_mlp_dim=12, mlp_pattern=("sparse", "dense"), selection_bias=True, router_scores="sigmoid",
    dtype="float32",
)  # fmt: skip
CONFIG = Config(
    model=MODEL,
    data=DataConfig(vocab_size=258, tokenizer="gpt2", sequence_length=16),
    optimizer=OptimizerConfig(name="muon", learning_rate=0.01, warmup_steps=2),
    training=TrainingConfig(steps=4, global_batch_size=8, ema_decay=0.9),
    mesh=MeshConfig(data=1),
)


def test_resuming_is_exact_with_the_selection_bias(tmp_path):
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
    program = build_program(CONFIG, mesh)

    def steps(state, numbers):
        for i in numbers:
            state, _ = program.train_step(state, jax.device_put(make_batch(i), sharding(mesh, "batch", "seq")))
        return state

    with jax.set_mesh(mesh):
        whole = steps(program.create_state(), range(4))
        half = steps(program.create_state(), range(2))
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(2, *to_save(half), validation_loss=None)
            checkpoints.wait()
            restored, _ = program.restore_state(checkpoints, 2)
        resumed = steps(restored, range(2, 4))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))
    for params in (whole.params, whole.average):
        bias = by_name(params)["layers/block_0/mlp/router/selection_bias"]
        assert np.abs(bias).max() > 0
    assert np.abs(np.asarray(by_name(whole.params)["remainder_0/mlp/router/selection_bias"])).max() <= 4 * 0.001 + 1e-9


def test_muon_orthogonalizes_the_matrices_of_each_expert():
    weights = by_name(abstract_params(MODEL))
    rng = np.random.default_rng(0)
    for name in ("layers/block_0/mlp/experts/down/kernel", "remainder_0/mlp/experts/up/kernel"):
        momentum = jnp.asarray(rng.normal(size=weights[name].value.shape), jnp.float32)
        found = direction(weights[name], momentum)
        flat, wanted = (x.reshape(-1, *x.shape[-2:]) for x in (momentum, found))
        one = weights[name].replace(names=weights[name].names[-2:])
        for matrix, expected in zip(flat, wanted, strict=True):
            np.testing.assert_allclose(direction(one, matrix), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["layers/block_0/mlp/experts/down/kernel", "remainder_0/mlp/experts/up/kernel"])
def test_muon_on_a_mesh_exchanges_experts_as_it_does_layers(name):
    weight = by_name(abstract_params(MODEL))[name]
    momentum = jnp.asarray(np.random.default_rng(0).normal(size=weight.value.shape), jnp.float32)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: direction(weight, x))(jax.device_put(momentum, sharding(mesh, *weight.names)))
    np.testing.assert_allclose(found, direction(weight, momentum), atol=1e-4)


def test_routers_decay_and_selection_biases_do_not():
    mask = by_name(decay_mask(OptimizerConfig(), MODEL, nn.meta.unbox(abstract_params(MODEL))))
    assert mask["layers/block_0/mlp/router/kernel"]
    assert mask["layers/block_0/mlp/experts/up/kernel"]
    assert not mask["layers/block_0/mlp/router/selection_bias"]


@pytest.mark.parametrize("frozen", ["unquantized", "int8"])
def test_adapters_of_experts_compute_and_train_what_merged_weights_do(frozen):
    config, boxed = LoraConfig(rank=3, alpha=6.0, frozen=frozen), abstract_params(MODEL)
    params = random_params(nn.meta.unbox(boxed))
    shapes = nn.meta.unbox(lora.create(config, boxed, jax.random.key(1)))
    rng = np.random.default_rng(2)
    adapters = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    assert by_name(adapters)["layers/block_0/mlp/experts/down/a"].shape == (1, 4, 12, 3)
    assert "layers/block_0/mlp/router/a" not in by_name(adapters)
    wanted = lora.abstract_frozen(config, boxed, on_device(boxed, jax.devices()[0]))
    base = lora.Frozen(jax.tree.map(convert, params, wanted), 2.0)
    is_quantized = isinstance(by_name(base.params)["layers/block_0/mlp/experts/up/kernel"], QTensor)
    assert is_quantized == (frozen == "int8")
    batch = make_batch()
    context = batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT

    @jax.jit
    def value_and_gradient(adapters, weights):
        def squares(adapters):
            tree = lora.merge(boxed, adapters, base, jnp.float32) if weights == {} else weights
            variables = {"params": tree} if weights == {} else lora.variables(adapters, base)
            return jnp.sum(jnp.square(Transformer(MODEL).apply(variables, *context)[0]))

        return jax.value_and_grad(squares)(adapters)

    merged, by_adapters = value_and_gradient(adapters, {}), value_and_gradient(adapters, base.params)
    np.testing.assert_allclose(by_adapters[0], merged[0], rtol=1e-4)
    for name, gradient in by_name(by_adapters[1]).items():
        other = by_name(merged[1])[name]
        np.testing.assert_allclose(gradient, other, atol=2e-3 * np.abs(other).max(), err_msg=name)


SUMS = RouterSums(
    tokens_E=jnp.array([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]),
    probability_E=jnp.zeros((2, 4)),
    z=jnp.zeros(2),
    entropy=jnp.array([2.0, 4.0]),
    dropped=jnp.array([1.0, 0.0]),
    counted=jnp.array([4.0, 4.0]),
)


def test_lines_have_the_load_of_each_expert(tmp_path):
    record = expert_record(jax.device_get(SUMS))
    assert record == {
        "expert_share": [[0.75, 0.25, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]],
        "expert_load": [3.0, 1.0],
        "router_entropy": [0.5, 1.0],
        "dropped_share": [0.125, 0.0],
    }
    writer = MetricsWriter(RunDir(tmp_path), MODEL)  # layers 0 and 2 are sparse
    writer.train(train_record(10) | record)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert {name: line[name] for name in record} == record
    scalars = {value.tag: value.simple_value for event in events(tmp_path) for value in event.summary.value}
    assert scalars["train/expert_share/layer 0/1"] == 0.25
    assert scalars["train/expert_load/layer 0"] == 3.0
    assert scalars["train/router_entropy/layer 2"] == 1.0


def test_the_picture_shows_experts_without_tokens():
    records = [{"step": step, **expert_record(jax.device_get(SUMS))} for step in (10, 20, 30)]
    balanced = [dict(record, expert_share=[[0.25] * 4] * 2) for record in records]
    uneven, even = (image.imread(io.BytesIO(draw_experts(each, (0, 2)))) for each in (records, balanced))
    gray = lambda picture: float((np.abs(picture[..., :3] - 200 / 255) < 0.01).all(-1).mean())  # noqa: E731
    assert gray(uneven) > gray(even) + 0.1  # two of eight rows
