"""The shipped configs, the checks of every field, and the way to JSON and back."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from nextllm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainingConfig,
)
from nextllm_jax.config import files as config_files
from nextllm_jax.errors import InputError
from nextllm_jax.model.accounting import active_parameter_count, parameter_count
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.training.schedule import schedule

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
COMPLETEP: dict[str, Any] = {"parametrization": "completep", "base_width": 64, "base_depth": 2}
NAMES = [file.stem for file in SHIPPED]


@pytest.mark.parametrize("file", SHIPPED, ids=NAMES)
def test_shipped_config_loads_and_survives_json(file: Path) -> None:
    config = config_files.load_config_file(str(file))
    assert config.workdir == f"runs/{file.stem}"
    assert config_files.from_json(config.to_json(), "config.json") == config
    short = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=20))
    for each in (config, short):
        assert float(schedule(each.optimizer, each.training.steps)(0)) > 0  # pyright: ignore[reportArgumentType]


def test_all_promised_configs_are_shipped() -> None:
    assert {"tiny", "small", "medium", "llama3_1b", "llama3_8b", "llama3_70b"} <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama2_7b", 6_738_415_616),
        ("llama3_1b", 1_235_814_400),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("llama3_405b", 405_853_388_800),
        ("mixtral_8x7b", 46_702_792_704),
        ("olmoe_1b_7b", 6_919_161_856),
        ("qwen3_30b_a3b", 30_532_122_624),
    ],
)
def test_parameter_counts_of_published_shapes(name: str, published: int) -> None:
    """These numbers never change."""
    model = config_files.load_config_file(str(SHIPPED[NAMES.index(name)])).model
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(functools.partial(Transformer(model).init, jax.random.key(0), tokens_BT, tokens_BT))
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(params))) == published
    assert parameter_count(model) == published


@pytest.mark.parametrize(
    ("name", "active"),
    [("mixtral_8x7b", 12_879_925_248), ("olmoe_1b_7b", 1_282_017_280), ("qwen3_30b_a3b", 3_353_032_704)],
)
def test_active_parameters_of_published_shapes(name: str, active: int) -> None:
    """Embedding and head, attention, norms and routers, and the chosen experts of each layer."""
    model = config_files.load_config_file(str(SHIPPED[NAMES.index(name)])).model
    assert active_parameter_count(model) == active
    unused = model.num_experts - model.experts_per_token
    expert = 3 * model.embed_dim * (model.expert_mlp_dim or model.mlp_dim)
    assert parameter_count(model) - active == model.num_layers * unused * expert


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (ModelConfig, {"num_heads": 6, "num_kv_heads": 4}, ["model.num_kv_heads 4", "model.num_heads 6"]),
        (ModelConfig, {"num_layers": 0}, ["model.num_layers is 0"]),
        (ModelConfig, {"head_dim": 33}, ["model.head_dim is 33", "even"]),
        (ModelConfig, {"layer_pattern": ()}, ["model.layer_pattern is empty"]),
        (ModelConfig, {"rope_scaling": "yarn", "rope_scaling_factor": 0.5}, ["model.rope_scaling_factor is 0.5", "1"]),
        (
            ModelConfig,
            {"rope_low_freq_factor": 4.0, "rope_high_freq_factor": 1.0},
            ["model.rope_low_freq_factor 4.0", "model.rope_high_freq_factor 1.0"],
        ),
        (ModelConfig, {"num_experts": 4, "experts_per_token": 5}, ["experts_per_token 5", "model.num_experts 4"]),
        (ModelConfig, {"num_experts": -1}, ["model.num_experts is -1"]),
        (ModelConfig, {"num_experts": 4, "experts_per_token": 0}, ["model.experts_per_token is 0"]),
        (ModelConfig, {"num_experts": 4, "mlp_pattern": ("dense",)}, ["model.mlp_pattern", "no sparse layer", "4"]),
        (
            ModelConfig,
            {"num_experts": 4, "num_layers": 2, "mlp_pattern": ("dense", "dense", "sparse")},
            ["model.mlp_pattern", "no sparse layer", "put 'sparse' among its first 2 entries"],
        ),
        (ModelConfig, {"num_experts": 4, "mlp_pattern": ()}, ["model.mlp_pattern is empty"]),
        (ModelConfig, {"expert_mlp_dim": 8}, ["model.expert_mlp_dim is 8", "set model.num_experts"]),
        (ModelConfig, {"num_experts": 4, "shared_expert_gate": True}, ["set model.shared_expert_mlp_dim"]),
        (ModelConfig, {"num_experts": 4, "capacity_factor": -1.0}, ["model.capacity_factor is -1.0"]),
        (ModelConfig, {"parametrization": "completep", "base_width": 64}, ["completep needs model.base_depth"]),
        (ModelConfig, {"base_width": 64}, ["standard has no model.base_width", "completep"]),
        (ModelConfig, COMPLETEP | {"norm_placement": "post"}, ["model.norm_placement post", "use standard"]),
        (ModelConfig, COMPLETEP | {"base_depth": 0}, ["model.base_depth is 0"]),
        (
            Config,
            {"init_from": "run", "lora": LoraConfig(rank=2), "model": ModelConfig(**COMPLETEP)},
            ["lora.rank is 2", "leave model.parametrization out"],
        ),
        (DataConfig, {"sequence_length": 0}, ["data.sequence_length is 0"]),
        (DataConfig, {"validation_fraction": 1.0}, ["data.validation_fraction is 1.0"]),
        (OptimizerConfig, {"learning_rate": 0.0}, ["optimizer.learning_rate is 0.0"]),
        (OptimizerConfig, {"clip_norm": -1.0}, ["optimizer.clip_norm is -1.0"]),
        (OptimizerConfig, {"final_learning_rate_fraction": 2.0}, ["optimizer.final_learning_rate_fraction is 2.0"]),
        (TrainingConfig, {"steps": 0}, ["training.steps is 0"]),
        (
            TrainingConfig,
            {"global_batch_size": 10, "accumulation_steps": 4},
            ["training.accumulation_steps 4", "training.global_batch_size 10"],
        ),
        (SamplingConfig, {"top_p": 0.0}, ["top_p is 0.0"]),
        (SamplingConfig, {"temperature": -1.0}, ["temperature is -1.0"]),
        (OptimizerConfig, {"b1": 1.0}, ["optimizer.b1 is 1.0"]),
        (OptimizerConfig, {"schedule_steps": -5}, ["optimizer.schedule_steps is -5"]),
        (ModelConfig, {"rope_theta": 1.0}, ["model.rope_theta is 1.0"]),
        (ModelConfig, {"rope_attention_factor": 0.0}, ["model.rope_attention_factor is 0.0"]),
        (DataConfig, {"corpus": ""}, ["data.corpus is empty"]),
        (Config, {"seed": 2**32}, ["seed is 4294967296"]),
        (CheckpointConfig, {"every_steps": 0}, ["checkpoint.every_steps is 0"]),
        (CheckpointConfig, {"keep_last": 0}, ["checkpoint.keep_last is 0"]),
        (CheckpointConfig, {"keep_every_steps": -1}, ["checkpoint.keep_every_steps is -1"]),
        (LoraConfig, {"targets": ("",)}, ["lora.targets has an empty name"]),
        (MeshConfig, {"tensor": 0}, ["mesh.tensor is 0"]),
        (MeshConfig, {"data": -1, "fsdp": -1}, ["only one mesh axis"]),
        (MeshConfig, {"slices": 0}, ["mesh.slices is 0"]),
        (
            Config,
            {"data": DataConfig(sequence_length=512), "model": ModelConfig(context_length=256)},
            ["data.sequence_length 512", "model.context_length 256"],
        ),
        (
            Config,
            {"data": DataConfig(vocab_size=8192), "model": ModelConfig(vocab_size=4096)},
            ["data.vocab_size 8192", "model.vocab_size 4096"],
        ),
    ],
)
def test_bad_values_are_refused_by_name(cls: type[Any], values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        cls(**values)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (ModelConfig, {"rope_scaling": "ntk"}, ["model.rope_scaling is 'ntk'", "yarn"]),
        (ModelConfig, {"layer_pattern": ("global", "locl")}, ["model.layer_pattern", "'locl'", "local"]),
        (ModelConfig, {"remat": "ful"}, ["model.remat is 'ful'", "full"]),
        (ModelConfig, {"num_layers": 2.0}, ["model.num_layers is 2.0"]),
        (ModelConfig, {"tie_embeddings": "yes"}, ["model.tie_embeddings is 'yes'"]),
        (OptimizerConfig, {"schedule": "cosin"}, ["optimizer.schedule is 'cosin'", "cosine"]),
        (TrainingConfig, {"steps": "many"}, ["training.steps is 'many'"]),
        (Config, {"platform": "cuda"}, ["platform is 'cuda'", "gpu"]),
        (LoggingConfig, {"trackers": ("wandbb",)}, ["logging.trackers", "'wandbb'", "wandb and trackio"]),
        (LoggingConfig, {"trackers": ("wandb", "wandb")}, ["logging.trackers has wandb twice"]),
        (EvaluationConfig, {"every_steps": 0}, ["evaluation.every_steps is 0"]),
        (EvaluationConfig, {"lm_eval_tasks": ("piqa", "piqa")}, ["evaluation.lm_eval_tasks has piqa twice"]),
        (EvaluationConfig, {"texts": ("",)}, ["evaluation.texts has an empty path"]),
        (EvaluationConfig, {"texts": ("a:b", "a:c")}, ["two texts named a"]),
        (EvaluationConfig, {"texts": ("gs://b/c.txt",)}, ["evaluation.texts gs://b/c.txt", "local"]),
        (Config, {"evaluation": EvaluationConfig(every_steps=750)}, ["evaluation.every_steps is 750", "500"]),
        (
            Config,
            {"evaluation": EvaluationConfig(texts=("web:x",)), "data": DataConfig(mixture=("data/web:1", "stdlib:1"))},
            ["evaluation.texts has web", "data.mixture"],
        ),
        (Config, {"model": {"num_layers": 2}}, ["model is {'num_layers': 2}", "ModelConfig"]),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(cls: type[Any], values: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        cls(**values)
    for word in words:
        assert word in str(caught.value)


def test_the_period_of_a_model_combines_its_patterns() -> None:
    plain = ModelConfig(layer_pattern=("local", "global"))
    assert plain.period == (("local", "dense"), ("global", "dense"))
    assert plain.sparse_layers == ()
    mixed = ModelConfig(
        num_layers=7, num_experts=4, layer_pattern=("local", "global"), mlp_pattern=("dense", "sparse", "sparse")
    )
    attention, mlps = zip(*mixed.period, strict=True)
    assert attention == ("local", "global") * 3
    assert mlps == ("dense", "sparse", "sparse") * 2
    assert mixed.sparse_layers == (1, 2, 4, 5)


def test_json_keeps_every_field() -> None:
    config = Config(
        workdir="runs/x",
        model=ModelConfig(layer_pattern=("local", "global"), rope_attention_factor=0.5),
        training=TrainingConfig(sample_prompts=("a", "b")),
        mesh=MeshConfig(data=2, fsdp=4),
    )
    read = config_files.from_json(config.to_json(), "config.json")
    assert read == config
    assert hash(read) == hash(config)


@pytest.mark.parametrize("value", ["all_gather", "ring"])
def test_a_removed_field_is_ignored_where_that_changes_nothing(value: str) -> None:
    values = {"model": {}, "data": {}, "training": {}, "mesh": {"context_parallelism": value, "data": 2}}
    assert config_files.config_of_values(values, "config.json") == Config(mesh=MeshConfig(data=2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["runs/a/config.json", "not JSON"]),
        ("[]", ["runs/a/config.json"]),
        (
            '{"format": "nextllm_jax config 99", "model": {}, "data": {}, "training": {}}',
            ["runs/a/config.json", "nextllm_jax config 99", "version that wrote it"],
        ),
        ('{"model": 3}', ["model is 3"]),
        ('{"model": {"num_layer": 3}}', ["runs/a/config.json", "model", "did you mean num_layers?"]),
        ('{"model": {"num_layers": "3"}}', ["model.num_layers is '3'"]),
        (
            '{"mesh": {"context_parallelism": "sideways"}}',
            ["runs/a/config.json: mesh has context_parallelism 'sideways', which nextllm_jax config 2 removed"],
        ),
    ],
)
def test_a_broken_config_json_is_named(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        config_files.from_json(text, "runs/a/config.json")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["does not exist", "configs/"]),
        ("x = 1", ["get_config"]),
        ("def get_config(): return 3", ["must return a Config"]),
        ("raise RuntimeError('boom')", ["RuntimeError", "boom"]),
        ("def get_config(:", ["SyntaxError"]),
        (
            "from nextllm_jax.config import *\ndef get_config(): return Config(model=ModelConfig(head_dim=3))",
            ["model.head_dim is 3"],
        ),
        ("from nextllm_jax.config import *\ndef get_config(): return Config(sed=3)", ["did you mean seed?"]),
        ("from nextllm_jax.config import *\nModelConfig(vocabsize=3)", ["did you mean vocab_size?"]),
        (
            "from nextllm_jax.config import *\nMeshConfig(context_parallelism='ring')",
            ["config 2 removed this field, so leave it"],
        ),
        ("import sys\nsys.exit(0)", ["SystemExit"]),
    ],
)
def test_a_bad_config_file_is_named(text: str | None, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError) as caught:
        config_files.load_config_file(str(file))
    for word in [str(file), *words]:
        assert word in str(caught.value)


def test_a_config_file_that_is_not_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: 3")
    with pytest.raises(InputError, match=r"mine\.yaml must be a Python file"):
        config_files.load_config_file(str(tmp_path / "mine.yaml"))


def test_a_workdir_of_the_config_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from nextllm_jax.config import *\ndef get_config(): return Config(workdir='elsewhere')")
    assert config_files.load_config_file(str(file)).workdir == "elsewhere"


def test_fields_that_a_command_line_states():
    argv = ["--config", "c.py", "--optimizer.learning-rate=1e-3", "--seed", "1", "--checkpoint.no-strict"]
    stated = config_files.stated_fields(argv)
    assert {"optimizer.learning_rate", "seed", "checkpoint.strict"} <= stated
    assert "optimizer.b1" not in stated
