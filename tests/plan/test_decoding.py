"""Prefill and a decode step, on simulated devices of this machine; quantized, for TPUs and GPUs."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest

from nextllm_jax.config import MeshConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import chip
from nextllm_jax.inference.decode import decode
from nextllm_jax.inference.load import decoding_model
from nextllm_jax.inference.programs import Network, create
from nextllm_jax.inference.slot import IDLE, stacked
from nextllm_jax.model.quantize import is_quantized
from nextllm_jax.plan import hlo
from nextllm_jax.plan.decoding import Request, bytes_on_device, plan_decoding
from nextllm_jax.plan.report import decoding_json, decoding_table
from nextllm_jax.plan.topology import Target
from nextllm_jax.sharding import make_mesh, on_device, placed
from tests.plan.test_training import CONFIG, SLOW_CHIP, here

REQUEST = Request(batch_size=4, prompt_tokens=16, new_tokens=16)


def test_prefill_and_a_decode_step() -> None:
    model = dataclasses.replace(CONFIG.model, remat="full", remat_offload=True)  # which decoding has no use for
    config = dataclasses.replace(CONFIG, model=model, mesh=MeshConfig(data=4, tensor=2))
    plan = plan_decoding(config, here(), REQUEST)
    assert plan.decode is not None
    # Keys and values of 4 layers, 2 heads of 16, 4 rows of 32 slots, in float32; a row and a head on a device.
    assert plan.cache_bytes == 2 * 4 * 2 * 16 * 4 * 32 * 4
    cache_on_a_device = plan.cache_bytes / 8
    decode, prefill = plan.decode.compiled.memory, plan.prefill.compiled.memory
    counts_and_biases = 512 // 2 * (4 + 4)  # of a row, divided over 2 devices
    state = decode.argument_bytes - plan.parameter_bytes
    assert cache_on_a_device < state - counts_and_biases < 1.2 * cache_on_a_device
    assert decode.alias_bytes >= cache_on_a_device  # both are written in place
    assert cache_on_a_device < prefill.output_bytes - counts_and_biases < 1.2 * cache_on_a_device
    assert {collective.axes for collective in plan.decode.traffic} >= {"tensor"}
    values = decoding_json(plan)
    assert values["decode"]["tokens"] == 4
    assert values["prefill"]["tokens"] == 4 * 16
    assert values["decode"]["roofline"]["bound"] in ("hbm", "network")
    assert "a decode step" in decoding_table(plan)


def test_rows_and_lengths_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="batch_size 4 is not divisible by"):
        plan_decoding(CONFIG, here(), REQUEST)
    long = dataclasses.replace(REQUEST, batch_size=8, new_tokens=4000)
    with pytest.raises(InputError, match="context_length 2048"):
        plan_decoding(CONFIG, here(), long)


def test_quantized_weights_count_as_they_are_kept() -> None:
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, tensor=2))
    plan = plan_decoding(config, here(), REQUEST, Quantization(scheme="int8"))
    # By layer q, o: 64 x 64; k, v: 64 x 32; gate, up, down: 64 x 128. A device has half of each, and a float32 scale
    # for each of its outputs, but all 64 of o and down. Two norms a layer and one at the end are whole.
    matrices = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) // 2
    scales = 4 * (64 + 2 * 32 + 2 * 128) // 2 + 4 * 2 * 64
    table, norms = 512 // 2 * 64 * 4, (2 * 4 + 1) * 64 * 4
    assert plan.parameter_bytes == matrices + 4 * scales + 2 * table + norms
    read = plan.parameter_bytes - table + plan.cache_bytes / 8  # the embedding is read by row, the head is not
    assert plan.decode.roofline.hbm == pytest.approx(read / SLOW_CHIP.hbm_bandwidth)
    assert plan.decode.compiled.memory.argument_bytes < 1.1 * (plan.parameter_bytes + plan.cache_bytes / 8)
    assert decoding_json(plan)["quantization"] == {
        "scheme": "int8", "group_size": None, "symmetric": False, "embeddings": "none"
    }  # fmt: skip
    assert "int8 by output channel" in decoding_table(plan)


@pytest.mark.parametrize(("symmetric", "bytes_a_weight"), [(True, 1 / 2 + 2 / 32), (False, 1 / 2 + 4 / 32)])
def test_two_int4_weights_are_a_byte(symmetric, bytes_a_weight) -> None:
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    place = functools.partial(placed, mesh)
    _, params = decoding_model(
        CONFIG.model, np.dtype("float32"), place, Quantization(scheme="int4", symmetric=symmetric)
    )
    up = params["remainder_0"]["mlp"]["up"]["kernel"]
    assert bytes_on_device(up) == 64 * 128 / 2 * bytes_a_weight


WIDE = dataclasses.replace(
    CONFIG.model, vocab_size=640, num_layers=2, embed_dim=256, mlp_dim=1536, num_heads=8, num_kv_heads=4, head_dim=128,
    dtype="auto",
)  # fmt: skip


@pytest.mark.tpu
def test_a_tpu_updates_the_cache_in_place_and_gathers_no_weights(four_tpus) -> None:
    """Writes keep the layout that attention reads, so the cache is not copied from one layout to another."""
    target = Target("v5e:2x2", four_tpus[0].device_kind, chip(four_tpus[0].device_kind), 4, list(four_tpus))
    config = dataclasses.replace(CONFIG, model=WIDE, mesh=MeshConfig(data=1, tensor=4))
    with jax.default_matmul_precision("default"):
        plan = plan_decoding(config, target, Request(batch_size=16, prompt_tokens=2000, new_tokens=48))
    layer_size = 16 * 1 * 2048 * 128  # keys of a layer on a device
    copies = [
        instruction.shapes.split("[")[1].split("]")[0]
        for computation in hlo.parse(plan.decode.compiled.hlo).computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode in ("copy", "transpose")
    ]
    assert max(math.prod(map(int, shape.split(","))) for shape in copies if shape) < layer_size
    assert plan.decode.compiled.memory.temporary_bytes < 0.5 * plan.cache_bytes / 4
    gathered = sum(traffic.sent_bytes for kind, traffic in plan.decode.traffic.items() if kind.kind == "all-gather")
    assert gathered < 1e5


@pytest.mark.tpu
@pytest.mark.parametrize(("scheme", "batch_size"), [("int8", 16), ("int4", 1), ("int4", 16)])
def test_a_tpu_holds_no_float_copy_of_a_quantized_matrix(four_tpus, scheme, batch_size) -> None:
    target = Target("v5e:2x2", four_tpus[0].device_kind, chip(four_tpus[0].device_kind), 4, list(four_tpus))
    config = dataclasses.replace(CONFIG, model=WIDE, mesh=MeshConfig(data=1, tensor=4))
    request = Request(batch_size=batch_size, prompt_tokens=16, new_tokens=8)
    with jax.default_matmul_precision("default"):
        plan = plan_decoding(config, target, request, Quantization(scheme=scheme))
    # q and o of two heads, k and v of one, a quarter of gate, up and down.
    sizes = {256 * 2 * 128, 256 * 128, 256 * 384}
    program = hlo.parse(plan.decode.compiled.hlo)
    fused = {
        name
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "fusion"
        for name in instruction.callees
    }
    shapes = re.findall(
        r"\b(?:bf16|f32)\[([\d,]+)\]",
        " ".join(
            instruction.shapes
            for name, computation in program.computations.items()
            if name not in fused
            for instruction in computation.instructions.values()
        ),
    )
    assert shapes
    assert not [shape for shape in shapes if math.prod(map(int, shape.split(","))) in sizes]
    kernels = plan.decode.compiled.hlo.count('custom_call_target="tpu_custom_call"')
    assert kernels == (2 * 7 if (scheme, batch_size) == ("int4", 16) else 0)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_gpu_converts_quantized_matrices_at_the_product(scheme) -> None:
    """The decode step, lowered for CUDA: each matrix stays an argument of small integers, with one use converted."""
    place = functools.partial(on_device, device=jax.devices()[0])
    model, params = decoding_model(CONFIG.model, np.dtype("bfloat16"), place, Quantization(scheme=scheme))
    state = jax.eval_shape(functools.partial(create, model, None, num_slots=4, length=32))
    limits = np.int32(1), np.bool_(False)
    rows, allowed_BW = stacked([IDLE] * 4), np.zeros((4, 16), np.uint32)
    network = Network(model, params)
    traced = decode.trace(network, None, state, rows, allowed_BW, None, *limits, vocab_size=512, length=32)
    lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    kind = {"int8": "i8", "int4": "i4"}[scheme]
    num_quantized = sum(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
    (main,) = (line for line in lines if "@main(" in line)
    assert main.count(f"x{kind}>") == num_quantized == 4 * 7
    converted = [i for i, line in enumerate(lines) if re.search(rf"convert .*\(tensor<[\dx]+{kind}>\)", line)]
    assert len(converted) == 7  # of a layer, which is one function for all
    for i in converted:
        (use,) = _uses(lines[i].split()[0], lines[i + 1 :])
        assert "dot_general" in use


def _uses(name: str, lines: list[str]) -> list[str]:
    """The lines that use a value, up to where its name stands for another."""
    end = next((i for i, line in enumerate(lines) if line.split()[:2] == [name, "="]), len(lines))
    return [line for line in lines[:end] if re.search(rf"{name}\b", line)]
