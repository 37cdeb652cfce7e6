"""Hugging Face directories: strict configs, sharded and streamed weights, and files that must be refused."""

import dataclasses
import json
import os
import struct
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")
pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")

from safetensors.numpy import load_file, save_file

from nextllm_jax.config import MeshConfig
from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.interop import huggingface
from nextllm_jax.interop.huggingface_config import read_model_config, write_model_config
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import unstack_layers
from nextllm_jax.sharding import make_mesh, tree_shardings
from tests.interop.models import CONFIG, assert_equal_trees, on_one_device, random_params, write_huggingface

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama 1, with what old releases say": (
        {"max_sequence_length": 2048, "pretraining_tp": 1, "torch_dtype": "float16", "rope_scaling": None},
        {"num_kv_heads": 4, "head_dim": 16, "norm_eps": 1e-6, "tie_embeddings": False, "context_length": 2048},
    ),
    "llama 3.2": (
        {
            "head_dim": 64,
            "num_key_value_heads": 2,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
            "mlp_bias": False,
            "attention_bias": False,
        },
        {"rope_scaling": "llama3", "rope_scaling_factor": 32.0, "rope_theta": 5e5, "tie_embeddings": True},
    ),
    "smollm2": ({"is_llama_config": True, "rope_interleaved": False, "rms_norm_eps": 1e-5}, {"norm_eps": 1e-5}),
    "mistral 7b": (
        {"model_type": "mistral", "architectures": None, "sliding_window": 4096},
        {"layer_pattern": ("local",)},
    ),
    "mistral without a window": (
        {"model_type": "mistral", "architectures": None, "sliding_window": None},
        {"layer_pattern": ("global",), "num_kv_heads": 8, "num_heads": 8},
    ),
    "qwen2.5": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "num_key_value_heads": 2,
            "use_sliding_window": False,
            "sliding_window": 32768,
            "max_window_layers": 2,
            "use_mrope": False,
        },
        {"attention_bias": True, "attention_output_bias": False, "layer_pattern": ("global",)},
    ),
    "smollm3": (
        {
            "model_type": "smollm3",
            "architectures": None,
            "no_rope_layers": [1, 1, 1, 0],
            "layer_types": ["full_attention"] * 4,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 28,
        },
        {"layer_pattern": ("global", "global", "global", "global_nope"), "rope_theta": 2e6, "tie_embeddings": True},
    ),
    "gemma 1, which says gelu": (
        {"model_type": "gemma", "architectures": None, "num_key_value_heads": 1, "hidden_act": "gelu"},
        {"activation": "gelu_tanh", "head_dim": 256, "embedding_scale": 8.0, "norm_scale_offset": 1.0},
    ),
    "gemma 3 1b": (
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "sliding_window": 512,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 256,
            "cache_implementation": "hybrid",
        },
        {
            "layer_pattern": ("local", "global"),
            "sliding_window": 512,
            "rope_local_theta": 1e4,
            "rope_theta": 1e6,
            "attention_scale": 1 / 16,
            "norm_placement": "sandwich",
        },
    ),
    "phi 3 mini 128k": (
        {
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "sliding_window": 262144,
            "resid_pdrop": 0.0,
        },
        {"rope_scaling": "longrope", "rope_scaling_factor": 32.0, "rope_long_factors": (2.0,) * 8},
    ),
}
REFUSED: dict[str, dict[str, Any]] = {
    "model_type": {"model_type": "jamba"},
    "architectures": {"architectures": ["LlamaForSequenceClassification"]},
    "hidden_act": {"hidden_act": "relu"},
    "mlp_bias": {"mlp_bias": True},
    "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
    "num_experts": {"num_experts": 8},
    "rope_type": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "type": {"rope_scaling": {"type": "ntk", "factor": 2.0}},
    "truncate": {"rope_scaling": {**YARN, "truncate": False}},
    "beta_max": {"rope_scaling": {**YARN, "beta_max": 3}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "sliding_window": {"sliding_window": 100},
    "hidden_size": {"hidden_size": "64"},
    "num_attention_heads": {"num_attention_heads": 0},
    "rms_norm_eps": {"rms_norm_eps": "1e-5"},
    "tie_word_embeddings": {"tie_word_embeddings": 1},
    "factor": {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "low_freq_factor": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
    "use_bidirectional_attention": {"model_type": "gemma", "architectures": None, "use_bidirectional_attention": True},
    "attn_logit_softcapping": {
        "model_type": "gemma3_text",
        "architectures": None,
        "attn_logit_softcapping": 50.0,
    },
    "layer_types": {"model_type": "gemma2", "architectures": None, "layer_types": ["full_attention"]},
    "query_pre_attn_scalar": {"model_type": "gemma2", "architectures": None, "query_pre_attn_scalar": 0},
    "use_sliding_window": {
        "model_type": "smollm3",
        "architectures": None,
        "use_sliding_window": True,
        "sliding_window": 64,
    },
}


GEMMA = {"model_type": "gemma", "architectures": None, "num_key_value_heads": 4}
GEMMA3 = {"model_type": "gemma3_text", "architectures": None, "num_hidden_layers": 6}
QWEN = {"model_type": "qwen3", "architectures": None, "num_key_value_heads": 4, "head_dim": 16}
QWEN |= {"use_sliding_window": True, "sliding_window": 64}
SMOLLM3 = {"model_type": "smollm3", "architectures": None}
FULL, LOCAL = "full_attention", "sliding_attention"
AGREEING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "theta in the newer object": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e6, "factor": 2}},
        {"rope_theta": 1e6, "rope_scaling": "linear", "rope_scaling_factor": 2.0},
    ),
    "theta twice": ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6}}, {"rope_theta": 1e6}),
    "the kind twice": ({"rope_scaling": {**YARN, "type": "yarn"}}, {"rope_scaling": "yarn"}),
    "local theta twice": (
        {**GEMMA3, "rope_local_base_freq": 5e3, "rope_parameters": {LOCAL: {"rope_theta": 5e3}, FULL: {}}},
        {"rope_local_theta": 5e3, "rope_theta": 1e6},
    ),
    "both activations of gemma": (
        {**GEMMA, "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
        {"activation": "gelu_tanh"},
    ),
    "layers twice": ({**QWEN, "max_window_layers": 2, "layer_types": [FULL] * 2 + [LOCAL] * 2}, {"sliding_window": 64}),
}
# The keys of an error, and the config.
CONTRADICTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("rope_scaling: factor", "rope_parameters: factor"): {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
    ("rope_scaling: type", "rope_parameters: rope_type"): {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "default"},
    },
    ("rope_scaling: type", "rope_scaling: rope_type"): {"rope_scaling": {**YARN, "type": "linear"}},
    ("config.json: rope_theta", "rope_parameters: rope_theta"): {
        "rope_theta": 1e4,
        "rope_parameters": {"rope_theta": 1e6},
    },
    ("config.json: original_max_position_embeddings", "rope_scaling: original_max_position_embeddings"): {
        "rope_scaling": YARN,
        "original_max_position_embeddings": 32,
    },
    ("partial_rotary_factor", "rope_parameters: partial_rotary_factor"): {
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"partial_rotary_factor": 1.0},
    },
    ("rope_local_base_freq", "sliding_attention: rope_theta"): {
        **GEMMA3,
        "rope_local_base_freq": 1e4,
        "rope_parameters": {LOCAL: {"rope_theta": 5e3}, FULL: {}},
    },
    ("hidden_act", "hidden_activation"): {
        **GEMMA,
        "hidden_act": "silu",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    (" sliding_window_pattern", " _sliding_window_pattern"): {
        **GEMMA3,
        "_sliding_window_pattern": 6,
        "sliding_window_pattern": 3,
    },
    ("layer_types", "contradicts sliding_window_pattern 3"): {
        **GEMMA3,
        "sliding_window_pattern": 3,
        "layer_types": [LOCAL] * 5 + [FULL],
    },
    ("layer_types", "contradicts max_window_layers 1"): {
        **QWEN,
        "max_window_layers": 1,
        "layer_types": [FULL] * 2 + [LOCAL] * 2,
    },
    ("layer_types", "contradicts use_sliding_window false"): {
        **QWEN,
        "use_sliding_window": False,
        "layer_types": [LOCAL] * 4,
    },
    ("no_rope_layers", "contradicts no_rope_layer_interval 2"): {
        **SMOLLM3,
        "no_rope_layer_interval": 2,
        "no_rope_layers": [1, 1, 1, 0],
    },
}


