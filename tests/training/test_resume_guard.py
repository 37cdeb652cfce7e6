"""Which settings may differ when a run goes on, field by field."""

import dataclasses
import json
import re

import pytest

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.training.accepted_changes import replaced_values, with_accepted_changes
from nextllm_jax.training.resume_guard import (
    allowed_fields,
    changes,
    recorded_data,
    require_resumable,
    require_same_data,
)

CONFIG = Config(workdir="w")
SECTIONS = ("lora", "model", "data", "optimizer", "training", "checkpoint", "mesh", "evaluation", "logging")

# A value other than the default's for every field of every section; a new field wants a row here, and a thought.
OTHER = {
    "training.spike_factor": 2.0,
    "training.ema_decay": 0.999,
    "model.layer_pattern": ("local",),
    "data.mixture": ("a:1", "b:2"),
    "model.rope_scaling": "linear",
    "model.rope_attention_factor": 2.0,
    "model.dtype": "float32",
    "model.param_dtype": "bfloat16",
    "model.remat": "full",
    "model.attention": "blockwise",
    "model.attention_blocks": (256, 256),
    "model.num_kv_heads": 2,
    "model.rope_low_freq_factor": 2.0,
    "model.rope_beta_slow": 2.0,
    "data.corpus": "books/",
    "data.text_field": "content",
    "data.hf_config": "sample",
    "data.hf_split": "test",
    "data.tokenizer": "gpt2",
    "data.path": "elsewhere",
    "data.cache_dir": "elsewhere",
    "training.preemption_seconds": 25.0,
    "checkpoint.scratch": "elsewhere",
    "data.verify": "full",
    "data.validation_fraction": 0.1,
    "data.deduplicate": "exact",
    "data.vocab_size": 4096,
    "model.vocab_size": 16_384,
    "optimizer.name": "muon",
    "optimizer.schedule": "wsd",
    "optimizer.schedule_steps": 9000,
    "optimizer.decay_steps_fraction": 0.5,
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.5,
    "optimizer.first_moment_dtype": "bfloat16",
    "training.sample_prompts": ("the ",),
    "model.activation": "gelu_tanh",
    "model.num_experts": 4,
    "model.mlp_pattern": ("dense", "sparse"),
    "model.router_scores": "sigmoid",
    "model.rope_local_theta": 5e3,
    "model.rotary_dim": 4,
    "model.norm_scale_offset": 1.0,
    "model.norm_placement": "sandwich",
    "model.qk_norm_over": "projection",
    "model.attention_scale": 0.5,
    "model.attention_soft_cap": 30.0,
    "model.logit_soft_cap": 30.0,
    "mesh.data": 2,
    "evaluation.texts": ("README.md",),
    "evaluation.lm_eval_tasks": ("arc_easy",),
    "evaluation.every_steps": 500,
    "logging.trackers": ("wandb",),
    "init_from": "runs/other",
    "data.messages_field": "messages",
    "data.chat_template": "template.jinja",
    "lora.targets": ("q",),
    "lora.frozen": "int8",
    "platform": "cpu",
    "workdir": "other",
}
# Another value of these needs another field too.
NOT_ALONE = {
    *("model.rope_short_factors", "model.rope_long_factors", "model.remat_offload", "lora.rank"),
    "lora.adapter",
    *("optimizer.adamw_learning_rate", "data.mixture_paths"),
    *("model.expert_mlp_dim", "model.shared_expert_mlp_dim", "model.shared_expert_gate", "model.selection_bias"),
    *("model.capacity_factor", "model.parametrization", "model.base_width", "model.base_depth"),
}
FREE = {
    *("model.remat_offload", "optimizer.shard_over_data", "optimizer.offload_state"),
    *("workdir", "platform", "model.dtype", "model.remat", "data.path", "data.num_processes", "data.tokens_per_shard"),
    *("data.verify", "training.accumulation_steps", "training.log_every_steps", "training.evaluate_every_steps"),
    *("training.evaluation_batch_size", "training.max_skipped_steps", "training.sample_prompts"),
    *("training.sample_tokens", "checkpoint.every_steps", "checkpoint.keep_last", "checkpoint.keep_every_steps"),
    *("checkpoint.scratch", "checkpoint.strict", "checkpoint.megabytes_per_second", "training.preemption_seconds"),
    *("mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor", "mesh.expert", "mesh.slices"),
    *("data.cache_dir", "data.cache_bytes"),
    *("model.attention", "model.attention_blocks", "logging.trackers", "logging.project"),
    *("evaluation.texts", "evaluation.lm_eval_tasks", "evaluation.every_steps"),
}
NEVER = {
    *("model.vocab_size", "model.num_layers", "model.embed_dim", "model.mlp_dim", "model.num_heads"),
    *("model.num_kv_heads", "model.head_dim", "model.layer_pattern", "model.qk_norm", "model.attention_bias"),
    *("model.tie_embeddings", "model.param_dtype", "model.norm_placement", "model.qk_norm_over"),
    *("model.attention_output_bias", "optimizer.name", "optimizer.first_moment_dtype"),
    *("model.num_experts", "model.expert_mlp_dim", "model.mlp_pattern", "model.shared_expert_mlp_dim"),
    *("model.shared_expert_gate", "model.selection_bias"),
    "training.ema_decay",
    *("lora.rank", "lora.targets", "lora.frozen"),
}


