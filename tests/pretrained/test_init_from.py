"""Training from other models' weights, at the user's door and inside it."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")
pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")

import nextllm_jax
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.checkpoint.verify import check_steps, find_steps
from nextllm_jax.config import Config, DataConfig, LoraConfig, ModelConfig
from nextllm_jax.config.files import read_config
from nextllm_jax.data.shards import Dataset
from nextllm_jax.errors import InputError
from nextllm_jax.evaluation.scoring import score_data
from nextllm_jax.pretrained.convert import export_model
from nextllm_jax.pretrained.init_from import initial_params, require_tokenizer, with_source
from nextllm_jax.pretrained.open_model import open_model
from nextllm_jax.sharding import on_device
from nextllm_jax.training.resume_guard import require_resumable
from tests.conftest import CONFIG_FILE, Door
from tests.interop.models import CONFIG as SMALL
from tests.interop.models import write_huggingface
from tests.processes import Processes
from tests.runs import metrics, saved_arrays

FINE_TUNE = CONFIG_FILE[: CONFIG_FILE.index("        model=")] + CONFIG_FILE[CONFIG_FILE.index("        data=") :]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SOURCES = {"hf": ("huggingface", "float32"), "model.gguf": ("gguf", "float32")}
SHORT = (
    *("--training.steps", "6", "--training.evaluate-every-steps", "6", "--optimizer.learning-rate", "0.003"),
    *("--model.dtype", "float32"),
)


@pytest.fixture(scope="module")
def sources(trained):
    """A directory with the trained run in other formats, and what it was trained to."""
    for name, (file_format, dtype) in SOURCES.items():
        export_model(
            str(trained.directory / "runs/config"), str(trained.directory / name), file_format=file_format, dtype=dtype
        )
    return trained.directory


@pytest.fixture
def place(sources, trained, tmp_path) -> Door:
    """A fresh directory with the corpus, the config without a model, and copies of the sources."""
    (tmp_path / "corpus").symlink_to(sources / "corpus")
    (tmp_path / "config.py").write_text(FINE_TUNE)
    shutil.copytree(sources / "hf", tmp_path / "hf")
    shutil.copy(sources / "model.gguf", tmp_path / "model.gguf")
    return Door(tmp_path, trained._cache)


def on_one_device(boxed):
    return on_device(boxed, jax.devices()[0])


def best_loss(directory):
    return min(line["loss"] for line in metrics(directory, "validation"))


def test_all_weights_are_tuned_from_where_the_source_ended(place, trained):
    out = place.run("train.py", "--config", "config.py", "--init-from", "hf", "--workdir", "tuned", *SHORT)
    run = place.directory / "tuned"
    before, after = metrics(run, "validation")
    assert (before["step"], after["step"]) == (0, 6)
    assert before["loss"] == pytest.approx(best_loss(trained.directory / "runs/config"), rel=1e-5)
    assert after["loss"] < before["loss"]
    config = read_config(run / "config.json")
    assert (config.init_from, config.data.tokenizer, config.model.embed_dim) == ("hf", "hf", 32)
    assert config.model.context_length == 128
    hashes = [nextllm_jax.load(str(place.directory / name)).tokenizer.hash for name in ("hf", "tuned")]
    assert hashes[0] == hashes[1]
    assert "hf" in out.stderr  # data/corpus-hf-... is prepared with it
    arguments = ("train.py", "--config", "config.py", "--init-from", "model.gguf", "--workdir", "tuned", *SHORT)
    failed = place.run(*arguments, exit_code=2)
    assert "init_from hf -> model.gguf" in failed.stderr


def test_adapters_resume_bit_for_bit_and_are_merged_at_every_door(place, trained):
    adapted = ("--init-from", "model.gguf", "--lora.rank", "4", "--lora.alpha", "32", *SHORT)
    place.run("train.py", "--config", "config.py", *adapted, "--workdir", "whole")
    part = ("--optimizer.schedule-steps", "6", "--workdir", "parts")
    place.run("train.py", "--config", "config.py", *adapted, *part, "--training.steps", "3")
    (place.directory / "model.gguf").unlink()
    out = place.run("train.py", "--config", "config.py", *adapted, *part)
    assert "continuing from step 3" in out.stderr
    whole, parts = place.directory / "whole", place.directory / "parts"
    losses = [[line["loss"] for line in metrics(run, "train")] for run in (whole, parts)]
    assert losses[0] == losses[1]
    ends = [saved_arrays(run, 6) for run in (whole, parts)]
    assert ends[0].keys() == ends[1].keys()
    assert not any("embed" in path for path in ends[0])
    for path, array in ends[0].items():
        np.testing.assert_array_equal(array, ends[1][path], err_msg=path)
    before, *_, after = metrics(whole, "validation")
    assert before["loss"] == pytest.approx(best_loss(trained.directory / "runs/config"), rel=1e-5)
    assert after["loss"] < before["loss"]
    assert [(report.path.parent.name, report.state) for report in check_steps(find_steps(whole))][:2] == [
        ("checkpoints", "ok"),
        ("base", "ok"),
    ]

    llm = nextllm_jax.load(str(whole), dtype="float32")
    (data,) = (place.directory / "data").glob("corpus-model*")
    assert score_data(llm, str(data), window=64).nll == pytest.approx(after["loss"], rel=1e-5)
    export_model(str(whole), str(place.directory / "merged.gguf"), file_format="gguf", dtype="float32")
    merged = nextllm_jax.load(str(place.directory / "merged.gguf"), dtype="float32")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), llm.params, merged.params)

    # The adapters alone are where another run goes on.
    place.run("nextllm_jax.cli", "export", "--checkpoint", "whole", "--output", "adapter", "--adapter-only")
    base = ("--init-from", trained.directory / "model.gguf", "--data.path", data)
    more = (*base, "--lora.adapter", "adapter", "--workdir", "more", *SHORT)
    place.run("train.py", "--config", "config.py", *more, "--training.steps", "1", "--training.sample-tokens", "0")
    start, *_ = metrics(place.directory / "more", "validation")
    assert (start["step"], start["loss"]) == (0, pytest.approx(after["loss"], rel=1e-5))
    lora = read_config(place.directory / "more" / "config.json").lora
    assert (lora.rank, lora.alpha, lora.targets, lora.adapter) == (4, 32.0, (), "adapter")
    asked = LoraConfig(rank=8, adapter=str(place.directory / "adapter"))
    with pytest.raises(InputError, match=r"lora\.rank is 8, but the adapter .* has 4; leave it out"):
        resolve(init_from=str(place.directory / "hf"), lora=asked)

    manifest = whole / "base" / "0" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(InputError, match="holds other base weights"):
        nextllm_jax.load(str(whole))


@pytest.mark.slow
def test_adapters_are_tuned_again_on_merged_and_quantized_weights(place):
    adapted = ("--init-from", "model.gguf", "--lora.rank", "4", "--lora.alpha", "32", *SHORT)
    place.run("train.py", "--config", "config.py", *adapted, "--workdir", "whole")
    *_, after = metrics(place.directory / "whole", "validation")
    (data,) = (place.directory / "data").glob("corpus-model*")
    again = ("--init-from", "whole", "--lora.rank", "2", "--lora.frozen", "int8", "--workdir", "again")
    place.run("train.py", "--config", "config.py", *again, *SHORT, "--data.path", data, "--training.sample-tokens", "0")
    before, *_, better = metrics(place.directory / "again", "validation")
    assert before["loss"] == pytest.approx(after["loss"], rel=0.01)
    assert better["loss"] < before["loss"]


@pytest.mark.slow
def test_adapters_that_were_trained_here_are_certified(place):
    """Merged, and alone in peft where it is installed."""
    adapted = ("--init-from", "hf", "--lora.rank", "4", "--lora.alpha", "6", "--lora.rank-stabilized", *SHORT)
    place.run("train.py", "--config", "config.py", *adapted, "--lora.targets", "q", "down", "--workdir", "whole")
    out = place.run("nextllm_jax.cli", "certify", "whole", "--json")
    rows = {row["check"]: row for row in json.loads(out.stdout)["checks"]}
    assert not any(row["status"] == "FAILED" for row in rows.values()), rows
    compared = [row["status"] for check, row in rows.items() if check.startswith("peft")]
    assert compared == (["skipped"] if importlib.util.find_spec("peft") is None else ["ok", "ok"])


@pytest.mark.slow
def test_two_processes_train_adapters_as_one_does(place):
    adapted = ("--init-from", "model.gguf", "--lora.rank", "4", "--lora.alpha", "32", *SHORT)
    place.run("train.py", "--config", "config.py", *adapted, "--workdir", "one")
    with Processes(place, 2, *adapted, "--mesh.fsdp", "2", "--workdir", "two") as two:
        assert two.end()[0] == [0, 0], two.outputs()
    for split in ("train", "validation"):
        lines = [
            [(line["step"], line["loss"]) for line in metrics(place.directory / run, split)] for run in ("one", "two")
        ]
        np.testing.assert_allclose(*lines, rtol=2e-5)


def test_conversations_are_learnt_from_a_file_of_messages(place):
    talks = [
        [{"role": "user", "content": f"what has {name}?"}, {"role": "assistant", "content": f"{name} has fish {n}."}]
        for n in range(12)
        for name in ("the cat", "a dog", "Zoë")
    ]
    talks.append([*talks[0], {"role": "user", "content": "more"}, {"role": "assistant", "content": "the cat " * 60}])
    (place.directory / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (place.directory / "mine.jinja").write_text(TEMPLATE)
    chat = ("--data.corpus", "talks.jsonl", "--data.messages-field", "messages", "--data.chat-template", "mine.jinja")
    out = place.run("train.py", "--config", "config.py", "--init-from", "hf", "--workdir", "chat", *chat, *SHORT)
    said = [int(count) for count in re.findall(r"(\d+) are longer than data.sequence_length and are split", out.stderr)]
    assert sum(said) == 1
    before, after = metrics(place.directory / "chat", "validation")
    assert after["loss"] < before["loss"]
    llm = nextllm_jax.load(str(place.directory / "chat"), dtype="float32")
    assert llm.tokenizer.chat_template == TEMPLATE
    (data,) = (place.directory / "data").glob("talks*")
    score = score_data(llm, str(data), window=64)
    assert (score.nll, score.bits_per_byte) == pytest.approx((after["loss"], after["bits_per_byte"]), rel=1e-5)


def resolve(config=None, file=None, **changes):
    file = file or Config(model=ModelConfig(), data=DataConfig(sequence_length=64))
    return with_source(dataclasses.replace(config or file, **{"workdir": "nowhere", **changes}), file)[0]


@pytest.mark.parametrize("name", [*SOURCES, "runs/config"])
def test_opening_the_source_touches_no_device(sources, name):
    """A process of several joins the others before jax looks for its devices, and cannot afterwards."""
    program = """
