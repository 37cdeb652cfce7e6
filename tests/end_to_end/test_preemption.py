"""SIGTERM on a machine that ends soon: the step is committed in time, or no save is started."""

import signal
import time
from types import SimpleNamespace

import pytest

from nextllm_jax.config import CheckpointConfig, Config, ModelConfig, TrainingConfig
from nextllm_jax.storage.open_storage import open_storage
from nextllm_jax.training import saving
from tests.faults.bucket_proxy import Fault
from tests.processes import RUN, Processes, saved_steps

TERM = signal.SIGTERM
SPOT = ("--training.preemption-seconds", "25")


def test_a_step_is_committed_in_the_bucket_within_25_seconds(door, bucket):
    with Processes(door, 1, "--workdir", bucket, *SPOT) as one:
        one.wait_for("step 18/40")
        one.signal(TERM)
        sent = time.monotonic()
        while max(committed(bucket), default=0) < 18:
            assert time.monotonic() - sent < 25, one.outputs()
            time.sleep(0.05)
        codes, _ = one.end()
    assert codes == [75], one.outputs()
    assert f"SIGTERM: saved step {committed(bucket)[-1]} and stopped" in one.output()


def committed(address):
    storage = open_storage(f"{address}/checkpoints")
    return sorted(int(name) for name in storage.names() if storage.exists(f"{name}/manifest.json"))


@pytest.mark.slow
def test_a_save_that_took_too_long_before_is_not_started(door, bucket, bucket_service):
    """The save of step 15, which is under way when the signal comes, is completed."""
    slow = Fault("POST .*uploadType=media", "wait", count=10**6, seconds=1.5)
    settings = ("--workdir", bucket, "--training.preemption-seconds", "1")
    with bucket_service.failing(slow), Processes(door, 1, *settings) as one:
        one.wait_for("step 18/40")
        one.signal(TERM)
        codes, _ = one.end()
    assert codes == [75], one.outputs()
    assert "SIGTERM: stopped without saving step " in one.output()
    assert " s at best, but 0.0 s of training.preemption_seconds are left); run the same command" in one.output()
    assert committed(bucket) == [15]
    assert {name.split("/")[0] for name in open_storage(f"{bucket}/checkpoints").files()} == {"15"}


@pytest.mark.slow
def test_two_processes_decide_alike(door):
    slow = ("--training.preemption-seconds", "25", "--checkpoint.megabytes-per-second", "1e-4")
    with Processes(door, 2, *slow) as two:
        two.wait_for("step 5/40")
        two.signal(TERM, 1)
        codes, _ = two.end()
    assert codes == [75, 75], two.outputs()
    assert "by checkpoint.megabytes_per_second, but" in two.outputs()
    assert saved_steps(door.directory / RUN) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"limit": None}, None),
        ({"name": "SIGINT", "speed": 1e-6}, None),
        ({"speed": 1e-6}, "by checkpoint.megabytes_per_second"),
        ({"speed": 1e-6, "measured": 5.0}, None),
        ({"measured": 21.0}, "a save takes 21.0 s at best, but 20.0 s of"),
        ({"measured": 21.0, "saved": [7]}, None),
    ],
)
def test_what_is_too_late(monkeypatch, changes, says):
    """5 s of 25 have passed since the signal."""
    case = SimpleNamespace(**{"limit": 25.0, "name": "SIGTERM", "speed": 1e3, "measured": None, "saved": []} | changes)
    monkeypatch.setattr(time, "monotonic", lambda: 105.0)
    config = Config(
        model=ModelConfig(vocab_size=8192),
        training=TrainingConfig(preemption_seconds=case.limit),
        checkpoint=CheckpointConfig(megabytes_per_second=case.speed),
    )
    checkpoints = SimpleNamespace(
        fastest_save_seconds=case.measured, is_saved=case.saved.__contains__, wait=lambda: None
    )
    stop = SimpleNamespace(name=case.name, asked_at=100.0)
    session = SimpleNamespace(config=config, stop=stop, checkpoints=checkpoints, pause=lambda: None)
    found = saving.too_late_to_save(session, SimpleNamespace(step=7))
    assert found == says if says is None else says in found
