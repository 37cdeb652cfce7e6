"""GGUF files: against transformers' own reader, round trips in every type, and files that must be refused."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")
pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")

import gguf
from gguf import quants

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.interop import huggingface
from nextllm_jax.interop.canonical import canonical
from nextllm_jax.interop.gguf import GGUFFile, export
from nextllm_jax.model.quantize import abstract_quantized
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.ops.quantized import dequantize
from nextllm_jax.tokenizer.gguf import from_gguf, to_gguf
from tests.interop.families import TIME, save_model
from tests.interop.models import CONFIG, TOKENIZER, assert_equal_trees, on_one_device, random_params

SCALED: dict[str, Any] = {"num_kv_heads": 4, "tie_embeddings": False, "rope_theta": 5e5}
GEMMA: dict[str, Any] = {
    "activation": "gelu_tanh", "norm_scale_offset": 1.0, "embedding_scale": 32**0.5, "norm_eps": 1e-6,
}  # fmt: skip
GRANITE: dict[str, Any] = {
    "embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.0625, "logit_divisor": 8.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": SCALED,
    "llama of odd heads with biases": {"head_dim": 6, "attention_bias": True, "attention_output_bias": True},
    "llama 3.1": {**SCALED, "rope_scaling": "llama3", "rope_scaling_factor": 8.0},
    "llama, linear": {"rope_scaling": "linear", "rope_scaling_factor": 4.0},
    "llama, yarn": {"rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_original_context_length": 16},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "olmo2": {"norm_placement": "post", "qk_norm": True, "qk_norm_over": "projection", "tie_embeddings": False},
    "smollm3": {"num_layers": 5, "layer_pattern": ("global", "global", "global", "global_nope")},
    "granite": GRANITE,
    "phi3": {
        "layer_pattern": ("local",), "sliding_window": 20, "rope_scaling": "longrope", "rope_scaling_factor": 4.0,
        "rope_original_context_length": 16, "rope_short_factors": (1.0, 1.5, 2.0, 3.0),
        "rope_long_factors": (2.0, 3.0, 4.0, 5.0),
    },
    "llama with experts": {**SCALED, "num_experts": 4, "expert_mlp_dim": 32},
    "olmoe": {
        **SCALED, "qk_norm": True, "qk_norm_over": "projection", "num_experts": 5, "mlp_dim": 32,
        "normalize_expert_weights": False,
    },
    "qwen2moe": {
        "attention_bias": True, "tie_embeddings": False, "num_experts": 4, "expert_mlp_dim": 32,
        "shared_expert_mlp_dim": 96, "shared_expert_gate": True, "normalize_expert_weights": False,
    },
    "qwen3moe": {"qk_norm": True, "num_experts": 6, "experts_per_token": 3, "expert_mlp_dim": 32},
    "granitemoe": {**GRANITE, "num_experts": 4},
    "granitemoe with a shared expert": {**GRANITE, "num_experts": 4, "mlp_dim": 32, "shared_expert_mlp_dim": 96},
    "gemma": {**GEMMA},
    "gemma2": {
        **GEMMA, "norm_placement": "sandwich", "layer_pattern": ("local", "global"), "sliding_window": 20,
        "attention_soft_cap": 50.0, "logit_soft_cap": 30.0,
    },
    "gemma3": {
        **GEMMA, "norm_placement": "sandwich", "layer_pattern": ("local",) * 5 + ("global",), "num_layers": 7,
        "sliding_window": 20, "qk_norm": True, "rope_local_theta": 1e4, "rope_theta": 1e6,
        "rope_scaling": "linear", "rope_scaling_factor": 8.0,
    },
}  # fmt: skip


def make_config(name: str) -> ModelConfig:
    fields = {field: getattr(CONFIG, field) for field in ModelConfig.__dataclass_fields__}
    return ModelConfig(**fields | MODELS[name])


def write(config: ModelConfig, file: Path, dtype: str = "float32", **options: Any) -> Any:
    params = random_params(config)
    export(config, params, file, vocab_size=config.vocab_size, dtype=dtype, metadata=to_gguf(TOKENIZER), **options)
    return params


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_the_identity(name, tmp_path):
    config = make_config(name)
    params = write(config, tmp_path / "model.gguf", model_type="phi3" if name == "phi3" else None)
    file = GGUFFile(tmp_path / "model.gguf")
    ours, theirs = canonical(config), canonical(file.config)
    for field in ModelConfig.__dataclass_fields__:
        value = getattr(ours, field)
        close = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert getattr(theirs, field) == close, field
    assert file.metadata["general.architecture"] == name.split()[0].rstrip(",")
    loaded = file.load_params(on_one_device(file.config))
    if config.norm_scale_offset:  # which the file has added, and rounded
        jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, atol=1e-6), loaded, params)
    else:
        assert_equal_trees(loaded, params)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3), ("q8_0", 8e-3)])
def test_smaller_types_round_the_matrices_alone(tmp_path, dtype, tolerance):
    params = write(CONFIG, tmp_path / "model.gguf", dtype)
    loaded = GGUFFile(tmp_path / "model.gguf").load_params(on_one_device(CONFIG))
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(loaded), strict=True):
        if path[-1].key == "scale":
            np.testing.assert_array_equal(left, right)
        else:
            assert 0 < np.abs(left - right).max() <= tolerance * np.abs(left).max()


def test_quantized_experts_are_kept_bit_for_bit(tmp_path):
    config = dataclasses.replace(make_config("qwen3moe"), head_dim=32, num_layers=2)
    write(config, tmp_path / "floats.gguf")
    quantization = Quantization(scheme="int4")
    abstract = abstract_quantized(abstract_params(config), on_one_device(config), quantization)
    params = GGUFFile(tmp_path / "floats.gguf").load_params(abstract)
    export(config, params, tmp_path / "model.gguf", vocab_size=288, dtype="float32", metadata={})
    kept = []
    again = GGUFFile(tmp_path / "model.gguf").load_params(abstract, lambda name, before, after: kept.append(before))
    assert_equal_trees(again, params)
    assert set(kept) == {None}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    tensor = tensors["blk.1.ffn_down_exps.weight"]
    ours = dequantize(params["layers"]["block_0"]["mlp"]["experts"]["down"]["kernel"], np.float32)[1]
    np.testing.assert_array_equal(quants.dequantize(tensor.data, tensor.tensor_type).swapaxes(1, 2), ours)
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_padded_rows_are_left_out_and_the_tokenizer_comes_back(tmp_path):
    file = tmp_path / "model.gguf"
    size = TOKENIZER.vocab_size
    export(CONFIG, random_params(CONFIG), file, vocab_size=size, dtype="float32", metadata=to_gguf(TOKENIZER))
    read = GGUFFile(file)
    assert read.config.vocab_size == size == read.shapes()["token_embd.weight"][0]
    assert from_gguf(read.metadata).encode("a cat, 12 mats") == TOKENIZER.encode("a cat, 12 mats")


@pytest.mark.parametrize("case", ["llama_mqa_head_dim_24", "llama_mha", "qwen2"])
def test_transformers_reads_what_we_write_and_finds_the_same_logits(case, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
    model = save_model(case, tmp_path)
    config, model_type = huggingface.read_config(tmp_path)
    params = huggingface.load_params(tmp_path, config, model_type, on_one_device(config))
    metadata = {key: value for key, value in to_gguf(TOKENIZER).items() if "template" not in key}
    export(config, params, tmp_path / "model.gguf", vocab_size=97, dtype="float32", metadata=metadata)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 97, (1, TIME // 4)))
    with torch.no_grad():
        np.testing.assert_allclose(again.eval()(tokens).logits, model(tokens).logits, atol=1e-4)


def quantized_file(file: Path, kinds: list[gguf.GGMLQuantizationType]) -> dict[str, np.ndarray]:
    """A plain model, each matrix in one of the types in turn; what its tensors are worth, as the library says."""
    write(ModelConfig(**{**CONFIG.__dict__, "embed_dim": 256, "mlp_dim": 256, "head_dim": 64}), file)
    source, worth = gguf.GGUFReader(file), {}
    writer = gguf.GGUFWriter(file.with_suffix(".new"), "llama")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[1] if len(field.types) > 1 else None)
    rng = np.random.default_rng(0)
    for place, tensor in enumerate(source.tensors):
        kind, data = tensor.tensor_type, tensor.data
        if data.ndim == 2:
            kind = kinds[place % len(kinds)]
            try:
                data = quants.quantize(np.array(data), kind)
            except NotImplementedError:  # the K types can be read alone; any bytes with small scales will do
                shape = quants.quant_shape_to_byte_shape(data.shape, kind)
                data = rng.integers(0, 40, shape, dtype=np.uint8)
        worth[tensor.name] = quants.dequantize(data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").rename(file)
    return worth


@pytest.mark.parametrize(
    "kinds", [["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"], ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]], ids=["plain", "K"]
)
def test_quantized_types_are_read(kinds, tmp_path):
    file = tmp_path / "model.gguf"
    worth = quantized_file(file, [gguf.GGMLQuantizationType[kind] for kind in kinds])
    read = GGUFFile(file)
    params = read.load_params(on_one_device(read.config))
    block = params["layers"]["block_0"]
    down = np.asarray(block["mlp"]["down"]["kernel"][1])
    np.testing.assert_array_equal(down.T, worth["blk.1.ffn_down.weight"])
    # Neighbouring rows of a head are the two that half-split RoPE has half a head apart.
    q_DNH, q = np.asarray(block["attention"]["q"]["kernel"][2]), worth["blk.2.attn_q.weight"]
    np.testing.assert_array_equal(q_DNH[:, 1, 0], q[64])
    np.testing.assert_array_equal(q_DNH[:, 1, 32], q[65])
    np.testing.assert_array_equal(q_DNH[:, 1, 1], q[66])


def test_without_the_permutation_the_weights_are_others(tmp_path, monkeypatch):
    params = write(CONFIG, tmp_path / "model.gguf")
    monkeypatch.setattr("nextllm_jax.interop.gguf._permuted_rows", lambda rows, head_dim: rows)
    loaded = GGUFFile(tmp_path / "model.gguf").load_params(on_one_device(CONFIG))
    q, wanted = (tree["layers"]["block_0"]["attention"]["q"]["kernel"] for tree in (loaded, params))
    assert np.abs(np.asarray(q) - wanted).max() > 0.1


def rewrite(file: Path, config: ModelConfig = CONFIG, **changes: Any) -> None:
    """Write the file again with more metadata."""
    metadata = {**to_gguf(TOKENIZER), **changes}
    export(config, random_params(config), file, vocab_size=288, dtype="float32", metadata=metadata)


def not_finite(file: Path) -> None:
    params = random_params(CONFIG)
    params["final_norm"]["scale"][3] = np.inf
    export(CONFIG, params, file, vocab_size=288, dtype="float32", metadata={})


def mixed_up(file: Path) -> None:
    write(make_config("qwen3"), file)
    file.write_bytes(file.read_bytes().replace(b"qwen3", b"llama"))


def swap_bytes(file: Path) -> None:
    command = [sys.executable, "-m", "gguf.scripts.gguf_convert_endian", str(file), "big"]
    subprocess.run(command, input="YES\n", capture_output=True, text=True, check=True)


HOSTILE: dict[str, tuple[Any, str]] = {
    "cut short": (lambda file: os.truncate(file, 60_000), "damaged or truncated"),
    "cut in the metadata": (lambda file: os.truncate(file, 1000), "damaged or truncated"),
    "empty": (lambda file: os.truncate(file, 0), "not a GGUF file"),
    "text": (lambda file: file.write_text("hello " * 100), "not a GGUF file"),
    "missing file": (lambda file: file.unlink(), "does not exist"),
    "unknown key": (lambda file: rewrite(file, **{"llama.attention.clamp_kqv": 8.0}), r"clamp_kqv is 8\.0"),
    "experts": (lambda file: rewrite(file, make_config("qwen3"), **{"qwen3.expert_count": 8}), "expert_count is 8"),
    "experts without their number per token": (
        lambda file: rewrite(file, **{"llama.expert_count": 8}),
        "expert_used_count is missing",
    ),
    "experts without tensors": (
        lambda file: rewrite(file, **{"llama.expert_count": 8, "llama.expert_used_count": 2}),
        r"lacks the tensor blk\.0\.ffn_gate_inp\.weight",
    ),
    "other scores of experts": (
        lambda file: rewrite(file, make_config("qwen3moe"), **{"qwen3moe.expert_gating_func": 2}),
        "expert_gating_func is 2; only 1",
    ),
    "weights of experts that are not normalized": (
        lambda file: rewrite(file, make_config("qwen3moe"), **{"qwen3moe.expert_weights_norm": False}),
        "expert_weights_norm is False; llama.cpp ignores it",
    ),
    "gpt-oss": (
        lambda file: file.write_bytes(file.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\7\0\0\0\0\0\0\0gpt-oss")),
        "attention sinks, biases of experts and MXFP4 weights are not supported",
    ),
    "parts": (lambda file: rewrite(file, **{"split.count": 3}), "one of 3 parts, whose names must end"),
    "rope scaling": (
        lambda file: rewrite(file, **{"llama.rope.scaling.type": "longrope"}),
        r"scaling\.type is 'longrope'",
    ),
    "two kinds of rope scaling": (
        lambda file: rewrite(file, make_config("llama 3.1"), **{"llama.rope.scaling.type": "linear"}),
        "rope_freqs.weight contradicts it",
    ),
    "big-endian": (swap_bytes, "is big-endian"),
    "not finite": (not_finite, r"output_norm\.weight holds values that are not finite"),
    "tensors of another architecture": (mixed_up, "does not have the tensor blk.0.attn_q_norm"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence(case, tmp_path):
    file = tmp_path / "model.gguf"
    write(CONFIG, file)
    damage, message = HOSTILE[case]
    damage(file)
    with pytest.raises(InputError, match=message) as raised:
        load(file)
    assert "\n" not in str(raised.value)


def load(file: Path) -> Any:
    read = GGUFFile(file)
    return read.load_params(on_one_device(read.config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_pattern": ("local",), "sliding_window": 8}, "no GGUF architecture can represent this model"),
        ({"rope_scaling": "llama3", "rope_scaling_factor": 4.0, "rope_low_freq_factor": 2.0}, "no GGUF architecture"),
        ({"norm_placement": "post"}, "no GGUF architecture can represent"),
        ({**MODELS["olmo2"], "tie_embeddings": True}, r"olmo2, which differs in model\.tie_embeddings True"),
        ({**MODELS["qwen3moe"], "normalize_expert_weights": False}, r"qwen3moe, .* model\.normalize_expert_weights"),
        ({**MODELS["qwen3moe"], "mlp_pattern": ("dense", "sparse", "sparse")}, r"differs in .*model\.mlp_pattern"),
        ({**MODELS["llama with experts"], "selection_bias": True}, r"differs in model\.selection_bias True"),
        ({**MODELS["llama with experts"], "router_scores": "sigmoid"}, r"differs in model\.router_scores sigmoid"),
        ({**MODELS["llama with experts"], "expert_weight_scale": 2.0}, r"differs in model\.expert_weight_scale 2\.0"),
        ({**MODELS["olmoe"], "num_kv_heads": 2}, r"olmoe, which differs in model\.num_kv_heads 2"),
        ({**MODELS["olmoe"], "attention_bias": True}, r"olmoe, which differs in model\.attention_bias True"),
        (
            {**MODELS["qwen3moe"], "attention_bias": True, "attention_output_bias": True},
            "no GGUF architecture can represent",
        ),
        ({**MODELS["qwen2moe"], "tie_embeddings": True}, r"qwen2moe, which differs in model\.tie_embeddings True"),
    ],
)
def test_what_an_architecture_cannot_say_is_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write(ModelConfig(**{**CONFIG.__dict__, **changes}), tmp_path / "model.gguf")


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e6), ("q8_0", 1e7)])
def test_numbers_beyond_float16_are_refused(tmp_path, dtype, value):
    params = random_params(CONFIG)
    params["embed"]["embedding"][0, 0] = value
    with pytest.raises(InputError, match=r"token_embd\.weight holds values that exceed float16"):
        export(CONFIG, params, tmp_path / "model.gguf", vocab_size=288, dtype=dtype, metadata={})