import sys
from jax._src import xla_bridge
from nextllm_jax.config import Config, DataConfig
from nextllm_jax.pretrained.init_from import with_source
config = Config(init_from=sys.argv[1], workdir="nowhere", data=DataConfig(sequence_length=64))
with_source(config, config)
sys.exit(xla_bridge.backends_are_initialized())
"""
    subprocess.run([sys.executable, "-c", program, str(sources / name)], check=True)


def test_the_model_is_the_sources_but_for_how_it_is_computed(sources, messages):
    gguf, source = str(sources / "model.gguf"), read_config(sources / "runs/config/config.json").model
    ours = ModelConfig(num_layers=7, remat="full", param_dtype="bfloat16", context_length=96)
    file = Config(model=ours, data=DataConfig(sequence_length=64, tokenizer="gpt2"))
    found = resolve(file=file, init_from=gguf)
    for name in ("num_layers", "embed_dim", "head_dim", "rope_theta", "tie_embeddings", "vocab_size"):
        assert getattr(found.model, name) == getattr(source, name)
    assert (found.model.remat, found.model.param_dtype, found.model.context_length) == ("full", "bfloat16", 96)
    assert found.data.tokenizer == gguf
    assert "model.num_layers 7 -> 2" in messages.text
    messages.clear()
    again = resolve(file=found, init_from=gguf)
    assert again == found
    assert found.workdir == "nowhere"
    assert not messages.messages
    assert resolve().model == ModelConfig()


def test_how_it_is_trained_is_the_configs(tmp_path):
    write_huggingface(tmp_path / "hf", dataclasses.replace(SMALL, num_experts=4))
    file = Config(model=ModelConfig(load_balance_weight=0.5), data=DataConfig(sequence_length=64))
    scaled = {"parametrization": "completep", "base_width": 8, "base_depth": 1}
    asked = dataclasses.replace(file, model=dataclasses.replace(file.model, router_z_weight=0.0, **scaled))
    model = resolve(asked, file, init_from=str(tmp_path / "hf")).model
    assert (model.num_experts, model.load_balance_weight, model.router_z_weight) == (4, 0.5, 0.0)
    assert (model.parametrization, model.base_width, model.base_depth) == ("completep", 8, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": ModelConfig(num_layers=3)}, ["model.num_layers is 3", "has 2"]),
        ({"model": ModelConfig(context_length=4096)}, ["model.context_length is 4096", "has 128"]),
        ({"data": DataConfig(sequence_length=500)}, ["data.sequence_length 500", "model.context_length 128"]),
        ({"data": DataConfig(sequence_length=64, tokenizer="other")}, ["other"]),
        ({"init_from": "missing"}, ["missing", "not a run directory"]),
        ({"init_from": None, "lora": LoraConfig(rank=2)}, ["lora.rank is 2", "set init_from"]),
    ],
)
def test_what_the_source_does_not_have_is_refused(sources, changes, words):
    with pytest.raises(InputError) as caught:
        resolve(**{"init_from": str(sources / "model.gguf"), **changes})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_of_another_tokenizer_is_refused(sources, trained):
    config = resolve(init_from=str(sources / "runs/config"), data=DataConfig(sequence_length=64, path="elsewhere"))
    path = next((trained.directory / "data").iterdir())
    same = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path)))
    params = initial_params(same, None, on_one_device)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    half = dataclasses.replace(same, model=dataclasses.replace(same.model, param_dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(initial_params(half, None, on_one_device))} == {"bfloat16"}
    other = dataclasses.replace(same, init_from=str(sources / "hf"))
    assert Dataset.open(path).tokenizer_hash != nextllm_jax.load(str(sources / "hf")).tokenizer.hash
    require_tokenizer(same, open_model(same.init_from), path)
    with pytest.raises(InputError, match="another tokenizer than that of init_from"):
        require_tokenizer(other, open_model(other.init_from), path)
    with pytest.raises(InputError, match="itself"):
        resolve(init_from=str(sources / "hf"), workdir=str(sources / "hf"))


def test_adapters_of_a_run_keep_their_shape(tmp_path):
    config = Config(init_from="a", lora=LoraConfig(rank=4), workdir=str(tmp_path))
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(InputError, match=r"lora\.rank 4 -> 8 \(cannot change"):
        require_resumable(RunDir(tmp_path), dataclasses.replace(config, lora=LoraConfig(rank=8)), ["lora.alpha"])
    more = dataclasses.replace(config, init_from="b", lora=LoraConfig(rank=4, alpha=8.0))
    with pytest.raises(InputError, match=r"init_from a -> b \(no effect"):
        require_resumable(RunDir(tmp_path), more, ["lora.alpha"])
    assert len(require_resumable(RunDir(tmp_path), more, ["lora.alpha", "init_from"])) == 2
