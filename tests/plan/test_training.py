"""A train step's memory, traffic and FLOPs, on simulated devices of this machine, and by arithmetic."""

import dataclasses

import jax
import pytest

from nextllm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import Chip, chip
from nextllm_jax.model.accounting import flops_per_token
from nextllm_jax.plan import compile as compile_module
from nextllm_jax.plan.collectives import Collective
from nextllm_jax.plan.compile import memory_of, parse_out_of_memory
from nextllm_jax.plan.estimate import minimum_traffic
from nextllm_jax.plan.report import Budget, training_json, training_table
from nextllm_jax.plan.topology import Target, devices_of_kind
from nextllm_jax.plan.training import estimate_training, plan_training

CONFIG = Config(
    model=ModelConfig(
        vocab_size=512, num_layers=4, embed_dim=64, mlp_dim=128, num_heads=4, num_kv_heads=2, head_dim=16,
        tie_embeddings=False, dtype="float32",
    ),
    data=DataConfig(vocab_size=512, sequence_length=64),
    training=TrainingConfig(global_batch_size=16),
    mesh=MeshConfig(data=1, fsdp=8),
)  # fmt: skip
SLOW_CHIP = Chip(peak_flops_bf16=1e9, hbm_bytes=2**30, hbm_bandwidth=1e9, network_bandwidth=1e9)


def here() -> Target:
    """The eight simulated devices of this machine."""
    return Target("here", "cpu", SLOW_CHIP, 8, jax.devices())


@pytest.fixture(scope="module")
def planned():
    """The plan, and the compiled step that it is of."""
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_module, "memory_of", lambda program: compiled.append(program) or memory_of(program))
        plan = plan_training(CONFIG, here())
    return plan, compiled[-1]


@pytest.fixture(scope="module")
def plan(planned):
    return planned[0]


def test_memory_is_the_compilers_table(planned) -> None:
    plan, compiled = planned
    stats = compiled.memory_analysis()
    assert plan.memory.argument_bytes == stats.argument_size_in_bytes == plan.argument_bytes
    assert plan.memory.temporary_bytes == stats.temp_size_in_bytes
    assert plan.memory.output_bytes == stats.output_size_in_bytes
    assert plan.memory.peak_bytes == stats.peak_memory_in_bytes > plan.memory.argument_bytes
    # Parameters and two moments in float32, over eight devices but for the norms' scales, and the batch.
    norms = CONFIG.model.embed_dim * (2 * CONFIG.model.num_layers + 1)
    state = 12 * ((plan.parameters - norms) / 8 + norms)
    assert plan.argument_bytes == pytest.approx(state + 16 * 64 / 8 * 17, abs=64)


def test_traffic_is_near_the_least(plan) -> None:
    """What cannot be seen by arithmetic is small: norms, losses, checks. A CPU gathers in the type of the products."""
    fsdp = {collective: sent for collective, sent in plan.traffic.items() if collective.axes == "fsdp"}
    assert fsdp == plan.traffic
    gathered = sum(sent.sent_bytes for collective, sent in fsdp.items() if collective.kind == "all-gather")
    least = plan.minimum[Collective("all-gather", "fsdp", "bf16")].sent_bytes * 2  # float32 here
    assert gathered == pytest.approx(least, rel=0.5)


def test_flops_of_two_layers_agree(plan) -> None:
    two_layers = dataclasses.replace(CONFIG.model, num_layers=2)
    assert plan.flops_check.by_arithmetic == 64 * flops_per_token(two_layers, 64)
    assert 0 < plan.flops_check.relative_difference < 0.35  # what is small in a real model is not at this width


def test_the_step_takes_at_least_what_its_slowest_resource_takes(plan) -> None:
    flops = flops_per_token(CONFIG.model, 64) * 16 * 64
    assert plan.roofline.compute == pytest.approx(flops / 8e9)
    assert plan.roofline.network == pytest.approx(sum(sent.sent_bytes for sent in plan.traffic.values()) / 1e9)
    assert plan.roofline.seconds == max(plan.roofline.compute, plan.roofline.hbm, plan.roofline.network)
    assert plan.mfu_bound == pytest.approx(flops / 8e9 / plan.roofline.seconds)