@pytest.mark.parametrize("name", AGREEING)
def test_two_keys_for_one_fact(name):
    changes, expected = AGREEING[name]
    config = read_model_config(LLAMA | changes, "config.json")
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize("keys", CONTRADICTIONS)
def test_two_keys_that_contradict_each_other_are_both_named(keys):
    with pytest.raises(InputError) as error:
        read_model_config(LLAMA | CONTRADICTIONS[keys], "config.json")
    assert all(key in str(error.value) for key in keys)


def test_keys_without_effect_are_accepted_and_others_can_be_ignored():
    harmless = {"use_qk_norm": False, "my_notes": None, "neftune_noise_alpha": 5, "lora_alpha": 16}
    plain = read_model_config(LLAMA, "config.json")
    assert read_model_config(LLAMA | harmless, "config.json") == plain
    with pytest.raises(InputError, match=r"my_notes is 'x'; .* --ignore-key my_notes"):
        read_model_config(LLAMA | {"my_notes": "x"}, "config.json")
    assert read_model_config(LLAMA | {"my_notes": "x"}, "config.json", ["my_notes"]) == plain
    with pytest.raises(InputError, match="has no key my_note;"):
        read_model_config(LLAMA | {"my_notes": "x"}, "config.json", ["my_note"])
    with pytest.raises(InputError, match=r"rope_theta is .* cannot ignore it"):
        read_model_config(LLAMA | {"rope_theta": 5e5}, "config.json", ["rope_theta"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    changes, expected = PUBLISHED[name]
    heads = {"num_attention_heads": 8} if "mistral" in name else {}
    config = read_model_config(LLAMA | heads | changes, "config.json")
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(key):
    with pytest.raises(InputError, match=rf"config\.json.*\b{key} is "):
        read_model_config(LLAMA | REFUSED[key], "config.json")


def test_values_of_other_types_are_refused_by_name():
    gemma = {"model_type": "gemma2", "architectures": None, "num_hidden_layers": 1}
    smollm = {"model_type": "smollm3", "architectures": None, "num_hidden_layers": 1}
    bad: list[dict[str, Any]] = [{"model_type": []}, {"architectures": 1}, {"hidden_act": {}}]
    bad += [gemma | {"layer_types": [[]]}, smollm | {"no_rope_layers": [[]]}]
    for values in bad:
        with pytest.raises(InputError, match=rf"\b{list(values)[-1]} is "):
            read_model_config(LLAMA | values, "config.json")
    with pytest.raises(InputError, match="rope_type is "):
        read_model_config(LLAMA | {"rope_scaling": {"rope_type": ["yarn"]}}, "config.json")


def test_a_missing_size_is_named():
    with pytest.raises(InputError, match="hidden_size is missing"):
        read_model_config({name: value for name, value in LLAMA.items() if name != "hidden_size"}, "config.json")


def test_a_model_that_no_family_has_is_refused_with_its_fields():
    with pytest.raises(InputError, match=r"no Hugging Face model_type .* which differs in model\.\w+"):
        write_model_config(ModelConfig(vocab_size=64, norm_placement="post", logit_soft_cap=3.0))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "granite"])
