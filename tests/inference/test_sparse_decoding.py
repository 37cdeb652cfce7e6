"""Sampling from models with experts: tokens of full forwards, and a decode step that reads the chosen experts only."""

import dataclasses
import functools
import itertools
import json
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nextllm_jax
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.cli.sample import sample_command
from nextllm_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.diagnostics import reference
from nextllm_jax.inference.decode import decode
from nextllm_jax.inference.engine import Engine
from nextllm_jax.inference.load import decoding_model
from nextllm_jax.inference.programs import Network, create
from nextllm_jax.inference.slot import IDLE, stacked
from nextllm_jax.model.quantize import convert
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.model.weights import unstack_layers
from nextllm_jax.sharding import make_mesh, on_device, on_mesh, placed
from tests.inference.test_engine import GREEDY, PROMPTS, TOKENS, VOCAB, run
from tests.inference.test_llm import TOKENIZER
from tests.parameters import random_params

CONFIG = ModelConfig(
    vocab_size=96, num_layers=3, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8, context_length=160,
    num_experts=16, experts_per_token=2, expert_mlp_dim=24, mlp_pattern=("dense", "sparse"), shared_expert_mlp_dim=8,
    dtype="float32", capacity_factor=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return random_params(nn.meta.unbox(abstract_params(CONFIG)))


def engine(params, scan_layers=True):
    model = Transformer(CONFIG.for_inference(), jnp.dtype("float32"), scan_layers=scan_layers)
    return Engine(model, params, num_slots=4, max_length=48, vocab_size=VOCAB)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_tokens_are_those_of_full_forwards_without_a_limit_on_experts(params, scan_layers):
    weights = params if scan_layers else unstack_layers(CONFIG, params)
    found = run(weights, PROMPTS, GREEDY, within=engine(weights, scan_layers))
    config = dataclasses.replace(CONFIG, capacity_factor=None)
    for prompt, row in zip(PROMPTS, found, strict=True):
        logits_TV = reference.forward(params, config, np.array([[*prompt, *row]]))[0, :, :VOCAB]
        expected = np.argmax(logits_TV, axis=1)[len(prompt) - 1 : -1]
        assert row == expected.tolist()
        assert len(row) == TOKENS


def lowered_decode(rows, quantization=None, mesh=None):
    place = functools.partial(placed, mesh) if mesh else functools.partial(on_device, device=jax.devices()[0])
    model, params = decoding_model(CONFIG, np.dtype("float32"), place, quantization)
    with on_mesh(mesh):
        state = jax.eval_shape(functools.partial(create, model, None, num_slots=rows, length=32))
        arguments = stacked([IDLE] * rows), np.zeros((rows, 3), np.uint32), None, np.int32(1), np.bool_(False)
        return decode.lower(Network(model, params), None, state, *arguments, vocab_size=VOCAB, length=32)


def test_no_device_of_a_mesh_has_the_int8_matrices_of_all_experts():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2))
    text = lowered_decode(8, Quantization(scheme="int8"), mesh).compile().as_text() or ""
    sizes = r"(?:12|16|24|32)"  # width and inner width of an expert, whole or one of two shards
    assert re.search(rf"s8\[{CONFIG.num_experts // 2},{sizes},{sizes}\]", text)
    assert not re.search(rf"s8\[{CONFIG.num_experts},{sizes},{sizes}\]", text)


@pytest.mark.tpu
def test_a_decode_step_compiles_for_tpus_that_shard_neither_its_tokens_nor_all_scales_evenly(four_tpus):
    """XLA cannot shard kernels itself. A step has one position, and `down` has scales of three groups of inputs."""
    mesh = make_mesh(MeshConfig(data=1, sequence=2, tensor=2), four_tpus)
    text = lowered_decode(4, Quantization(scheme="int4", group_size=8), mesh).compile().as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # gate, up and down


@pytest.mark.parametrize("quantization", [None, Quantization(scheme="int8")])
def test_a_decode_step_reads_the_matrices_of_chosen_experts_only(quantization):
    """Each product is in a loop over the experts in use, at most rows x experts_per_token, and takes one matrix."""
    text = lowered_decode(2, quantization).compile().as_text() or ""
    E, D, F = CONFIG.num_experts, CONFIG.embed_dim, CONFIG.expert_mlp_dim
    whole = rf"\w+\[{E},(?:{D},{F}|{F},{D})\]"
    results = re.findall(rf"= ({whole})\S* (\w[\w-]*)\(", text)
    assert {opcode for _, opcode in results} <= {"parameter", "get-tuple-element", "bitcast"}
    taken = re.findall(rf"= \w+\[1,(?:{D},{F}|{F},{D})\]\S* dynamic-slice\(", text)
    assert len(taken) >= 3


