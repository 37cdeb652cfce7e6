"""Input, device and host overlap: what the loop waits for, what it gives away, and the profile that shows it."""

import dataclasses
import gzip
import json
import re
from unittest import mock

import jax
import numpy as np
import pytest

from nextllm_jax.config.files import load_config_file
from nextllm_jax.sharding import make_mesh
from nextllm_jax.training import start
from nextllm_jax.training.loop import run_steps
from nextllm_jax.training.profiler import StepProfiler
from nextllm_jax.training.setup import open_session
from tests.runs import metrics


class Watched:
    """A device scalar of a step that notes when the host reads it."""

    def __init__(self, array, step, events):
        self.array, self.step, self.events = array, step, events

    def __array__(self, *args, **kwargs):
        self.events.append(("read", self.step))
        return np.asarray(self.array)

    def __bool__(self):
        return bool(self.__array__())

    __int__ = __float__ = None


def test_the_host_reads_nothing_of_a_step_before_the_next_is_dispatched(door, monkeypatch):
    """But where something is due: the first step, a line of metrics.jsonl, the end."""
    monkeypatch.chdir(door.directory)
    events, kept = [], []
    build = start.build_program

    def watched_program(config, mesh):
        program = build(config, mesh)

        def train_step(state, batch):
            step = len([event for event in events if event[0] == "dispatch"]) + 1
            events.append(("dispatch", step))
            new_state, measured = program.train_step(state, batch)
            kept.extend(leaf for leaf in jax.tree.leaves(state.opt_state) if not leaf.is_deleted())
            return new_state, type(measured)(*[Watched(array, step, events) for array in measured])

        return dataclasses.replace(program, train_step=train_step)

    monkeypatch.setattr(start, "build_program", watched_program)
    monkeypatch.setattr(start, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    config = load_config_file("config.py")
    training = dataclasses.replace(config.training, steps=20, log_every_steps=10, sample_tokens=0)
    data = dataclasses.replace(config.data, path=str(door.directory / "data" / "known"))
    checkpoint = dataclasses.replace(config.checkpoint, every_steps=20)
    config = dataclasses.replace(config, workdir="runs/watched", training=training, data=data, checkpoint=checkpoint)
    with open_session(config) as (session, at):
        assert run_steps(session, at) == "finished"
    dispatched = [events.index(("dispatch", step)) for step in range(1, 21)]
    read = [events.index(("read", step)) for step in range(1, 21)]
    early = [step for step in range(1, 20) if read[step - 1] < dispatched[step]]
    assert early == [1, 10]
    assert not kept, "the step did not take over the memory of its optimizer state"


def test_a_profile_has_the_steps_and_the_scopes_of_the_model(door):
    done = door.run("train.py", "--config", "config.py", "--profile", "3", "--training.steps", "6")
    run = door.directory / "runs" / "config"
    (trace,) = (run / "profile").glob("plugins/profile/*/*.xplane.pb")
    (perfetto,) = (run / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    assert str(perfetto.relative_to(door.directory)) in done.stderr
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    steps = [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]
    assert steps == [3, 4, 5]
    content = trace.read_bytes()
    for scope in (b"attention", b"mlp", b"loss", b"optimizer"):
        assert re.search(rb"[/(]" + scope + rb"[/)]", content), scope
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 7))


def test_what_cannot_be_profiled_is_said(door, tmp_path, messages):
    refused = door.run("train.py", "--config", "config.py", "--profile", "-1", exit_code=2)
    assert "--profile is -1" in refused.stderr
    profiler = StepProfiler(tmp_path / "profile", 10, 3, lambda: pytest.fail("paused"))
    for step in (11, 12):
        profiler.before_step(step)
        profiler.after_step(step, mock.Mock())
    profiler.close()
    profiler.close()
    assert messages.messages == ["no profile: training ended within the first 2 steps, which are not traced"]
    assert not (tmp_path / "profile").exists()