def test_a_plain_model_can_be_written_as_any_family_that_says_the_same(model_type):
    assert write_model_config(CONFIG)["model_type"] == "llama"
    assert write_model_config(CONFIG, model_type=model_type)["model_type"] == model_type
    scaled = {"parametrization": "completep", "base_width": 8, "base_depth": 1}
    trained = dataclasses.replace(CONFIG, zero_init_outputs=True, **scaled)  # which no file says, or needs
    assert write_model_config(trained, model_type=model_type) == write_model_config(CONFIG, model_type=model_type)


def test_a_round_trip_in_one_file_in_many_and_in_bfloat16(tmp_path):
    params = write_huggingface(tmp_path / "one")
    write_huggingface(tmp_path / "many", shard_bytes=20_000)
    write_huggingface(tmp_path / "half", dtype="bfloat16")
    abstract = on_one_device(CONFIG)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert len(list((tmp_path / "many").glob("model-0000*-of-*.safetensors"))) > 3
    assert_equal_trees(huggingface.load_params(tmp_path / "one", CONFIG, "llama", abstract), params)
    assert_equal_trees(huggingface.load_params(tmp_path / "many", CONFIG, "llama", abstract), params)
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    assert_equal_trees(huggingface.load_params(tmp_path / "half", CONFIG, "llama", abstract), rounded)


