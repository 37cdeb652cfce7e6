"""Estimates of a train step's memory against what the TPU compiler made of it, as recorded by `nextllm plan`.

The figures are of jax 0.10.2 and libtpu 0.0.42. A change of the train step may change them: compile again, and record.
"""

import dataclasses
from pathlib import Path

import pytest

from nextllm_jax.config.files import load_config_file
from nextllm_jax.plan.estimate import memory_traffic_bytes, recomputed_flops_per_token
from nextllm_jax.plan.topology import devices_of_kind
from nextllm_jax.plan.training import estimate_training
from tests.plan.test_training import CONFIG

CONFIGS = Path(__file__).parent.parent.parent / "configs"
GIB = 2**30


def variant(name, batch, length, remat, offload_state=False, **mesh):
    config = load_config_file(str(CONFIGS / f"{name}.py"))
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **mesh),
        model=dataclasses.replace(config.model, remat=remat),
        data=dataclasses.replace(config.data, sequence_length=length),
        training=dataclasses.replace(config.training, global_batch_size=batch),
        optimizer=dataclasses.replace(config.optimizer, offload_state=offload_state),
    )


@pytest.mark.parametrize(
    ("name", "kind", "devices", "batch", "length", "remat", "arguments", "peak"),
    [
        ("llama3_8b", "TPU v5e", 16, 16, 2048, "full", 5.61, 8.61),
        ("llama3_8b", "TPU v5e", 16, 16, 4096, "full", 5.61, 9.56),
        ("llama2_7b", "TPU v5e", 16, 64, 2048, "full", 4.71, 10.47),
        ("llama3_8b", "TPU v5p", 4, 8, 4096, "full", 22.44, 33.17),
        ("llama2_7b", "TPU v5p", 64, 256, 4096, "save_attention", 1.18, 12.92),
        ("llama2_7b", "TPU v5p", 64, 256, 4096, "dots", 1.18, 46.05),
        ("llama3_8b", "TPU v5p", 64, 64, 2048, "none", 1.41, 12.71),
        ("llama3_70b", "TPU v5p", 256, 256, 8192, "full", 3.1, 20.7),
        ("llama3_405b", "TPU v5p", 4096, 2048, 8192, "full", 1.2, 25.4),
    ],
)
def test_peak_is_within_15_percent(name, kind, devices, batch, length, remat, arguments, peak) -> None:
    plan = estimate_training(variant(name, batch, length, remat), devices_of_kind(kind, devices))
    assert plan.argument_bytes / GIB == pytest.approx(arguments, abs=0.05)
    assert plan.estimated_peak_bytes / GIB == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "length", "batch", "remat", "tied", "layers", "peak"),
    [
        (2048, 64, 64, 64, 5632, 32_000, 1024, 32, "full", False, 8, 4.324),
        (2048, 64, 64, 64, 5632, 32_000, 1024, 16, "none", False, 8, 6.934),
        (2048, 64, 64, 64, 5632, 32_000, 1024, 16, "dots", False, 8, 5.693),
        (2048, 64, 64, 64, 5632, 32_000, 1024, 32, "save_attention", False, 8, 5.521),
        (1024, 64, 64, 64, 2816, 32_000, 1024, 16, "none", False, 8, 4.613),
        (2048, 32, 8, 128, 5632, 32_000, 1024, 16, "none", False, 8, 4.766),
        (1024, 8, 2, 128, 2816, 256_000, 2048, 16, "full", True, 6, 1.953),
        (1024, 8, 2, 128, 2816, 256_000, 2048, 16, "full", False, 6, 2.686),
        (1024, 8, 2, 128, 2816, 256_000, 2048, 64, "full", True, 6, 2.716),
        (2048, 16, 8, 128, 5632, 32_000, 8192, 16, "full", False, 16, 7.718),
        (1024, 8, 8, 128, 2816, 32_000, 8192, 16, "full", False, 16, 3.175),
    ],
)
def test_the_peak_of_odd_shapes_is_within_15_percent(
    embed, heads, kv_heads, head_dim, mlp, vocab, length, batch, remat, tied, layers, peak
) -> None:
    """Many narrow heads, a large vocabulary, long sequences; on v5e:2x2, with fsdp 4."""
    config = variant("llama3_8b", batch, length, remat, fsdp=4)
    shape = {"embed_dim": embed, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "mlp_dim": mlp}
    model = dataclasses.replace(config.model, vocab_size=vocab, tie_embeddings=tied, num_layers=layers, **shape)
    plan = estimate_training(dataclasses.replace(config, model=model), devices_of_kind("TPU v5e", 4))
    assert plan.estimated_peak_bytes / GIB == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("name", "chips", "remat", "expert", "arguments", "peak"),
    [
        ("mixtral_8x7b", 64, "full", 1, 8.16, 16.35),
        ("mixtral_8x7b", 64, "full", 4, 8.16, 17.17),
        ("qwen3_30b_a3b", 64, "full", 1, 5.33, 11.45),
        ("qwen3_30b_a3b", 64, "full", 4, 5.33, 11.60),
        ("olmoe_1b_7b", 16, "none", 1, 4.83, 10.94),
        ("olmoe_1b_7b", 16, "none", 4, 4.83, 12.06),
        ("olmoe_1b_7b", 16, "dots", 1, 4.83, 9.27),
        ("olmoe_1b_7b", 16, "dots", 4, 4.83, 11.02),
    ],
)
def test_the_peak_with_experts_is_within_15_percent(name, chips, remat, expert, arguments, peak) -> None:
    plan = estimate_training(variant(name, chips, 4096, remat, expert=expert), devices_of_kind("TPU v5p", chips))
    assert plan.argument_bytes / GIB == pytest.approx(arguments, abs=0.05)
    assert plan.estimated_peak_bytes / GIB == pytest.approx(peak, rel=0.15)


