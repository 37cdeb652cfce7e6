"""Collectives of programs that say by hand what they send, compiled for eight simulated devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nextllm_jax.plan.collectives import Collective, collectives
from nextllm_jax.plan.hlo import parse, sizes

MESH_SHAPE = {"data": 2, "fsdp": 4}
SCAN_LENGTH = 5
LOCAL_BYTES = 8 * 16 * 4  # of a shard [8, 16] of float32


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compiled_text(mesh, function, *shapes):
    spec = PartitionSpec(("data", "fsdp"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def gather(x, axis):
    return jax.lax.all_gather(x, axis, tiled=True).sum(axis=0, keepdims=True) + x


def scatter(x, axis):
    return x + jax.lax.psum_scatter(jnp.concatenate([x * i for i in range(4)]), axis, tiled=True)


def exchange(x, axis):
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def shift(x, axis):
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % 4) for i in range(4)])


@pytest.mark.parametrize("in_scan", [False, True])
@pytest.mark.parametrize(
    ("step", "axis", "kind", "axes", "sent"),
    [
        (gather, "fsdp", "all-gather", "fsdp", 4 * LOCAL_BYTES * 3 / 4),
        (gather, "data", "all-gather", "data", 2 * LOCAL_BYTES / 2),
        (scatter, "fsdp", "reduce-scatter", "fsdp", 4 * LOCAL_BYTES * 3 / 4),
        (jax.lax.psum, "fsdp", "all-reduce", "fsdp", 2 * LOCAL_BYTES * 3 / 4),
        (jax.lax.psum, ("data", "fsdp"), "all-reduce", "data+fsdp", 2 * LOCAL_BYTES * 7 / 8),
        (exchange, "fsdp", "all-to-all", "fsdp", LOCAL_BYTES * 3 / 4),
        (shift, "fsdp", "collective-permute", "fsdp", LOCAL_BYTES),
    ],
)
def test_one_collective(mesh, step, axis, kind, axes, sent, in_scan) -> None:
    def function(x):
        if not in_scan:
            return step(x, axis)
        # What a step sends depends on the step before, so that nothing can be moved out of the loop.
        return jax.lax.scan(lambda x, _: (jnp.sin(step(x, axis)), None), x, None, length=SCAN_LENGTH)[0]

    found = collectives(compiled_text(mesh, function, (64, 16)), MESH_SHAPE)
    times = SCAN_LENGTH if in_scan else 1
    assert found.traffic == {Collective(kind, axes, "f32"): (times, times * sent)}
    assert found.unknown_loops == 0


def test_loops_in_loops_and_calls(mesh) -> None:
    def inner(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(jax.lax.psum(x, "fsdp")), x)

    def function(x):
        x = jax.lax.scan(lambda x, _: (inner(x) + jax.lax.psum(x, "data"), None), x, None, length=SCAN_LENGTH)[0]
        return jax.checkpoint(lambda x: jax.lax.psum(x, "data"))(x)

    found = collectives(compiled_text(mesh, function, (64, 16)), MESH_SHAPE).traffic
    assert found[Collective("all-reduce", "fsdp", "f32")].count == 3 * SCAN_LENGTH
    assert found[Collective("all-reduce", "data", "f32")].count == SCAN_LENGTH + 1
    assert found[Collective("all-reduce", "data", "f32")].sent_bytes == (SCAN_LENGTH + 1) * LOCAL_BYTES


def test_a_loop_of_unknown_length_counts_once_and_says_so(mesh) -> None:
    def function(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: jnp.exp(jax.lax.psum(x, "fsdp")), x)

    found = collectives(compiled_text(mesh, function, (64, 16)), MESH_SHAPE)
    assert found.traffic[Collective("all-reduce", "fsdp", "f32")].count == 1
    assert found.unknown_loops == 1


def test_sharded_matrix_product_gathers_its_weights(mesh) -> None:
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    w = jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    whole = NamedSharding(mesh, PartitionSpec(None, None))

    def product(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole))

    text = jax.jit(product, out_shardings=x.sharding).lower(x, w).compile().as_text()
    assert collectives(text, MESH_SHAPE).traffic == {
        Collective("all-gather", "fsdp", "f32"): (1, 64 * 48 * 4 * 3 / 4),
    }


def test_the_forms_that_a_tpu_program_has() -> None:
    found = collectives((Path(__file__).parent / "tpu_program.hlo").read_text(), MESH_SHAPE)
    assert found.traffic == {
        # Started once, though its steps are shown in a loop and at the end.
        Collective("all-gather", "fsdp", "bf16"): (1, 3 * 32 * 384 * 2),
        # An all-reduce and a slice, in one fusion.
        Collective("reduce-scatter", "fsdp", "bf16"): (1, 128 * 8 * 2 * 3 / 4),
        # From 1 in steps of 2 to 9.
        Collective("collective-permute", "fsdp", "bf16"): (4, 4 * 32 * 16 * 2),
        # In one branch of two.
        Collective("all-reduce", "data", "f32"): (1, 2 * 16 / 2),
        Collective("all-reduce", "data+fsdp", "f32"): (1, 2 * 16 * 7 / 8),
        # Groups {0, 2, 4, 6} and {1, 3, 5, 7} are no axes of this mesh.
        Collective("reduce-scatter", "other", "f32"): (1, 32 * 4 * 3 / 4),
    }
    assert found.unknown_loops == 0


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['a'=2,'b'=4] {'a'}", "data"),
        ("mesh['a'=2,'b'=4] {'b'}", "fsdp"),
        ("mesh['a'=8] {'a':(2)4}", "fsdp"),
        ("mesh['a'=8] {'a':(1)2}", "data"),
        ("mesh['a'=8] {'a':(4)2}", "other"),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "fsdp"),
        ("mesh['a'=2,'b'=4], device_ids=(0,1,2,3,4,5,6,7) {'a','b'}", "data+fsdp"),
        ("[2,4]<=[8]", "fsdp"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("[1,8]<=[8]", "data+fsdp"),
        ("{{3,2,1,0},{4,5,6,7}}", "fsdp"),
        ("{{0,5},{1,4},{2,7},{3,6}}", "other"),
    ],
)
def test_groups_are_mesh_axes(groups, axes) -> None:
    text = f"""HloModule m

