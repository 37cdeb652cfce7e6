"""`nextllm doctor` says beforehand what `train.py` would end with, and writes nothing."""

import dataclasses
import hashlib
import json
import os
import re
import shutil

import pytest

from nextllm_jax import hardware
from nextllm_jax.config.files import load_config_file
from nextllm_jax.data import prepare
from nextllm_jax.data.shards import Dataset
from nextllm_jax.diagnostics import doctor, machine
from nextllm_jax.diagnostics.doctor import diagnose
from nextllm_jax.training.open_run import open_run
from tests.conftest import write_corpus


def contents(directory):
    files = (path for path in directory.rglob("*") if path.name != ".lock")
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in files}


@pytest.fixture
def config(door, monkeypatch):
    """The config of the shared run, whose data is prepared, in a directory without a run."""
    monkeypatch.chdir(door.directory)
    return load_config_file("config.py")


@pytest.fixture
def run(trained, config):
    """A copy of the finished run."""
    shutil.copytree(trained.directory / "runs", "runs")
    return config


def changed(config, changes):
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        part = dataclasses.replace(getattr(config, section) if section else config, **{field: value})
        config = dataclasses.replace(config, **{section: part}) if section else part
    return config


def problems(config, **options):
    return [f"{found.name}: {found.message}" for found in diagnose(config, **options) if found.status == "PROBLEM"]


def warnings(config, **options):
    return [f"{found.name}: {found.message}" for found in diagnose(config, **options) if found.status == "warning"]


def test_a_sound_start_is_found_sound_in_the_order_of_train_and_nothing_is_written(door, config):
    before = contents(door.directory)
    shown = []
    findings = diagnose(config, show=shown.append)
    assert findings == shown
    assert {found.status for found in findings} == {"ok"}, findings
    assert [found.name for found in findings] == [
        *("versions", "data", "devices", "model", "data", "fit", "batches", "memory", "save", "run", "disk", "clock")
    ]
    assert contents(door.directory) == before


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"workdir": "s3://bucket/run"}, "run: s3://bucket/run cannot be a run"),
        ({"workdir": "corpus"}, "run: corpus is not empty and not a run"),
        ({"workdir": "config.py/run"}, "run: .*config.py is not a directory; move it, or choose another --workdir"),
        ({"data.path": "data/knwon"}, "data: data.path data/knwon holds no prepared data"),
        ({"data.corpus": "nowhere"}, "data: data.corpus nowhere holds no text"),
        (
            {"data.mixture": ("corpus:1", "nowhere:1")},
            "data: data.mixture nowhere is read as a corpus, .* holds no text",
        ),
        ({"data.corpus": "corpus", "data.tokenizer": "no.tiktoken"}, "data: tokenizer no.tiktoken is not"),
        ({"data.corpus": "config.py"}, "data: data.corpus holds one document; give at least two different documents"),
        ({"data.messages_field": "m", "data.corpus": "stdlib"}, "data: data.messages_field needs a corpus of rows"),
        (
            {"data.vocab_size": 300, "model.context_length": 50_000, "data.sequence_length": 50_000},
            "batches: data.sequence_length 50000 is too long for the train split",
        ),
        ({"platform": "tpu"}, "devices: platform is tpu, but jax found cpu"),
        ({"mesh.data": 3}, "devices: .* does not use 8 devices exactly"),
        (
            {"data.path": "data/known", "data.vocab_size": 300, "model.vocab_size": 300},
            "fit: the data's tokenizer has 320 tokens, but model.vocab_size is 300",
        ),
        (
            {"training.sample_tokens": 126, "training.sample_prompts": ("the cat",)},
            "fit: .* must fit model.context_length 128",
        ),
        ({"training.global_batch_size": 12}, "model: .* must be divisible by mesh.data x mesh.fsdp x mesh.expert = 8"),
        ({"mesh.data": 1, "mesh.tensor": 8}, "model: .*kernel: its '.*heads' axis of size . cannot be sharded over 8"),
    ],
)
def test_what_train_would_end_with_is_a_problem(door, config, changes, problem):
    before = contents(door.directory)
    found = problems(changed(config, changes))
    assert re.match(problem, found[0]), found
    assert contents(door.directory) == before


