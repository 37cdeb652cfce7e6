"""The choice among attention kernels, and each of them on meshes of simulated devices against one device."""

import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.attention_kernel import AttentionKernel, attend, choose_kernel
from nextllm_jax.ops.attention import causal_attention
from nextllm_jax.sharding import make_mesh, sharding
from tests.ops.test_attention import inputs, segments

KERNELS = {
    "gathered xla": AttentionKernel("xla"),
    "gathered blockwise": AttentionKernel("blockwise", (16, 20)),
    "gathered splash": AttentionKernel("splash", (128, 128), interpret=True),
}
AXES = ("data", "fsdp", "sequence", "tensor")  # and one device along expert
ALL_MESHES = [m for m in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(m) == 8 and m[3] <= 2]
SOME_MESHES = [(1, 1, 8, 1), (2, 1, 2, 2), (1, 2, 4, 1)]
slow = pytest.mark.slow


def both_passes(attend, q, k, v, ids, d_out):
    out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
    return out, *backward(d_out)


@functools.cache
def one_device(T, window, documents=True):
    q, k, v, d_out = inputs(B=8, T=T, N=4, K=2, H=8)
    ids = segments(8, T) if documents else None
    plain = lambda q, k, v, ids: causal_attention(q, k, v, segment_ids_BT=ids, window=window)  # noqa: E731
    results = jax.jit(functools.partial(both_passes, plain))(q, k, v, ids, d_out)
    return (q, k, v, ids, d_out), results


def check(kernel, sizes, window, documents=True):
    T = 128 * sizes[2] if kernel.name == "splash" else 96
    arguments, expected = one_device(T, window, documents)
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    heads = ("heads", "kv_heads", "kv_heads", None, "heads")
    shardings = [sharding(mesh, "batch", "seq", *((name, None) if name else ())) for name in heads]
    shardings[3] = shardings[3] if documents else None
    with jax.set_mesh(mesh):
        ours = jax.jit(functools.partial(both_passes, functools.partial(attend, kernel, window=window)))(
            *jax.device_put(arguments, tuple(shardings))
        )
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", SOME_MESHES)
def test_divided_sequences_attend_as_on_one_device(sizes):
    others = {"window": 40, "documents": False} if sizes[2] == 4 else {"window": None}
    check(KERNELS["gathered blockwise"], sizes, **others)


def test_splash_attends_on_a_mesh_as_on_one_device():
    check(KERNELS["gathered splash"], (2, 1, 2, 2), window=150)


@slow
@pytest.mark.parametrize(("window", "documents"), [(None, True), (10, True), (40, False)])
@pytest.mark.parametrize("sizes", ALL_MESHES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_mesh_and_window_attends_as_one_device(name, sizes, window, documents):
    check(KERNELS[name], sizes, window, documents)


def fake_mesh(platform, kind="some chip", **sizes):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    return types.SimpleNamespace(devices=np.array([device]), shape=dict.fromkeys(AXES, 1) | sizes)


def chosen(platform, *, length=256, dtype="bfloat16", kind="some chip", sequence=1, **model):
    config = Config(
        model=ModelConfig(context_length=1 << 20, **model),
        data=DataConfig(sequence_length=length),
    )
    return choose_kernel(config, fake_mesh(platform, kind, sequence=sequence), jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({"platform": "cpu"}, "xla", "auto on cpu"),
        ({"platform": "cpu", "length": 2048}, "blockwise", "auto on cpu, length 2,048"),
        ({"platform": "cpu", "sequence": 2}, "blockwise", "auto on cpu, gathering keys"),
        ({"platform": "tpu"}, "splash", "auto on tpu"),
        ({"platform": "tpu", "sequence": 2}, "splash", "auto on tpu, gathering keys"),
        ({"platform": "tpu", "sequence": 4}, "blockwise", "256 / mesh.sequence 4 is not a multiple of 128, gathering"),
        ({"platform": "gpu"}, "cudnn", "auto on gpu"),
        (
            {"platform": "gpu", "dtype": "float32"},
            "xla",
            "cudnn is not available, it needs bfloat16 and",
        ),
        ({"platform": "gpu", "attention_soft_cap": 30.0}, "xla", "soft cap"),
        ({"platform": "gpu", "head_dim": 36}, "xla", "model.head_dim is 36"),
        ({"platform": "gpu", "length": 8192}, "blockwise", "much memory beyond .* 4096, length 8,192"),
        ({"platform": "gpu", "length": 8192, "attention": "cudnn"}, "cudnn", "as configured"),
        ({"platform": "cpu", "attention": "blockwise"}, "blockwise", "as configured"),
    ],
)
def test_auto_takes_the_best_that_honours_everything_and_says_why(settings, name, reason):
    kernel = chosen(**settings)
    assert kernel.name == name
    assert re.search(reason, kernel.reason)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"platform": "cpu", "attention": "splash"},
            "it needs TPUs and the devices are cpu; set it to auto",
        ),
        ({"platform": "tpu", "attention": "cudnn"}, "cudnn, but it needs GPUs and the devices are tpu"),
        ({"platform": "gpu", "attention": "cudnn", "sequence": 2}, r"cannot shard sequences \(mesh.sequence 2\)"),
        ({"platform": "tpu", "attention": "splash", "attention_blocks": (100, 128)}, "not multiples of 128"),
    ],
)
def test_what_cannot_be_had_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        chosen(**settings)


def test_blocks_come_from_the_config_or_from_the_chip():
    assert chosen("tpu", attention_blocks=(256, 128)).blocks == (256, 128)
    assert chosen("tpu", kind="TPU v5").blocks != chosen("tpu", kind="TPU v5 lite").blocks
    with pytest.raises(InputError, match=r"attention_blocks is .*two positive block sizes"):
        ModelConfig(attention_blocks=(128,))


@pytest.mark.tpu
def test_splash_compiles_for_a_tpu_mesh_in_both_passes(four_tpus):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), four_tpus)
    q, k, ids = ((4, 300, 4, 64), ("heads", None)), ((4, 300, 2, 64), ("kv_heads", None)), ((4, 300), ())
    shapes = [
        jax.ShapeDtypeStruct(
            shape, jnp.bfloat16 if names else jnp.int32, sharding=sharding(mesh, "batch", "seq", *names)
        )
        for shape, names in (q, k, k, ids, q)
    ]
    kernel = AttentionKernel("splash", (128, 128))
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        run = jax.jit(functools.partial(both_passes, functools.partial(attend, kernel, window=200, soft_cap=30.0)))
        text = run.lower(*shapes).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, and backward for queries and for keys
    assert "all-gather" not in text
