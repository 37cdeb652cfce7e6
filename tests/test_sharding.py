"""The mesh, the strict translation of logical axes, and parameters that are born sharded."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nextllm_jax import sharding
from nextllm_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from nextllm_jax.diagnostics import reference
from nextllm_jax.errors import InputError
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.state import TrainState, create_state
from tests.parameters import random_params

SMALL = ModelConfig(
    vocab_size=32, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=True
)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 1, 2, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 1, 2, 1)),
        ({"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}, (2, 2, 2, 1, 1)),
        ({"fsdp": 2, "expert": 2}, (2, 2, 1, 1, 2)),
    ],
)
def test_mesh_uses_all_devices(axes: dict[str, int], expected: tuple[int, ...]) -> None:
    mesh = sharding.make_mesh(MeshConfig(**axes))
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor", "expert")
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_of_some_devices() -> None:
    assert sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:4]).devices.shape == (2, 1, 1, 2, 1)


@pytest.mark.parametrize("axes", [{"fsdp": 3}, {"data": 2}, {"data": 4, "tensor": 4}, {"expert": 3}])
def test_mesh_that_does_not_fit_the_devices_is_refused(axes: dict[str, int]) -> None:
    with pytest.raises(InputError, match="does not use 8 devices") as caught:
        sharding.make_mesh(MeshConfig(**axes))
    for name, size in axes.items():
        assert f"{name} {size}" in str(caught.value)


class Chip:
    """What the order of a mesh depends on; real devices of several slices are compiled for in test_slices.py."""

    def __init__(self, number, platform, slice_index):
        self.id, self.platform, self.device_kind, self.slice_index = number, platform, platform, slice_index

    def __repr__(self):
        return f"{self.platform}{self.id} of slice {self.slice_index}"


def chips(platform: str, slice_indices: list[int]) -> list[Any]:
    """Chips of these slices, in an order that mixes them."""
    found = [Chip(number, platform, index) for number, index in enumerate(slice_indices)]
    return found[1::2] + found[::2]


def slices_at(mesh: jax.sharding.Mesh) -> list[list[int]]:
    """The slices at each place of the data axis."""
    return [sorted({chip.slice_index for chip in part.flat}) for part in mesh.devices]


def test_slices_are_contiguous_parts_of_the_data_axis() -> None:
    config = MeshConfig(data=4, fsdp=2, slices=2)
    mesh = sharding.make_mesh(config, chips("gpu", [0] * 4 + [1] * 4))
    assert slices_at(mesh) == [[0], [0], [1], [1]]
    simulated = sharding.make_mesh(config)
    assert [device.id for device in simulated.devices.flat] == list(range(8))
    assert simulated.axis_types == sharding.make_mesh(MeshConfig()).axis_types


def test_nodes_of_gpus_may_be_crossed_by_any_axis_and_then_stay_in_order() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), chips("gpu", [0] * 4 + [1] * 4))
    assert [chip.id for chip in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
    ("platform", "slice_indices", "config", "sentence"),
    [
        ("tpu", [0] * 4 + [1] * 4, MeshConfig(), "mesh.slices is 1, but the devices form 2; set --mesh.slices 2"),
        ("gpu", [0, 0, 1, 1, 2, 2, 3, 3], MeshConfig(slices=2), "devices form 4; set --mesh.slices 4, or 1 to let"),
        ("tpu", [0] * 8, MeshConfig(slices=2), "mesh.slices is 2, but the devices form 1"),
        ("cpu", [0] * 8, MeshConfig(data=2, fsdp=4, slices=4), "mesh.slices 4 does not divide mesh.data 2; no other"),
        ("cpu", [0] * 8, MeshConfig(slices=3), "mesh.slices 3 does not divide mesh.data 8"),
    ],
)
def test_slices_that_do_not_fit_are_refused(
    platform: str, slice_indices: list[int], config: MeshConfig, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        sharding.make_mesh(config, chips(platform, slice_indices))


def test_spec_translates_logical_axes() -> None:
    assert sharding.spec(("batch", "seq", "heads", "head_dim")) == PartitionSpec(
        ("data", "fsdp", "expert"), "sequence", "tensor", None
    )
    assert sharding.spec(("layers", "embed", "mlp")) == PartitionSpec(None, ("fsdp", "expert"), "tensor")
    assert sharding.spec((None, "vocab")) == PartitionSpec(None, "tensor")


def test_spec_refuses_an_unknown_axis() -> None:
    with pytest.raises(ValueError, match="'head' is unknown"):
        sharding.spec(("embed", "head"))


@pytest.mark.parametrize("names", [("heads", "mlp"), ("batch", "embed"), ("vocab", "vocab")])
def test_spec_refuses_axes_that_collide(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"'{names[0]}' and '{names[1]}' of .* both use"):
        sharding.spec(names)


def test_a_size_that_the_mesh_does_not_divide_is_refused() -> None:
    mesh = sharding.make_mesh(MeshConfig(tensor=8))
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((16, 12), jnp.float32), ("embed", "mlp"))
    with pytest.raises(InputError, match=r"mlp/up.*'mlp' axis of size 12 cannot be sharded over 8.*mesh\.tensor"):
        sharding.tree_shardings(mesh, {"mlp": {"up": box}})


def test_tree_shardings_refuse_an_unknown_axis() -> None:
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((16,), jnp.float32), ("embd",))
    with pytest.raises(ValueError, match="'embd' is unknown"):
        sharding.tree_shardings(sharding.make_mesh(MeshConfig()), {"kernel": box})


def test_constrain_lays_an_array_out_on_the_mesh_and_does_nothing_without_one() -> None:
    x_BTD = jnp.zeros((8, 4, 16))
    assert sharding.constrain(x_BTD, "batch", "seq", "activation_embed") is x_BTD
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))):
        laid_out = jax.jit(lambda x: sharding.constrain(x, "batch", "seq", "activation_embed"))(x_BTD)
        assert laid_out.addressable_shards[0].data.shape == (2, 2, 16)
        with pytest.raises(ValueError, match="unknown"):
            sharding.constrain(x_BTD, "batch", "time", "embed")


@functools.cache
def make_state(mesh: MeshConfig, seed: int = 0) -> TrainState:
    return create_state(Transformer(SMALL), make_optimizer(OptimizerConfig(), SMALL), sharding.make_mesh(mesh), seed)


def shard_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.addressable_shards[0].data.shape
        for path, leaf in leaves
    }


def test_parameters_and_moments_are_born_sharded() -> None:
    state = make_state(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = shard_shapes(state.params)
    block = "layers/block_0"
    assert shapes == {
        "embed/embedding": (32 // 2, 16 // 2),
        f"{block}/attention_norm/scale": (2, 16),
        f"{block}/mlp_norm/scale": (2, 16),
        f"{block}/attention/q/kernel": (2, 16 // 2, 4 // 2, 4),
        f"{block}/attention/k/kernel": (2, 16 // 2, 2 // 2, 4),
        f"{block}/attention/v/kernel": (2, 16 // 2, 2 // 2, 4),
        f"{block}/attention/o/kernel": (2, 4 // 2, 4, 16 // 2),
        f"{block}/attention/q_norm/scale": (2, 4),
        f"{block}/attention/k_norm/scale": (2, 4),
        f"{block}/mlp/gate/kernel": (2, 16 // 2, 24 // 2),
        f"{block}/mlp/up/kernel": (2, 16 // 2, 24 // 2),
        f"{block}/mlp/down/kernel": (2, 24 // 2, 16 // 2),
        "final_norm/scale": (16,),
    }
    moments = shard_shapes(state.opt_state)
    for name, shape in shapes.items():
        assert [moment for path, moment in moments.items() if path.endswith(name)] == [shape, shape]


def test_initial_parameters_depend_on_the_seed_and_not_on_the_mesh() -> None:
    copied = make_state(MeshConfig()).params
    divided = make_state(MeshConfig(data=2, fsdp=2, tensor=2)).params
    # Not to the last bit: how XLA vectorizes the normal distribution may depend on the shard's shape.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), copied, divided)
    other = make_state(MeshConfig(), seed=1).params
    assert not np.array_equal(copied["embed"]["embedding"], other["embed"]["embedding"])


def test_a_model_that_the_mesh_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match=r"'kv_heads' axis of size 2 cannot be sharded over 4"):
        make_state(MeshConfig(tensor=4))


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8}, {"sequence": 2}])
def test_a_divided_model_computes_what_one_device_computes(axes: dict[str, int]) -> None:
    model, mesh = Transformer(SMALL), sharding.make_mesh(MeshConfig(**axes))
    tokens_BT = np.random.default_rng(0).integers(0, 32, (8, 12), np.int32)
    positions_BT = np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12))
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens_BT, positions_BT)["params"]
    params = random_params(nn.meta.unbox(boxed))
    with jax.set_mesh(mesh):
        divided_params = jax.device_put(params, sharding.tree_shardings(mesh, boxed))
        hidden_BTD = jax.jit(lambda params: model.apply({"params": params}, tokens_BT, positions_BT)[0])(divided_params)
        logits_BTV = np.asarray(model.apply({"params": divided_params}, hidden_BTD, method="logits"))
    assert hidden_BTD.sharding.num_devices == 8
    np.testing.assert_allclose(logits_BTV, reference.forward(params, SMALL, tokens_BT), atol=1e-5)