def fields(config):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        names = [f"{field.name}.{inner.name}" for inner in dataclasses.fields(value)] if field.name in SECTIONS else []
        yield from names or [field.name]


def other_value(name):
    section, _, field = name.rpartition(".")
    value = getattr(getattr(CONFIG, section) if section else CONFIG, field)
    if name in OTHER:
        return OTHER[name]
    return not value if isinstance(value, bool) else value * 2 or 1


def changed(*names):
    config = CONFIG
    for name in names:
        section, _, field = name.rpartition(".")
        part = dataclasses.replace(getattr(config, section) if section else config, **{field: other_value(name)})
        config = dataclasses.replace(config, **{section: part}) if section else part
    return config


@pytest.mark.parametrize("name", [name for name in fields(CONFIG) if name not in NOT_ALONE])
def test_every_field_is_free_or_asks_for_consent_or_never_changes(name):
    assert changed(name) != CONFIG
    found = changes(CONFIG, changed(name))
    if name in FREE:
        assert found == []
        return
    (change,) = found
    assert change.name == name
    assert str(change).startswith(f"{name} {change.old} -> {change.new}")
    assert change.allowable == (name not in NEVER)
    if name in NEVER:
        with pytest.raises(InputError, match=f"--allow-change {name}: this field cannot change.*new run"):
            allowed_fields([name])
    else:
        assert allowed_fields([name.replace("_", "-")]) == {name}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    return tmp_path


def test_the_refusal_is_a_diff_with_what_to_do(run):
    config = changed("model.num_layers", "optimizer.learning_rate", "training.global_batch_size", "mesh.fsdp")
    with pytest.raises(InputError) as caught:
        require_resumable(RunDir(run), config, ["optimizer.learning_rate"])
    assert str(caught.value).splitlines() == [
        f"{run} holds a run with another config, which was not touched:",
        "  model.num_layers 8 -> 16 (cannot change: the saved arrays would not fit)",
        "  training.global_batch_size 16 -> 32 "
        "(the data continues at its current position, with more or fewer windows per step)",
        "start a new run: another --workdir, or --overwrite to set the old run aside",
    ]
    config = changed("seed", "optimizer.learning_rate")
    with pytest.raises(
        InputError, match=r"allow the changes: --allow-change seed --allow-change optimizer.learning_rate; or start"
    ):
        require_resumable(RunDir(run), config, [])
    assert [change.name for change in require_resumable(RunDir(run), config, ["optimizer.learning-rate", "seed"])] == [
        "seed", "optimizer.learning_rate"
    ]  # fmt: skip
    assert require_resumable(RunDir(run / "new"), config, []) == []


def test_a_wrong_name_gets_a_suggestion(run):
    with pytest.raises(InputError, match=r"optimizer.learning_rat: .*did you mean optimizer.learning_rate\?"):
        require_resumable(RunDir(run), CONFIG, ["optimizer.learning_rat"])
    with pytest.raises(InputError, match="give a dotted name"):
        require_resumable(RunDir(run / "new"), CONFIG, ["xyz"])


