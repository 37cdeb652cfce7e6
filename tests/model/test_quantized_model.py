"""Which weights are quantized, in what shapes and shardings; and the model on them, against numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nextllm_jax.config import MeshConfig, ModelConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.diagnostics import reference
from nextllm_jax.errors import InputError
from nextllm_jax.model.quantize import abstract_packed, abstract_quantized, convert, is_quantized
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.model.weights import by_name, unstack_layers
from nextllm_jax.ops.quantized import dequantize
from nextllm_jax.sharding import make_mesh, on_device, placed
from tests.parameters import random_params

CONFIG = ModelConfig(
    vocab_size=64, num_layers=3, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=16,
    layer_pattern=("global", "local"), sliding_window=5, tie_embeddings=False, attention_bias=True, dtype="float32",
)  # fmt: skip
BOXED = abstract_params(CONFIG)
INT4 = Quantization(scheme="int4", embeddings="int4")


def wanted(quantization, place=None):
    place = place or (lambda boxed: on_device(boxed, jax.devices()[0]))
    return abstract_quantized(BOXED, place(BOXED), quantization)


def quantized(quantization, place=None):
    params = random_params(nn.meta.unbox(BOXED))
    return jax.tree.map(convert, params, wanted(quantization, place))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_model_on_quantized_weights_is_numpy_on_what_they_stand_for(scheme):
    params = quantized(Quantization(scheme=scheme, embeddings=scheme))
    dense = jax.tree.map(lambda leaf: dequantize(leaf, jnp.float32), params, is_leaf=is_quantized)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 7))
    expected = reference.forward(dense, CONFIG, tokens)
    positions = np.broadcast_to(np.arange(7), (2, 7))
    for scan_layers, tree in ((True, params), (False, unstack_layers(CONFIG, params))):
        model = Transformer(CONFIG, scan_layers=scan_layers)
        hidden, _ = model.apply({"params": tree}, tokens, positions)
        logits = model.apply({"params": tree}, hidden, method="logits")
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_shapes_in_memory_and_in_files():
    tree = by_name(wanted(INT4))
    o = tree["layers/block_1/attention/o/kernel"]
    assert (o.q.shape, o.q.dtype) == ((1, 4, 16, 32), jnp.int4)
    assert o.scale.shape == o.minimum.shape == (1, 4, 1, 32)  # a group never crosses a head
    assert tree["remainder_0/mlp/down/kernel"].scale.shape == (2, 32)
    assert tree["lm_head/embedding"].scale.shape == (64, 1)
    assert not any(is_quantized(leaf) for name, leaf in tree.items() if name.endswith(("bias", "scale")))
    packed = by_name(abstract_packed(wanted(INT4)))
    assert packed["layers/block_1/attention/o/kernel"].q.shape == (1, 4, 16, 16)
    by_channel = by_name(wanted(Quantization(scheme="int8")))
    assert by_channel["layers/block_1/attention/o/kernel"].scale.shape == (1, 1, 1, 32)
    assert not is_quantized(by_channel["embed/embedding"])


def test_scales_are_sharded_as_their_matrices_where_their_groups_can_be():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    tree = by_name(wanted(Quantization(scheme="int4", group_size=16), lambda boxed: placed(mesh, boxed)))
    up, down = tree["remainder_0/mlp/up/kernel"], tree["remainder_0/mlp/down/kernel"]
    assert (up.q.sharding.spec, down.q.sharding.spec) == (
        PartitionSpec(("fsdp", "expert"), "tensor"),
        PartitionSpec("tensor", ("fsdp", "expert")),
    )
    assert up.scale.shape == (2, 64)  # two groups on four devices
    assert (up.scale.sharding.spec, down.scale.sharding.spec) == (
        PartitionSpec(None, "tensor"),
        PartitionSpec("tensor", ("fsdp", "expert")),
    )
    alone = quantized(Quantization(scheme="int4", group_size=16))
    sharded = quantized(Quantization(scheme="int4", group_size=16), lambda boxed: placed(mesh, boxed))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), alone, sharded)


@pytest.mark.parametrize(
    ("axes", "group_size", "calls"),
    # On four devices, k and v have 64 outputs, which are no tile, and the two groups of down cannot be sharded.
    [({"data": 1, "fsdp": 2, "tensor": 2}, 32, 7), ({"data": 1, "tensor": 4}, 256, 4)],
)
def test_the_kernel_for_tpus_runs_on_each_device_of_a_mesh(as_on_tpu, axes, group_size, calls):
    config = ModelConfig(
        vocab_size=64, num_layers=1, embed_dim=256, mlp_dim=512, num_heads=8, num_kv_heads=4, head_dim=64,
    )  # fmt: skip
    mesh, boxed = make_mesh(MeshConfig(**axes), jax.devices()[:4]), abstract_params(config, scan_layers=False)
    form = Quantization(scheme="int4", group_size=group_size)
    wanted, sharded = (
        abstract_quantized(boxed, place, form) for place in (on_device(boxed, jax.devices()[0]), placed(mesh, boxed))
    )
    params = jax.tree.map(convert, random_params(nn.meta.unbox(boxed)), wanted)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 4))
    positions = np.broadcast_to(np.arange(4), (4, 4))

    @jax.jit
    def hidden(params):
        model = Transformer(config, jnp.bfloat16, scan_layers=False)
        return model.apply({"params": params}, tokens, positions)[0].astype(jnp.float32)

    expected = hidden(jax.tree.map(lambda leaf: dequantize(leaf, jnp.float32), params, is_leaf=is_quantized))
    assert not as_on_tpu
    with jax.set_mesh(mesh):
        found = hidden(jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, sharded))
    assert len(as_on_tpu) == calls
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int3"}, "scheme is 'int3'"),
        ({"scheme": "int4", "group_size": 0}, "group_size is 0; it must be positive and even"),
        ({"scheme": "int8", "symmetric": True}, "leave --symmetric out"),
        (
            {"scheme": "int4", "group_size": 48},
            "does not divide the 32 inputs of .*; use nextllm quantize --group-size 16, ",
        ),
    ],
)
def test_mistakes_are_a_line(settings, message):
    with pytest.raises(InputError, match=message) as raised:
        wanted(Quantization(**settings))
    assert "\n" not in str(raised.value)


def test_nothing_is_rounded_twice():
    int8, int4 = quantized(Quantization(scheme="int8")), wanted(INT4)
    with pytest.raises(InputError, match="already quantized with other settings"):
        jax.tree.map(convert, int8, int4, is_leaf=is_quantized)