def test_report(plan) -> None:
    values = training_json(plan, Budget(days=2.0, tokens=None))
    assert values["memory"]["peak_bytes"] == plan.memory.peak_bytes
    assert values["memory"].keys() >= {"argument_bytes", "temporary_bytes", "peak_bytes"}
    assert values["fits"]
    assert not values["advice"]
    assert values["days"] == pytest.approx(5000 * 16 * 64 / values["tokens_per_second"] / 86400)
    assert values["budget"]["tokens"] == pytest.approx(2 * 86400 * values["tokens_per_second"], rel=1e-3)
    table = training_table(plan, Budget(days=2.0, tokens=1e6))
    for part in ("it fits", "all-gather", "over fsdp", "bottleneck", "MFU", "1.000e+06 tokens take"):
        assert part in table


def test_what_to_change_comes_in_order_and_helps() -> None:
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=4))
    whole = estimate_training(config, here())
    assert whole.fits
    assert not whole.advice
    targets = [
        here()._replace(chip=SLOW_CHIP._replace(hbm_bytes=size)) for size in (2**16, whole.estimated_peak_bytes - 1)
    ]
    never, nearly = (estimate_training(config, target) for target in targets)
    assert [sentence.split(":")[0] for sentence in never.advice] == [
        "--mesh.data 1 --mesh.fsdp 8",
        "--training.accumulation-steps 2",
        "--model.remat full",
        "--optimizer.first-moment-dtype bfloat16",
        "--optimizer.offload-state",
        "--mesh.data 1 --mesh.fsdp 4 --mesh.tensor 2 --training.accumulation-steps 4",
        "more devices",  # two key heads cannot be divided again
    ]
    assert [sentence.split(":")[0] for sentence in nearly.advice] == ["--mesh.data 1 --mesh.fsdp 8"]


def test_the_least_that_must_be_sent() -> None:
    mesh = {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2, "expert": 1}
    found = minimum_traffic(CONFIG, mesh)
    layer = 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 128
    weights = (4 * layer + 2 * 512 * 64) / 2
    assert found[Collective("all-gather", "fsdp", "bf16")].sent_bytes == 2 * 2 * weights / 2
    assert found[Collective("reduce-scatter", "fsdp", "bf16")].sent_bytes == 2 * weights / 2
    assert found[Collective("all-reduce", "data", "f32")].sent_bytes == 4 * weights / 2
    tokens = 16 * 64 / 4
    assert found[Collective("all-reduce", "tensor", "bf16")].sent_bytes == 16 * 2 * tokens * 64


@pytest.mark.parametrize(
    ("message", "needed", "temporaries", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 28.50G "
            "of 15.75G hbm. Exceeded hbm capacity by 12.75G.\nTotal hbm usage >= 28.75G:",
            int(28.5 * 2**30), None, int(15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (43.50G) "
            "exceeds available HBM (15.75G).",
            None, int(43.5 * 2**30), int(15.75 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: something else", None, None, None),
    ],
)  # fmt: skip
def test_what_the_compiler_says_of_a_lack_of_memory(message, needed, temporaries, limit) -> None:
    found = parse_out_of_memory(message)
    assert (found.needed_bytes, found.temporary_bytes, found.limit_bytes) == (needed, temporaries, limit)
    assert found.message == message.splitlines()[0]


def test_devices_that_are_only_counted() -> None:
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2, tensor=2))
    plan = estimate_training(config, devices_of_kind("NVIDIA H100 80GB HBM3", 8))
    assert plan.mesh == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2, "expert": 1}
    assert plan.chip == chip("NVIDIA H100 80GB HBM3")
    assert plan.fits
    assert plan.roofline.network > 0
    with pytest.raises(InputError, match="--fast"):
        plan_training(config, devices_of_kind("NVIDIA H100 80GB HBM3", 8))


def test_a_mesh_or_a_batch_that_does_not_go_with_the_devices() -> None:
    with pytest.raises(InputError, match="does not use 8 devices"):
        estimate_training(dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=3)), here())
    small = dataclasses.replace(CONFIG, training=TrainingConfig(global_batch_size=4))
    with pytest.raises(InputError, match="global_batch_size"):
        estimate_training(small, here())