def test_padded_rows_of_the_vocabulary_are_left_out(tmp_path):
    params = random_params(CONFIG)
    huggingface.export(CONFIG, params, tmp_path, vocab_size=270)
    assert load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].shape == (270, 32)
    config, _ = huggingface.read_config(tmp_path)
    assert config.vocab_size == 270


SPARSE = dataclasses.replace(CONFIG, num_experts=4, mlp_pattern=("dense", "sparse"), qk_norm=True)


@pytest.mark.parametrize(
    ("mesh", "config"),
    [
        (MeshConfig(data=1, fsdp=8), CONFIG),
        (MeshConfig(data=2, fsdp=2, tensor=2), CONFIG),
        (MeshConfig(data=1, fsdp=2, tensor=2, expert=2), SPARSE),
    ],
    ids=["fsdp", "tensor", "expert"],
)
def test_tensors_go_straight_to_their_shards(tmp_path, mesh, config):
    params = write_huggingface(tmp_path, config)
    devices = make_mesh(mesh)
    boxed = abstract_params(config)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        tree_shardings(devices, boxed),
    )
    loaded = huggingface.load_params(tmp_path, *huggingface.read_config(tmp_path), abstract)
    assert_equal_trees(loaded, params)
    for kernel, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(abstract), strict=True):
        assert kernel.sharding == wanted.sharding
    kernel = loaded["layers"]["block_0"]["attention"]["o"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size


def test_tensors_go_straight_to_unstacked_layers(tmp_path):
    params = write_huggingface(tmp_path)
    abstract = on_one_device(CONFIG, scan_layers=False)
    loaded = huggingface.load_params(tmp_path, CONFIG, "llama", abstract)
    assert_equal_trees(loaded, unstack_layers(CONFIG, params))


def edit_weights(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def truncate(directory: Path, size: int) -> None:
    os.truncate(directory / "model.safetensors", size)


def not_finite(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


def other_shape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]


def as_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def oversized_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def index_outside(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_missing(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


HOSTILE: dict[str, tuple[Any, str]] = {
    "cut short": (lambda d: truncate(d, 30_000), "damaged or truncated"),
    "cut in the header": (lambda d: truncate(d, 100), "damaged or truncated"),
    "empty": (lambda d: truncate(d, 0), "damaged or truncated"),
    "oversized header": (oversized_header, "damaged or truncated"),
    "missing tensor": (
        lambda d: edit_weights(d, lambda t: t.pop("model.norm.weight")),
        r"lacks the tensor model\.norm",
    ),
    "extra tensor": (
        lambda d: edit_weights(d, lambda t: t.update({"model.layers.9.x": np.zeros(3)[:2].astype("f4")})),
        r"does not have the tensor model\.layers\.9",
    ),
    "other shape": (
        lambda d: edit_weights(d, other_shape),
        r"model\.norm\.weight has shape \[31\], but the config needs \[32\]",
    ),
    "not finite": (lambda d: edit_weights(d, not_finite), r"model\.layers\.1\.mlp\.up_proj\.weight .* not finite"),
    "integers": (
        lambda d: edit_weights(d, lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)})),
        "is I8; weights must be",
    ),
    "pickle": (as_pickle, r"pytorch_model\.bin, which could run"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "index outside": (index_outside, "must be in the same directory"),
    "index of missing files": (index_of_missing, "which is missing"),
    "broken index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "another head": (
        lambda d: edit_weights(d, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        r"lm_head\.weight differs from the embedding",
    ),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
}


def load(directory: Path) -> Any:
    config, model_type = huggingface.read_config(directory)
    return huggingface.load_params(directory, config, model_type, on_one_device(config))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence(tmp_path, case):
    write_huggingface(tmp_path)
    damage, message = HOSTILE[case]
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_head_that_is_the_tied_embedding_and_old_rotary_buffers_are_no_matter(tmp_path):
    params = write_huggingface(tmp_path)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit_weights(tmp_path, add)
    assert_equal_trees(huggingface.load_params(tmp_path, CONFIG, "llama", on_one_device(CONFIG)), params)
