"""Several TPU slices: what the TPU compiler makes of a train step on a mesh that spans them, without a TPU.

Between slices it sends and receives over the data-center network; within one, collectives run over the chips' own.
"""

import os
import re

import jax
import jax.numpy as jnp
import pytest

from nextllm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from nextllm_jax.model.objective import Batch
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training.program import build_program

pytestmark = pytest.mark.tpu

B, T = 16, 128


def compiled(
    topology_name: str, slices: int, mesh: MeshConfig, accumulation_steps: int = 1
) -> tuple[jax.sharding.Mesh, str]:
    """The mesh, and the compiled program of a train step."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    several = {"num_slices": slices} if slices > 1 else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name, **several)
    model = ModelConfig(
        vocab_size=512, num_layers=2, embed_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=2, head_dim=64,
        context_length=T, dtype="bfloat16",
    )  # fmt: skip
    config = Config(
        model=model,
        data=DataConfig(vocab_size=512, sequence_length=T),
        training=TrainingConfig(global_batch_size=B, accumulation_steps=accumulation_steps),
        mesh=mesh,
    )
    devices = make_mesh(config.mesh, topology.devices)
    # Whatever precision other tests have asked of this process, which no bfloat16 kernel takes.
    with jax.set_mesh(devices), jax.default_matmul_precision("default"):
        program = build_program(config, devices)
        numbers, mask = (
            jax.ShapeDtypeStruct((B, T), dtype, sharding=sharding(devices, "batch", "seq"))
            for dtype in (jnp.int32, bool)
        )
        batch = Batch(*[mask if name == "loss_mask_BT" else numbers for name in Batch._fields])
        return devices, program.train_step.lower(program.abstract_state, batch).compile().as_text()


def collectives(program: str) -> list[str]:
    return [
        line
        for line in program.splitlines()
        if re.search(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line)
    ]


def groups_of(line: str) -> list[list[int]]:
    """The partitions that take part in a collective together."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", line)
    assert listed, line
    return [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]


@pytest.fixture(autouse=True)
def no_metadata_server(monkeypatch):
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.mark.parametrize(
    ("inside", "accumulation_steps"),
    [pytest.param({"fsdp": 4}, 1, marks=pytest.mark.slow), ({"fsdp": 2, "tensor": 2}, 2)],
)
def test_only_sums_over_data_cross_slices(inside, accumulation_steps):
    mesh, program = compiled("v5e:2x2", 2, MeshConfig(slices=2, **inside), accumulation_steps)
    assert mesh.shape["data"] == 2
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    within = collectives(program)
    assert within
    # A program of several slices numbers the partitions of one.
    assert {number for line in within for group in groups_of(line) for number in group} == set(range(4))
    crossing = re.findall(r'_xla_megascale_transfer_type="(\w+)"', program)
    operations = re.findall(r'_xla_megascale_reduce_operation="(\w+)"', program)
    assert set(crossing) == {"ALL_REDUCE"}
    assert set(operations) == {"SUM"}
    sent = re.findall(r"= \(((?:bf16|f32)\[[\d,]+\])[^=]* send\(", program)
    assert len(sent) >= 8  # a gradient of each matrix's shard, beside norms and sums of the loss


def test_one_slice_has_no_transfers_between_slices_and_follows_its_torus():
    mesh, program = compiled("v5e:4x4", 1, MeshConfig(data=2, fsdp=4, tensor=2))
    assert "megascale" not in program
    for part in mesh.devices.reshape(2 * 4, 2):  # the axis with the most traffic joins neighbours
        apart = [abs(a - b) for a, b in zip(part[0].coords, part[1].coords, strict=True)]
        assert sum(apart) == 1