def length(steps, schedule_steps=None, schedule="cosine"):
    optimizer = OptimizerConfig(schedule_steps=schedule_steps, schedule=schedule)
    return dataclasses.replace(CONFIG, training=TrainingConfig(steps=steps), optimizer=optimizer)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        (length(200), length(400), "training.steps"),
        (length(200), length(150), "training.steps"),
        (length(200), length(400, 200), None),
        (length(200, 200), length(400, 200), None),
        (length(200, 200), length(200), None),
        (length(200), length(400, 400), "optimizer.schedule_steps"),
        (length(200, 300), length(400, 200), "optimizer.schedule_steps"),
        (length(200, 300), length(200), "optimizer.schedule_steps"),
        (length(200, schedule="constant"), length(400, schedule="constant"), None),
        (length(100, schedule="constant"), length(400, schedule="constant"), "training.steps"),  # another warmup
        (length(200, schedule="wsd"), length(400, schedule="wsd"), "training.steps"),
    ],
)
def test_a_run_is_extended_without_bending_its_schedule(old, new, name):
    found = changes(old, new)
    assert [change.name for change in found] == ([name] if name else [])
    if name == "training.steps":
        assert f"--optimizer.schedule-steps {old.training.steps} to keep the schedule" in str(found[0])


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"warmup_steps": 15}, "optimizer.warmup_steps 15 -> 10 (the warmup now takes at most half of the schedule"),
        ({"warmup_steps": 10}, None),
        (
            {"warmup_steps": 5, "schedule": "wsd", "decay_steps_fraction": 1.0},
            "optimizer.decay_steps_fraction 1.0 -> 0.7 (the decay now never overlaps the warmup",
        ),
        ({"warmup_steps": 5, "schedule": "wsd", "decay_steps_fraction": 0.7}, None),
    ],
)
def test_a_run_of_an_older_version_does_not_silently_get_another_schedule(tmp_path, settings, change):
    """Its config.json states no format."""
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(**settings), training=TrainingConfig(steps=20))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    if change is None:
        assert require_resumable(RunDir(tmp_path), config, []) == []
    else:
        with pytest.raises(InputError, match=re.escape(f"\n  {change}")):
            require_resumable(RunDir(tmp_path), config, [])
        (found,) = require_resumable(RunDir(tmp_path), config, [change.split()[0]])
        assert str(found).startswith(change)
    (tmp_path / "config.json").write_text(config.to_json())
    assert require_resumable(RunDir(tmp_path), config, []) == []


def test_another_programs_config_is_not_a_run(tmp_path):
    for text in ("{}", "[]", "no", '{"model": "resnet"}', '{"hidden_size": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"is not empty and not a run \(.*\); choose another --workdir"):
            RunDir(tmp_path).require_run_or_empty()


def test_other_data_needs_consent_and_another_tokenizer_never_fits():
    here = {"data_id": "a", "tokenizer_hash": "t"}
    require_same_data(here, here, ["data/x"], [])
    require_same_data({"data_id": "a"}, here, ["data/x"], [])
    other = {"data_id": "b", "tokenizer_hash": "t"}
    for allowed in ([], ["seed"]):
        with pytest.raises(InputError, match=r"other data than data/x holds \(b -> a\).*--allow-change data.path"):
            require_same_data(other, here, ["data/x"], allowed)
    for allowed in (["data.path"], ["data.corpus"], ["data.validation-fraction"]):
        require_same_data(other, here, ["data/x"], allowed)
    with pytest.raises(InputError, match="another tokenizer than the run"):
        require_same_data({"data_id": "b", "tokenizer_hash": "u"}, here, ["data/x"], ["data.path", "data.tokenizer"])


def test_the_data_may_lie_elsewhere_and_the_model_in_another_type():
    new = dataclasses.replace(CONFIG, data=DataConfig(path="elsewhere"), model=ModelConfig(dtype="float32"))
    assert changes(CONFIG, new) == []


@pytest.mark.parametrize("record", [{}, {"data": None}, {"data": "stdlib"}])
def test_a_record_that_does_not_name_its_data_is_an_error(record):
    with pytest.raises(InputError, match="another version may have written it"):
        recorded_data(record)


@pytest.mark.parametrize("allowed", ["training.steps", "optimizer.schedule_steps"])
def test_an_accepted_length_keeps_steps_and_schedule_together(tmp_path, allowed):
    file = Config(workdir=str(tmp_path), training=TrainingConfig(steps=100))
    changed = dataclasses.replace(
        file, training=TrainingConfig(steps=150), optimizer=OptimizerConfig(schedule_steps=100)
    )
    run = RunDir(tmp_path)
    run.write_config(file)
    run.write_config(changed, replaced_values(changed, file, {allowed}))
    assert with_accepted_changes(file) == changed
