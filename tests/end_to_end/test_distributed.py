"""Several processes of train.py on this machine meet, compute what one computes, stop together and fail together."""

import dataclasses
import hashlib
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from nextllm_jax.config import MeshConfig
from nextllm_jax.data.loader import TrainLoader
from nextllm_jax.data.mixture import Source
from nextllm_jax.data.shards import Dataset
from nextllm_jax.distributed.process_group import LAST_SECONDS
from nextllm_jax.sharding import make_mesh, sharding
from tests.conftest import ROOT
from tests.processes import (
    RUN,
    Processes,
    assert_same_losses,
    assert_same_metrics,
    devices,
    free_port,
    saved_steps,
)
from tests.runs import TRAINED_A_STEP, metrics, saved_arrays


def assert_sentence(output, pattern):
    assert re.search(f"^error: .*{pattern}", output, re.MULTILINE), output
    assert "Traceback" not in output, output


def test_two_processes_stopped_by_a_signal_to_one_and_continued_by_one_process(trained, door):
    """The parameters are divided over the processes, which also evaluate a text and write samples at step 20."""
    text = ("--evaluation.texts", "corpus/000.txt")
    with Processes(door, 2, "--mesh.fsdp", "2", *text, held={1: (TRAINED_A_STEP, 25)}) as two:
        two.wait_for("held", 1)
        two.signal(signal.SIGTERM, 1)
        two.release()
        codes, _ = two.end()
        assert codes == [75, 75], two.outputs()
        step = int(re.search(r"SIGTERM: saved step (\d+) and stopped", two.output(0))[1])
        assert saved_steps(door.directory / RUN) == [20, step]
        assert "step" not in two.output(1)
    door.run("train.py", "--config", "config.py")
    (line,) = [line for line in metrics(door.directory / RUN, "validation") if line["step"] == 20]
    assert 1 < line["bits_per_byte/000.txt"] < 8
    assert_same_losses(door.directory, trained.directory)
    assert (door.directory / RUN / "samples.txt").read_text() == (trained.directory / RUN / "samples.txt").read_text()


@pytest.mark.slow
def test_four_processes_in_two_slices_end_with_what_one_process_has(trained, door):
    """Data is divided over the slices and parameters inside of them; each process saves what it alone holds."""
    with Processes(door, 4, "--mesh.slices", "2", "--mesh.fsdp", "2", slices=2) as four:
        codes, _ = four.end()
        assert codes == [0] * 4, four.outputs()
        assert "4 x cpu (data 2, fsdp 2)" in four.output(0)
        assert "step 40/40" in four.output(0)
        for number in (1, 2, 3):
            assert not re.search("step|loss|parameters", four.output(number)), four.output(number)
    assert_same_metrics(door.directory, trained.directory)
    ours, theirs = (saved_arrays(where.directory / RUN, 40) for where in (door, trained))
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], atol=1e-5, err_msg=path)
    shards = (door.directory / RUN / "checkpoints" / "40" / "params").glob("ocdbt.process_*")
    assert len(list(shards)) == 4


@pytest.mark.slow
def test_two_processes_train_with_the_default_type_and_mesh(door):
    """They sum over `data` in bfloat16 on a CPU that has bfloat16 units."""
    short = ("--training.steps", "3", "--optimizer.schedule-steps", "40", "--training.sample-tokens", "0")
    with Processes(door, 2, "--model.dtype", "auto", *short) as two:
        codes, _ = two.end()
        assert codes == [0, 0], two.outputs()
        assert "2 x cpu (data 2)" in two.output(0)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other_and_the_checkpoint_stands(door, victim):
    with Processes(door, 2, "--mesh.fsdp", "2", held={victim: (TRAINED_A_STEP, 19)}) as two:
        two.wait_for("held", victim)
        two.wait_until(lambda: 15 in saved_steps(door.directory / RUN), "the checkpoint of step 15")
        two.signal(signal.SIGKILL, victim)
        codes, seconds = two.end()
        survivor = 1 - victim
        assert seconds < LAST_SECONDS
        assert codes[victim] == -signal.SIGKILL
        # jax loses process 0 at the same moment; if it is faster, it ends the process in C++.
        aborted = victim == 0 and codes[survivor] == -signal.SIGABRT
        if not aborted:
            assert codes[survivor] == 1, two.outputs()
            assert_sentence(two.output(survivor), f"process {victim} died .* continue from the latest checkpoint")


def test_another_config_is_refused_in_all_before_anything_is_written(door):
    with Processes(door, 2, own={1: ["--optimizer.learning-rate", "0.5"]}) as two:
        codes, _ = two.end()
        assert codes == [2, 2]
        for number in (0, 1):
            assert_sentence(two.output(number), "process 1 has optimizer.learning_rate 0.5, but process 0 has 0.005")
    assert not (door.directory / "runs").exists()