def test_a_mixture_is_looked_at_with_a_sample_of_what_is_not_prepared(door, config):
    write_corpus(door.directory / "books", documents=15)
    before = contents(door.directory)
    findings = diagnose(changed(config, {"data.mixture": ("corpus:3", "books:1")}))
    assert {found.status for found in findings} == {"ok"}, findings
    assert "books: 55 windows of 64 tokens; 40 steps of 8 with weight 0.25 are 1.45 epochs" in [
        found.message for found in findings
    ]
    (found,) = problems(changed(config, {"data.mixture": ("corpus:3:0.5", "books:1:1")}))
    assert found.startswith("batches: all sources of data.mixture are exhausted before step 40")
    assert contents(door.directory) == before


ANSWERS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "roles", "problem"),
    [
        (None, ("user", "assistant"), "data: .* the tokenizer bpe-\\d+ has none"),
        ("nope", ("user", "assistant"), "data: data.chat_template template.jinja cannot be read"),
        ("{% for", ("user", "assistant"), "data: the chat template .*"),
        (ANSWERS, ("user", "assistant"), None),
        (ANSWERS, ("assistant", "user"), "batches: the train split .* has no token in its loss mask"),
    ],
)
def test_conversations_are_looked_at_as_preparing_does(door, config, template, roles, problem):
    """Where the assistant speaks first, its one token opens the document, and nothing predicts that."""
    pytest.importorskip("jinja2")
    rows = [
        [{"role": role, "content": content} for role, content in zip(roles, "abc", strict=False)] for _ in range(40)
    ]
    rows = [[*row, {"role": "user", "content": str(i)}] for i, row in enumerate(rows)]
    (door.directory / "rows.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    if template not in (None, "nope"):
        (door.directory / "template.jinja").write_text(template)
    changes = {"data.corpus": "rows.jsonl", "data.messages_field": "messages", "data.sequence_length": 8}
    config = changed(config, changes | {"data.chat_template": template and "template.jinja"})
    before = contents(door.directory)
    found = problems(config)
    assert re.match(problem, found[0]) if problem else not found, found
    assert contents(door.directory) == before


def test_of_a_long_corpus_the_beginning_is_looked_at(config, monkeypatch):
    monkeypatch.setattr(doctor, "SAMPLE_CHARACTERS", 1000)
    long = changed(config, {"data.vocab_size": 300, "model.context_length": 50_000, "data.sequence_length": 50_000})
    assert "the first 1,000 characters" in "".join(found.message for found in diagnose(long))
    assert problems(long) == []
    assert [found.split(":")[0] for found in warnings(long)] == ["batches"]


def test_a_used_run_directory(door, run):
    assert any("runs/config is finished at step 40 of 40" in found.message for found in diagnose(run))
    longer = changed(run, {"training.steps": 50, "seed": 3})
    (found,) = problems(longer)
    assert found.startswith("run: runs/config holds a run with another config")
    assert "\n  seed 0 -> 3 (" in found
    assert "\n  training.steps 40 -> 50 (" in found
    overrides = {"allow_change": ["seed", "training.steps"]}
    assert problems(longer, **overrides) == []
    assert any("would continue from step 40 of 50" in found.message for found in diagnose(longer, **overrides))
    assert warnings(longer, **overrides)[0].startswith("run: changed: seed 0 -> 3")
    assert warnings(longer, overwrite=True) == ["run: the run in runs/config would be moved into its overwritten/"]
    with open_run("runs/config", run):
        (found,) = problems(run)
        assert f"is in use by process {os.getpid()} on" in found
    assert problems(run) == []


def test_a_run_beyond_its_end_and_a_run_of_other_data(door, run):
    (found,) = problems(changed(run, {"training.steps": 20, "optimizer.schedule_steps": 40}))
    assert "is already at step 40, beyond training.steps 20" in found
    door.run("nextllm_jax.cli", "prepare", "--config", "config.py", "--tokenizer", "data/known/tokenizer",
             "--validation-fraction", "0.4", "--output", "fewer")  # fmt: skip
    fewer = changed(run, {"data.path": "fewer"})
    (found,) = problems(fewer)
    assert "the checkpoint was trained on other data than fewer holds" in found
    assert problems(fewer, allow_change=["data.path"]) == []
    (found,) = problems(changed(run, {"model.dtype": "bfloat16", "model.embed_dim": 64}))
    assert "embed_dim 32 -> 64 (cannot change" in found


def test_damage_is_named(door, run):
    array = max((door.directory / "runs/config/checkpoints/40").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    (found,) = warnings(run)
    assert "checkpoints/40: damaged: " in found
    assert "it would be set aside" in found
    shutil.copytree(door.directory / "runs", "copied runs")
    shutil.rmtree("copied runs/config/checkpoints/30")
    shutil.rmtree("copied runs/config/checkpoints/20", ignore_errors=True)
    (found,) = problems(changed(run, {"workdir": "copied runs/config"}))
    assert "checkpoints/40: damaged: " in found
    assert "training needs it" in found
    shutil.rmtree("copied runs/config/checkpoints")
    (found,) = problems(changed(run, {"workdir": "copied runs/config"}))
    assert "run: copied runs/config has metrics up to step 40, but no checkpoint" in found
    assert "checkpoints/40: damaged: " in problems(changed(run, {"checkpoint.strict": True}))[0]
    shutil.copytree("data/known", "copied")
    (door.directory / "copied" / "train-00000.bin").write_bytes(b"")
    (found,) = problems(changed(run, {"data.path": "copied", "workdir": "new"}))
    assert found.startswith("data: copied/train-00000.bin is damaged: 0 bytes instead of")


def test_a_tokenizer_that_would_be_fetched_is_told_of(config, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    named = changed(config, {"data.tokenizer": "cl100k_base"})
    found = warnings(named)
    address = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    assert found == [f"data: the network is needed for {address}"]
    (tmp_path / hashlib.sha1(address.encode()).hexdigest()).write_bytes(b"YQ== 0")
    monkeypatch.setattr(prepare, "load_tokenizer", lambda name: Dataset.open("data/known").tokenizer())
    assert warnings(named) == []


def test_memory_and_disk_are_compared_with_the_arithmetic(config, monkeypatch):
    state, gradients = machine.state_bytes(config), machine.parameter_bytes(config.model)
    copies = 8  # simulated devices, each with all of it, in the memory of one host
    for there, status in [((state + gradients) * copies - 1, "PROBLEM"), ((state + gradients) * copies + 1, "warning")]:
        monkeypatch.setattr(hardware, "available_host_memory", lambda there=there: there)
        (found,) = [found for found in diagnose(config) if found.name == "memory"]
        assert found.status == status, found
    monkeypatch.undo()
    usage = shutil.disk_usage
    for free, status in [(4 * state - 1, "PROBLEM"), (4 * state, "warning"), (10 * state, "ok")]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(path)._replace(free=free))
        (found,) = [found for found in diagnose(config) if found.name == "disk"]
        assert found.status == status, found


def test_the_command_has_the_exit_codes_and_json_of_its_findings(trained, door):
    out = door.run("nextllm_jax.cli", "doctor", "--config", "config.py").stdout
    assert "no problems found" in out
    found = door.run("nextllm_jax.cli", "doctor", "--config", "config.py", "--platform", "gpu", "--json", exit_code=1)
    report = json.loads(found.stdout)
    assert report["problems"] == 1
    (problem,) = [check for check in report["checks"] if check["status"] == "PROBLEM"]
    assert problem["name"] == "devices"
    refused = door.run("nextllm_jax.cli", "doctor", "--config", "config.py", "--allow-change", "sed", exit_code=2)
    assert "did you mean seed?" in refused.stderr
    assert not (door.directory / "runs").exists()