def test_experts_that_no_token_chose_do_not_matter(params):
    """Their matrices are not numbers, and the tokens stay the same."""
    expected = run(params, PROMPTS[:1], GREEDY, within=engine(params))
    chosen = chosen_experts(params, [*PROMPTS[0], *expected[0]])
    assert 2 <= len(chosen) < CONFIG.num_experts
    spoilt = jax.tree.map(np.copy, params)
    for matrix in spoilt["layers"]["block_1"]["mlp"]["experts"].values():
        unused = [expert for expert in range(CONFIG.num_experts) if expert not in chosen]
        matrix["kernel"][0, unused] = np.nan
    # The slots without a request decode token 0, which chooses experts too.
    one = Engine(Transformer(CONFIG.for_inference()), spoilt, num_slots=1, max_length=48, vocab_size=VOCAB)
    assert run(spoilt, PROMPTS[:1], GREEDY, within=one) == expected


def chosen_experts(params, tokens):
    """The experts that these tokens choose in the one sparse layer."""
    model = Transformer(CONFIG.for_inference())
    tokens_BT = np.array([tokens])
    positions_BT = np.arange(len(tokens), dtype=np.int32)[None]
    _, recorded = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(
        {"params": params}, tokens_BT, positions_BT
    )
    sums = recorded["intermediates"]["layers"]["block_1"]["mlp"]["router"]["routing"][0]
    return set(np.flatnonzero(sums.tokens_E[0]).tolist())


def test_int8_experts_give_nearly_the_same_logits(params):
    place = functools.partial(on_device, device=jax.devices()[0])
    model, wanted = decoding_model(CONFIG, np.dtype("float32"), place, Quantization(scheme="int8"))
    weights = unstack_layers(CONFIG, params)
    rounded = jax.tree.map(convert, weights, wanted)
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (2, 16))
    positions_BT = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens_BT, positions_BT)[0])
    exact, found = apply(weights), apply(rounded)
    assert 0 < np.abs(found - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = Config(
        model=dataclasses.replace(CONFIG, vocab_size=264, num_experts=8),
        data=DataConfig(sequence_length=32, tokenizer="gpt2"),
    )
    (directory / "config.json").write_text(config.to_json())
    TOKENIZER.save(directory / "tokenizer")
    with Checkpoints(directory / "checkpoints") as checkpoints:
        params = random_params(nn.meta.unbox(abstract_params(config.model)))
        checkpoints.save(1, {"params": jax.tree.map(jnp.asarray, params)}, {}, validation_loss=2.0)
    return str(directory)


@functools.cache
def on_one_device(run_directory, quantize):
    llm = nextllm_jax.load(run_directory, quantize=quantize)
    return [llm.generate(MESH_PROMPTS, max_new_tokens=12, **settings) for settings in SAMPLINGS]


MESH_PROMPTS = ["ab", "c", "defg"]  # a number that most meshes do not divide
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}]
AXES = ("data", "fsdp", "tensor", "expert")
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2), (2, 4, 8)) if math.prod(sizes) == 8]


@pytest.mark.parametrize(
    ("sizes", "quantize"),
    [
        pytest.param(sizes, quantize, marks=() if (sizes, quantize) == ((1, 2, 2, 2), "int8") else pytest.mark.slow)
        for sizes, quantize in itertools.product(MESHES, ("none", "int8"))
    ],
    ids=str,
)
def test_on_a_mesh_the_tokens_are_those_of_one_device(run_directory, sizes, quantize, capsys):
    command = ["--checkpoint", run_directory, "--quantize", quantize, "--max-new-tokens", "12", "--json"]
    command += [option for prompt in MESH_PROMPTS for option in ("--prompt", prompt)]
    command += [option for axis, size in zip(AXES, sizes, strict=True) for option in (f"--mesh.{axis}", str(size))]
    for settings, expected in zip(SAMPLINGS, on_one_device(run_directory, quantize), strict=True):
        options = [option for name, value in settings.items() for option in (f"--{name}", str(value))]
        assert sample_command([*command, *options]) == 0
        *found, _ = map(json.loads, capsys.readouterr().out.splitlines())
        assert found == [sample.as_dict() for sample in expected]
