"""Evaluations of live weights, against the same evaluations of the checkpoint that has them."""

import dataclasses
import json
import os

import pytest

import nextllm_jax
from nextllm_jax.config import EvaluationConfig, MeshConfig
from nextllm_jax.config.files import load_config_file
from nextllm_jax.errors import InputError
from nextllm_jax.training.loop import run_steps
from nextllm_jax.training.setup import open_session
from tests.runs import metrics

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

TASK = """
task: local_choice
dataset_path: json
test_split: test
dataset_kwargs: {data_files: {test: questions.jsonl}, cache_dir: cache}
output_type: multiple_choice
doc_to_text: "{{question}}"
target_delimiter: " "
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def config(door, monkeypatch):
    """The config of the shared run, with a directory of its own."""
    monkeypatch.chdir(door.directory)
    config = load_config_file("config.py")
    training = dataclasses.replace(config.training, log_every_steps=40, sample_tokens=0, steps=4, evaluate_every_steps=2)
    data = dataclasses.replace(config.data, path="data/known")
    return dataclasses.replace(config, workdir="run", data=data, training=training)


def train(config):
    with open_session(config) as (session, at):
        return run_steps(session, at)


def test_texts_have_the_bits_per_byte_of_the_checkpoint_on_any_mesh(config, door):
    texts = [door.directory / "corpus" / name for name in ("000.txt", "001.txt")]
    entries = ("corpus/000.txt", "second:corpus/001.txt")
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(fsdp=2, tensor=2, sequence=2),
        training=dataclasses.replace(config.training, ema_decay=0.5),
        evaluation=EvaluationConfig(texts=entries, every_steps=4),
    )
    assert train(config) == "finished"
    first, last = metrics(door.directory / "run", "validation")
    assert "bits_per_byte/second" not in first, "not due at step 2"
    found = [last[f"bits_per_byte/{name}"] for name in ("000.txt", "second")]
    llm = nextllm_jax.load("run", step="latest")
    expected = [llm.score(text.read_text()).bits_per_byte for text in texts]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[0] != found[1]


def test_tasks_have_the_metrics_of_the_harness_and_may_fail(config, door, monkeypatch, messages):
    pytest.importorskip("lm_eval", reason="pip install '.[lm-eval]'")
    from nextllm_jax.evaluation import harness

    rows = [{"question": f"the cat {i}", "choices": ["sees", "likes", "has"], "answer": i % 3} for i in range(7)]
    (door.directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (door.directory / "choice.yaml").write_text(TASK)
    evaluation = EvaluationConfig(lm_eval_tasks=("choice.yaml",))
    config = dataclasses.replace(config, evaluation=evaluation)
    plain, calls = harness.simple_evaluate, []

    def fails_first(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no disk")
        return plain(*args, **kwargs)

    monkeypatch.setattr(harness, "simple_evaluate", fails_first)
    assert train(config) == "finished"
    assert "step 2: the task choice.yaml failed (RuntimeError: no disk)" in messages.messages
    first, last = metrics(door.directory / "run", "validation")
    assert not [name for name in first if name.startswith("lm_eval")]
    llm = nextllm_jax.load("run", step="latest")
    right = 0
    for row in rows:
        scores = [llm.score(f" {choice}", prefix=row["question"]).logprobs[:-1] for choice in row["choices"]]
        totals = [sum(each) for each in scores]
        right += totals.index(max(totals)) == row["answer"]
    assert last["lm_eval/local_choice/acc"] == pytest.approx(right / len(rows))


@pytest.mark.parametrize(
    ("texts", "content", "message"),
    [
        (("nowhere.txt",), None, r"evaluation.texts: nowhere.txt cannot be read \(No such file"),
        (("a:text",), b"", "evaluation.texts a: the text to score is empty"),
        (("text",), b"\xff\xff", r"evaluation.texts: text is not valid UTF-8 \(invalid start byte\)"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused_before_a_run_is_begun(config, door, texts, content, message):
    if content is not None:
        (door.directory / "text").write_bytes(content)
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(config, evaluation=EvaluationConfig(texts=texts)))
    assert not (door.directory / "run").exists()


def test_tasks_that_cannot_be_loaded_are_refused(door, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install '.[lm-eval]'")
    from nextllm_jax.evaluation.harness import Tasks

    monkeypatch.chdir(door.directory)
    with pytest.raises(InputError, match=r"the task nowhere.yaml cannot be loaded \(Spec 'nowhere.yaml' is not"):
        Tasks(["nowhere.yaml"])
    (door.directory / "choice.yaml").write_text(TASK.replace("local_choice", "other_choice"))
    with pytest.raises(InputError, match=r"the task choice.yaml cannot be loaded \(Unable to find .*questions.jsonl"):
        Tasks(["choice.yaml"])
