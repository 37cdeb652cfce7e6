"""Evaluations of live weights, against those of the same weights on one device."""

import dataclasses
import functools
import json
import operator
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import EvaluationConfig, MeshConfig
from nextllm_jax.config.files import load_config_file
from nextllm_jax.data.sources import open_sources
from nextllm_jax.errors import InputError
from nextllm_jax.inference.llm import LLM
from nextllm_jax.training.evaluations import evaluations
from nextllm_jax.training.setup import open_session
from nextllm_jax.training.start import Start

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
    data = dataclasses.replace(config.data, path="data/known")
    return dataclasses.replace(config, workdir="run", data=data)


def test_live_weights_on_a_mesh_have_the_results_of_the_model_on_one_device(config, door, messages, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install '.[lm-eval]'")
    rows = [{"question": f"the cat {i}", "choices": ["sees", "likes", "has"], "answer": i % 3} for i in range(7)]
    (door.directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (door.directory / "choice.yaml").write_text(TASK)
    (door.directory / "row.txt").write_text("the cat sees fish")
    entries = ("corpus/000.txt", "row:row.txt")
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(fsdp=2, tensor=2, sequence=2),
        training=dataclasses.replace(config.training, ema_decay=0.5),
        evaluation=EvaluationConfig(texts=entries, lm_eval_tasks=("choice.yaml",), every_steps=40),
    )
    start = Start(config, lambda: open_sources(config.data))
    with jax.set_mesh(start.mesh):
        state = start.program.create_state()
        state = dataclasses.replace(state, params=jax.tree.map(jnp.zeros_like, state.params))
        assert [*evaluations(start, 20, state)] == []
        *texts, choice = evaluations(start, 40, state)
        (door.directory / "questions.jsonl").unlink()
        (door.directory / "cache").rename(door.directory / "moved")
        (door.directory / "choice.yaml").unlink()
        assert [*evaluations(start, 40, state)] == [*texts, choice], "a task is loaded once"
    average = jax.device_get(state.average)
    llm = LLM(config.model, average, lambda: start.tokenizer, np.dtype("float32"))
    expected = {
        f"bits_per_byte/{name}": llm.score((door.directory / file).read_text()).bits_per_byte
        for name, file in (("000.txt", "corpus/000.txt"), ("row", "row.txt"))
    }
    assert functools.reduce(operator.or_, texts) == pytest.approx(expected, rel=1e-5)
    right = 0
    for row in rows:
        scores = [llm.score(f" {choice}", prefix=row["question"]).logprobs[:-1] for choice in row["choices"]]
        totals = [sum(each) for each in scores]
        right += totals.index(max(totals)) == row["answer"]
    assert choice == {"lm_eval/local_choice/acc": pytest.approx(right / len(rows))}

    assert start.tasks is not None
    monkeypatch.setattr(start.tasks, "run", mock.Mock(side_effect=FileNotFoundError("questions.jsonl")))
    with jax.set_mesh(start.mesh):
        assert [*evaluations(start, 40, state)] == texts, "a task that fails ends no training"
    assert messages.messages[-1].startswith("step 40: the task choice.yaml failed (FileNotFoundError: ")


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
    config = dataclasses.replace(config, evaluation=EvaluationConfig(texts=texts))
    with pytest.raises(InputError, match=message), open_session(config):
        pass
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
    (door.directory / "questions.jsonl").write_text(json.dumps({"question": "q", "choices": ["a"], "answer": 0}))
    for name in ("one.yaml", "two.yaml"):
        (door.directory / name).write_text(TASK.replace("local_choice", "same_choice"))
    with pytest.raises(InputError, match=r"one.yaml and two.yaml both have the task same_choice; leave one out"):
        Tasks(["one.yaml", "two.yaml"])