def test_the_peak_with_moments_on_the_host_is_within_15_percent() -> None:
    plan = estimate_training(variant("llama3_8b", 8, 2048, "full", offload_state=True), devices_of_kind("TPU v5e", 8))
    assert plan.argument_bytes / GIB == pytest.approx(3.74, abs=0.05)
    assert plan.estimated_peak_bytes / GIB == pytest.approx(9.6, rel=0.15)


def test_more_of_anything_takes_more_memory() -> None:
    target = devices_of_kind("TPU v5p", 64)
    peaks = [
        estimate_training(variant("llama3_8b", 64, 2048, remat), target).estimated_peak_bytes
        for remat in ("full", "save_attention", "dots", "none")
    ]
    assert peaks == sorted(peaks)
    longer = estimate_training(variant("llama3_8b", 64, 4096, "full"), target).estimated_peak_bytes
    assert longer > peaks[0]


def test_what_remat_repeats() -> None:
    config = CONFIG.model
    of = {
        remat: recomputed_flops_per_token(dataclasses.replace(config, remat=remat), 64)
        for remat in ("none", "dots", "save_attention", "full")
    }
    layers, head_width, seen = 4, 4 * 16, 32.5
    products = 2 * layers * (64 * 16 * (2 * 4 + 2 * 2) + 2 * 64 * 128)  # all but the last of the MLP
    attention = 4 * layers * head_width * seen
    assert of == {"none": 0, "dots": attention, "save_attention": products, "full": products + attention}


def test_memory_traffic_of_the_state() -> None:
    mesh = {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1, "expert": 1}
    more = memory_traffic_bytes(CONFIG, mesh, 1000.0) - memory_traffic_bytes(CONFIG, mesh, 0.0)
    assert more == 2000


def test_devices_along_expert_gather_dense_matrices_as_those_along_fsdp() -> None:
    mesh = {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1, "expert": 1}
    along_expert = memory_traffic_bytes(CONFIG, mesh | {"fsdp": 1, "expert": 8}, 0.0)
    assert along_expert == memory_traffic_bytes(CONFIG, mesh, 0.0)