ENTRY %main (p: f32[16]) -> f32[16] {{
  %p = f32[16]{{0}} parameter(0)
  ROOT %r = f32[16]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%a
}}
"""
    ((found, _),) = collectives(text, MESH_SHAPE).traffic.items()
    assert found.axes == axes


@pytest.mark.parametrize("attribute", ["replica_groups=[8,1]<=[8]", "source_target_pairs={{0,0},{1,1}}"])
def test_what_stays_on_its_device_is_not_sent(attribute) -> None:
    opcode = "collective-permute" if "pairs" in attribute else "all-reduce"
    text = f"""HloModule m

ENTRY %main (p: f32[16]) -> f32[16] {{
  %p = f32[16]{{0}} parameter(0)
  ROOT %r = f32[16]{{0}} {opcode}(%p), {attribute}
}}
"""
    assert collectives(text, MESH_SHAPE).traffic == {}


def test_between_slices_a_program_sends() -> None:
    text = """HloModule m

ENTRY %main (p: bf16[16]) -> bf16[16] {
  %p = bf16[16]{0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[16]{0}, u32[], token[]) send(%p, %token), channel_id=2, is_host_transfer=true, """ + (
        """frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2
  ROOT %r = bf16[16]{0} all-reduce(%p), replica_groups={{0,1,2,3}}
}
"""
    )
    assert collectives(text, MESH_SHAPE, slices=2).traffic == {
        Collective("all-reduce", "slices", "bf16"): (1, 2 * 32 / 2),
        Collective("all-reduce", "fsdp", "bf16"): (1, 2 * 32 * 3 / 4),
    }


def test_sizes_by_type() -> None:
    shapes = "(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[], /*index=2*/(s4[10], pred[7]), u32[<=5]{0}, f8e4m3fn[4])"
    assert sizes(shapes) == {"bf16": 12, "f32": 4, "s4": 5, "pred": 7, "u32": 20, "f8e4m3fn": 4}


def test_every_instruction_is_read(mesh) -> None:
    text = compiled_text(mesh, lambda x: jnp.sin(jax.lax.psum(x, "fsdp")), (64, 16))
    program = parse(text)
    assert program.entry in program.computations
    lines = sum(" = " in line and line.startswith("  ") for line in text.splitlines())
    assert sum(len(computation.instructions) for computation in program.computations.values()) == lines
    assert np.all([computation.root for computation in program.computations.values()])
