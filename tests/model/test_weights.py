"""A projection that only this file knows is covered by everything that iterates over weights."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nextllm_jax.config import Config, DataConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig
from nextllm_jax.errors import InputError
from nextllm_jax.interop import names
from nextllm_jax.model import layer_norms, lora, transformer
from nextllm_jax.model.accounting import adapter_count, flops_per_token, matrix_size, parameter_count
from nextllm_jax.model.layers import Linear
from nextllm_jax.model.objective import make_eval_step, next_token
from nextllm_jax.model.quantize import convert
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.model.weights import by_name, layer_paths, unstack_layers
from nextllm_jax.ops.quantized import QTensor
from nextllm_jax.sharding import make_mesh, placed, tree_shardings
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.optimizers.parts import decay_mask
from nextllm_jax.training.schedule import schedule
from nextllm_jax.training.state import abstract_state, shardings_of, state_from
from nextllm_jax.training.step import make_train_step
from tests.parameters import random_params
from tests.training.test_step import make_batch

CONFIG = ModelConfig(
    vocab_size=64, num_layers=3, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8,
    layer_pattern=("global", "local"), sliding_window=5, dtype="float32",
)  # fmt: skip
LAYERS = ("layers/block_0", "layers/block_1", "remainder_0")


class Mixed(nn.Module):
    """An MLP with a matrix that contracts two axes, and a bias."""

    config: ModelConfig
    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        embed, mlp = self.config.embed_dim, self.mlp_dim
        types = (self.config.init_std, self.dtype, jnp.float32)
        parts = Linear("BTD,DcF->BTcF", (embed, 2, mlp), ("embed", "head_dim", "mlp"), *types, name="spread")(x_BTD)
        mix = Linear("BTcF,cFD->BTD", (2, mlp, embed), ("head_dim", "mlp", "embed"), *types, ("embed",), name="mix")
        return mix(nn.silu(parts))


@pytest.fixture(autouse=True)
def mixed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformer, "SwiGLU", Mixed)
    caches = (transformer.abstract_params, transformer._abstract_params)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_accounting() -> None:
    attention, mlp = 16 * 8 * (4 + 2 + 2 + 4), 2 * 2 * 16 * 24
    assert matrix_size(CONFIG) == 3 * (attention + mlp)
    assert parameter_count(CONFIG) == 64 * 16 + 3 * (attention + mlp + 16 + 2 * 16) + 16
    wider = dataclasses.replace(CONFIG, mlp_dim=25)
    assert flops_per_token(wider, 8) - flops_per_token(CONFIG, 8) == 6 * 3 * 2 * 2 * 16
    assert adapter_count(CONFIG, LoraConfig(rank=5, targets=("mix",))) == 3 * 5 * (2 * 24 + 16)


def test_weight_decay() -> None:
    mask = by_name(decay_mask(OptimizerConfig(), CONFIG, nn.meta.unbox(abstract_params(CONFIG))))
    for layer in LAYERS:
        decays = {leaf: mask[f"{layer}/mlp/{leaf}"] for leaf in ("mix/kernel", "mix/bias", "spread/kernel")}
        assert decays == {"mix/kernel": True, "mix/bias": False, "spread/kernel": True}


def test_sharding() -> None:
    shardings = by_name(tree_shardings(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), abstract_params(CONFIG)))
    assert shardings["layers/block_1/mlp/spread/kernel"].spec == PartitionSpec(None, ("fsdp", "expert"), None, "tensor")
    assert shardings["remainder_0/mlp/mix/kernel"].spec == PartitionSpec(None, "tensor", ("fsdp", "expert"))


def test_norms_per_layer() -> None:
    gradients = jax.tree.map(lambda leaf: np.zeros(leaf.shape), nn.meta.unbox(abstract_params(CONFIG)))
    gradients["layers"]["block_0"]["mlp"]["mix"]["kernel"][0, 1, 2, 3] = 3
    gradients["layers"]["block_0"]["mlp"]["mix"]["bias"][0, 1] = 4
    gradients["remainder_0"]["mlp"]["spread"]["kernel"][1, 0, 2] = 2
    found = dict(zip(layer_norms.places(CONFIG), layer_norms.gradient_norms(CONFIG, gradients), strict=True))
    assert {place: norm for place, norm in found.items() if norm} == {"layer 0 mlp": 5, "layer 2 mlp": 2}


def test_every_module_of_a_layer_has_a_norm() -> None:
    gradients = jax.tree.map(lambda leaf: np.zeros(leaf.shape), nn.meta.unbox(abstract_params(CONFIG)))
    gradients["remainder_0"]["memory"] = {"kernel": np.ones((2, 2))}
    with pytest.raises(ValueError, match="memory"):
        layer_norms.gradient_norms(CONFIG, gradients)


def test_adapters_train_on_quantized_weights() -> None:
    config, mesh = LoraConfig(rank=2, targets=("mix", "q"), frozen="int8"), make_mesh(MeshConfig(data=2, fsdp=4))
    settings = OptimizerConfig(learning_rate=0.05, warmup_steps=1)
    model, optimizer = Transformer(CONFIG), make_optimizer(settings, CONFIG)
    data = DataConfig(sequence_length=16, tokenizer="gpt2")
    whole = Config(model=CONFIG, optimizer=settings, lora=config, data=data, init_from="x")
    boxed = abstract_params(CONFIG)
    wanted = lora.abstract_frozen(config, boxed, placed(mesh, boxed))
    params = jax.tree.map(convert, random_params(nn.meta.unbox(boxed)), wanted)
    with jax.set_mesh(mesh):
        abstract = abstract_state(model, optimizer, mesh, lora=config)
        state = state_from(params, model, optimizer, mesh, whole)
        assert isinstance(state.frozen.params["remainder_0"]["mlp"]["mix"]["kernel"], QTensor)
        assert state.frozen.params["remainder_0"]["mlp"]["mix"]["kernel"].scale.shape == (1, 1, 16)
        shapes = {name: leaf.shape for name, leaf in by_name(state.params).items() if name.startswith("layers/block_0")}
        assert shapes["layers/block_0/mlp/mix/a"] == (1, 2, 24, 2)
        assert shapes["layers/block_0/mlp/mix/b"] == (1, 2, 16)
        assert len(shapes) == 4
        step = make_train_step(next_token, model, optimizer, schedule(settings, 10), shardings_of(abstract))
        losses = []
        for _ in range(4):
            state, metrics = step(state, make_batch())
            losses.append(float(metrics.nll_sum))
        assert losses[-1] < losses[0] * 0.99
        merged = lora.merge(abstract_params(CONFIG), state.params, state.frozen, jnp.float32)
        evaluate = make_eval_step(next_token, model)
        expected = evaluate(state.params, make_batch(), state.frozen)[0]
        np.testing.assert_allclose(evaluate(merged, make_batch())[0], expected, rtol=1e-4)


def test_targets_are_checked_against_the_model() -> None:
    with pytest.raises(InputError, match=r"gate.*k mix o q spread v"):
        lora.create(LoraConfig(rank=2, targets=("mix", "gate")), abstract_params(CONFIG), jax.random.key(0))


def test_only_the_table_of_names_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    abstract = nn.meta.unbox(abstract_params(CONFIG))
    with pytest.raises(InputError, match="mlp/mix/kernel"):
        names.parts_of(CONFIG, abstract, "huggingface")
    added = [
        names.Name(f"mlp/{leaf}", f"mlp.{leaf.replace('/', '.')}", f"ffn_{leaf}")
        for leaf in ("mix/kernel", "mix/bias", "spread/kernel")
    ]
    monkeypatch.setattr(names, "LAYER", (*names.LAYER, *added))
    shapes = names.tensor_shapes(names.parts_of(CONFIG, abstract, "huggingface"))
    assert shapes["model.layers.1.mlp.mix.kernel"] == (16, 48)
    assert shapes["model.layers.2.mlp.spread.kernel"] == (48, 16)
    assert shapes["model.layers.2.mlp.mix.bias"] == (16,)


def test_layers_are_found_stacked_or_not() -> None:
    assert layer_paths(CONFIG) == [("layers/block_0", 0), ("layers/block_1", 0), ("remainder_0", None)]
    params = random_params(nn.meta.unbox(abstract_params(CONFIG)))
    unstacked = unstack_layers(CONFIG, params)
    alone = abstract_params(CONFIG, scan_layers=False)
    assert {name: leaf.shape for name, leaf in by_name(unstacked).items()} == {
        name: weight.value.shape for name, weight in by_name(alone).items()
    }
    stacked = by_name(abstract_params(CONFIG))
    for name, weight in by_name(alone).items():
        assert not weight.num_stacked
        layer, _, rest = name.partition("/")
        if layer.startswith("remainder_"):
            of_stack = stacked[f"{LAYERS[int(layer.removeprefix('remainder_'))]}/{rest}"]
            assert (weight.kind, weight.num_inputs) == (of_stack.kind, of_stack.num_inputs)