def test_what_process_0_fails_with_ends_all(door):
    with Processes(door, 2, "--data.corpus", "nowhere") as two:
        codes, _ = two.end()
        assert codes == [2, 2]
        assert_sentence(two.output(0), "data.corpus nowhere holds no text")
        assert_sentence(two.output(1), "process 0 failed: data.corpus nowhere holds no text")


def test_what_all_fail_with_is_one_sentence_each(door):
    with Processes(door, 2, "--mesh.data", "3") as two:
        codes, _ = two.end()
        assert codes == [2, 2], two.outputs()
        for number in (0, 1):
            assert_sentence(two.output(number), "mesh data 3, .* does not use 2 devices")
    assert not (door.directory / "runs").exists()


def test_a_process_that_does_not_come_is_named(door):
    with Processes(door, 3, "--distributed.start-timeout-seconds", "8", absent=[1]) as two:
        codes, _ = two.end()
        assert codes == [1, 1]
        for number in (0, 2):
            assert f"waiting for 3 processes at {two.address}, 2 joined: 0, 2" in two.output(number)
            assert_sentence(two.output(number), f"of 3 processes at {two.address}, 1 did not connect within 8 seconds")


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_while_compiling_ends_all_at_once(door, count):
    # The other process says nothing when it comes here.
    held = {1: ("nextllm_jax.training.profiler:StepProfiler.before_step", 1)} if count > 1 else {}
    with Processes(door, count, held=held, JAX_ENABLE_COMPILATION_CACHE="0") as processes:
        processes.wait_for("compiling the train step")
        for number in held:
            processes.wait_for("held", number)
        processes.signal(signal.SIGINT, count - 1)
        codes, _ = processes.end()
        assert codes == [75] * count, processes.outputs()
        assert "SIGINT while compiling the train step" in processes.output(0)
        assert "compiled the train step" not in processes.output(0)
    assert saved_steps(door.directory / RUN) == []


def test_bad_flags_are_one_sentence(door):
    failed = door.run("train.py", "--config", "config.py", "--distributed.process-id", "1", exit_code=2)
    assert "distributed.coordinator_address and distributed.num_processes must be set too" in failed.stderr
    assert "Traceback" not in failed.stderr


MESHES = [
    MeshConfig(),
    MeshConfig(fsdp=4),
    MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    MeshConfig(data=1, tensor=2, sequence=4),
]

HASH_BATCHES = """
import hashlib, json, sys
import jax
from jax.experimental import multihost_utils
from nextllm_jax.config import MeshConfig
from nextllm_jax.data.loader import TrainLoader
from nextllm_jax.data.mixture import Source
from nextllm_jax.data.shards import Dataset
from nextllm_jax.sharding import make_mesh, sharding

address, process, data, meshes = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
jax.distributed.initialize(address, 2, process)
for mesh in meshes:
    loader = TrainLoader([Source(Dataset.open(data))], sequence_length=64, global_batch_size=8, seed=0,
                         sharding=sharding(make_mesh(MeshConfig(**mesh)), "batch", "seq"))
    batches = loader.batches(17)
    digest = hashlib.sha256()
    for _ in range(4):
        for array in next(batches):
            digest.update(multihost_utils.process_allgather(array, tiled=True).tobytes())
    print(digest.hexdigest(), flush=True)
"""


def test_batches_have_the_same_hash_on_every_mesh_and_number_of_processes(trained, door):
    data = trained.directory / "data" / "known"
    sources = [Source(Dataset.open(data))]
    digests = []
    for mesh in [MeshConfig(), *MESHES]:
        loader = TrainLoader(
            sources, sequence_length=64, global_batch_size=8, seed=0, sharding=sharding(make_mesh(mesh), "batch", "seq")
        )
        batches, digest = loader.batches(17), hashlib.sha256()
        for _ in range(4):
            for array in next(batches):
                digest.update(np.asarray(array).tobytes())
        digests.append(digest.hexdigest())
    assert len(set(digests)) == 1
    meshes, address = json.dumps([dataclasses.asdict(mesh) for mesh in MESHES]), f"localhost:{free_port()}"
    two = [
        subprocess.Popen(
            [sys.executable, "-c", HASH_BATCHES, address, str(process), str(data), meshes],
            env={**door.environment, "XLA_FLAGS": devices(4)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in two:
        out, _ = process.communicate(timeout=200)
        assert re.findall(r"^[0-9a-f]{64}$", out, re.MULTILINE) == [digests[0]] * len(MESHES)
