"""Trackers and evaluations by the commands that a user types."""

import json
import socket
import sqlite3
import time

import pytest

import nextllm_jax
from tests.runs import metrics

SHORT = ("--optimizer.schedule-steps", "40", "--training.sample-tokens", "0")


def test_a_run_with_trackers_and_texts_is_continued(door):
    pytest.importorskip("wandb", reason="pip install '.[wandb]'")
    pytest.importorskip("trackio", reason="pip install '.[trackio]'")
    directory = door.directory
    settings = {"WANDB_MODE": "offline", "WANDB_DIR": str(directory), "TRACKIO_DIR": str(directory / "trackio")}
    train = ("train.py", "--config", "config.py", *SHORT, "--logging.trackers", "trackio", "wandb")
    first = door.run(*train, "--evaluation.texts", "a:corpus/000.txt", "--training.steps", "5", **settings)
    assert first.stdout == ""
    door.run(*train, "--training.steps", "10", **settings)
    run = directory / "runs" / "config"
    run_id = json.loads((run / "trackers.json").read_text())["id"]
    lines = metrics(run, "validation")
    assert [("bits_per_byte/a" in line, line["step"]) for line in lines] == [(True, 5), (False, 10)]
    score = nextllm_jax.load(run, step=5).score((directory / "corpus" / "000.txt").read_text())
    assert lines[0]["bits_per_byte/a"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    assert len([*(directory / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")]) == 2
    with sqlite3.connect(directory / "trackio" / "nextllm_jax.db") as database:
        rows = database.execute("select distinct run_name, step from metrics order by step").fetchall()
    assert rows == [(f"config-{run_id}", step) for step in range(1, 11)]


def test_nothing_is_imported_for_a_run_without_them(door):
    code = "import sys, nextllm_jax.training.setup as _; print({'wandb', 'trackio', 'lm_eval'} & {*sys.modules})"
    (door.directory / "imports.py").write_text(code)
    assert door.run(door.directory / "imports.py").stdout == "set()\n"


@pytest.mark.slow
def test_a_server_that_never_answers_delays_only_the_end(door):
    pytest.importorskip("wandb", reason="pip install '.[wandb]'")
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        settings = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}
        train = ("train.py", "--config", "config.py", *SHORT, "--training.steps", "5", "--logging.trackers", "wandb")
        started = time.monotonic()
        process = door.start(*train, WANDB_DIR=str(door.directory), **settings)
        assert process.wait(timeout=100) == 0
        seconds = time.monotonic() - started
        process.stdout.close()  # not read to its end, since wandb's own process keeps it open for a while
        process.stderr.close()
    assert len(metrics(door.directory / "runs" / "config", "train")) == 5
    assert seconds < 70
