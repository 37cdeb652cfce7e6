"""Runs of train.py in a bucket end where runs on disk end, also when processes are killed and share nothing else."""

import dataclasses
import json
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest

import nextllm_jax
from nextllm_jax.checkpoint.verify import check_steps, find_steps
from nextllm_jax.config.files import load_config_file
from nextllm_jax.diagnostics.doctor import diagnose
from nextllm_jax.evaluation.scoring import score_data
from nextllm_jax.pretrained.convert import export_model
from nextllm_jax.storage.open_storage import open_storage
from tests.checkpoint.tree import names
from tests.faults.bucket_proxy import Fault
from tests.processes import RUN, Processes, assert_same_losses, assert_same_metrics
from tests.runs import TRAINED_A_STEP, assert_same_end, fetched

COMMAND = ("train.py", "--config", "config.py", "--workdir")
DATA = "gs://bucket/data/config"


def steps(address):
    storage = open_storage(f"{address}/checkpoints")
    return sorted(int(name) for name in storage.names() if storage.exists(f"{name}/manifest.json"))


def cache(door):
    """The environment with a cache directory of this door's own."""
    return {"XDG_CACHE_HOME": str(door.directory / "cache")}


def killed_at_random(door, address, seed, *arguments):
    """Train until a SIGKILL: with an even seed after the first save, otherwise at any time."""
    process = door.start(*COMMAND, address, *arguments)
    while seed % 2 == 0 and process.poll() is None and not steps(address):
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 1.5 if seed % 2 == 0 else 15))
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def address(trained, bucket_service, tmp_path_factory):
    """A run and its data in a bucket. It was killed and continued, while a second training of it was refused."""
    address, door = "gs://bucket/runs/config", trained.beside(tmp_path_factory.mktemp("bucket"))
    (door.directory / "data").unlink()
    data = door.run("nextllm_jax.cli", "prepare", "--config", "config.py", "--output", DATA, **cache(door))
    assert data.stdout == f"{DATA}\n"
    killed_at_random(door, address, 0, "--data.path", DATA)
    assert open_storage(address).exists(".lock")
    slow = Fault("GET", "wait", count=10**6, seconds=0.005)
    with bucket_service.failing(slow):
        process = door.start(*COMMAND, address, "--data.cache-dir", "blocks")  # of the data that the run recorded
        while json.loads(open_storage(address).read(".lock") or "{}").get("pid") != process.pid:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        refused = door.run(*COMMAND, address, exit_code=2).stderr
        assert re.search(f"^error: {address} is in use by process {process.pid} on ", refused, re.MULTILINE), refused
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert sorted(path.name for path in door.directory.iterdir()) == ["blocks", "cache", "config.py", "corpus"]
    assert re.search(r"^saved step 40: \d+ writes and lists, \d+ reads, ", err, re.MULTILINE), err
    assert re.search(r"^storage: .* read; about \d+ requests per checkpoint, and [\d.]+ per step", err, re.MULTILINE), (
        err
    )
    assert "storage:" not in trained.log.stderr
    return address


def test_a_killed_and_continued_run_in_a_bucket_ends_as_one_on_disk(trained, address, tmp_path):
    assert_same_end(fetched(address, tmp_path), trained.directory / "runs" / "config", 40)
    files = ["config.json", "layers.png", "loss.png", "metrics.jsonl", "samples.txt"]
    assert set(names(tmp_path)) - {"compiled"} == {"checkpoints", "tensorboard", "tokenizer", *files}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_commands_read_a_run_in_a_bucket(trained, address, tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")
    local = str(trained.directory / "runs" / "config")
    assert [report.state for report in check_steps(find_steps(address))] == ["ok", "ok"]
    ours, theirs = nextllm_jax.load(address), nextllm_jax.load(local)
    tokens = np.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(ours.logits(tokens), theirs.logits(tokens))
    assert ours.score("the cat sees fish.") == theirs.score("the cat sees fish.")
    on_disk = str(trained.directory / "data" / "known")
    assert score_data(ours, DATA, window=64) == score_data(theirs, on_disk, window=64)
    for source, output in ((address, tmp_path / "ours"), (local, tmp_path / "theirs")):
        export_model(source, str(output), file_format="huggingface")
    weights = [tmp_path / name / "model.safetensors" for name in ("ours", "theirs")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    monkeypatch.chdir(trained.directory)
    found = diagnose(dataclasses.replace(load_config_file("config.py"), workdir=address))
    assert not [finding for finding in found if finding.status != "ok" and finding.name in ("run", "disk", "clock")]
    assert "is finished at step 40 of 40" in str(found)
    assert "is not limited" in str(found)
    assert ("data", DATA) in [(finding.name, finding.message) for finding in found]
    assert "verified when it is read" in str(found)


@pytest.mark.slow
def test_damaged_data_ends_a_training_in_one_line(trained, bucket, door):
    """It is found when its block is read, and the run continues once the data is restored."""
    (prepared,) = (trained.directory / "data").glob("corpus-*")
    for path in prepared.rglob("*"):
        if path.is_file():
            open_storage(bucket).write(f"data/{path.relative_to(prepared).as_posix()}", path.read_bytes())
    name, settings = "data/train-00000.bin", ("--data.path", f"{bucket}/data", "--training.steps", "60")
    content = open_storage(bucket).read(name)
    door.run(*COMMAND, f"{bucket}/run", "--data.path", f"{bucket}/data", "--optimizer.schedule-steps", "60")
    open_storage(bucket).write(name, content[:-1] + bytes([content[-1] ^ 1]))
    settings = (*COMMAND, f"{bucket}/run", "--training.steps", "60", "--optimizer.schedule-steps", "60")
    stopped = door.run(*settings, exit_code=2).stderr
    says = rf"^error: {bucket}/{name} is damaged or .* bytes 0 to [\d,]+ differs"
    assert re.search(says, stopped, re.MULTILINE), stopped
    assert "Traceback" not in stopped
    open_storage(bucket).write(name, content)
    assert "continuing from step 40" in door.run(*settings).stderr
    assert steps(f"{bucket}/run")[-1] == 60


def on_hosts(door, count, address, *arguments, **options):
    """Processes with a directory of their own each, which share only the bucket."""
    directories = [door.directory / f"host-{number}" for number in range(count)]
    for directory in directories:
        directory.mkdir(exist_ok=True)
        shutil.copy(door.directory / "config.py", directory)
    shared = ("--mesh.fsdp", count, "--workdir", address, "--data.path", DATA)
    return Processes(door, count, *shared, *arguments, directories=directories, **options)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_share_only_the_bucket(trained, address, bucket, door, tmp_path, count):
    """One of them has a copy of the data, and the others read it from the bucket."""
    own = {0: ("--data.path", str(trained.directory / "data" / "known"))}
    with on_hosts(door, count, bucket, own=own) as processes:
        codes, _ = processes.end()
        assert codes == [0] * count, processes.outputs()
    left = {path.name for number in range(count) for path in (door.directory / f"host-{number}").iterdir()}
    assert left == {"config.py"}
    fetched(bucket, tmp_path / "runs" / "config")
    assert_same_metrics(tmp_path, trained.directory)
    shards = open_storage(bucket).files("checkpoints/40")
    names = {name.split("/")[2] for name in shards if "params/ocdbt" in name}
    assert names == {f"ocdbt.process_{number}" for number in range(count)}


@pytest.fixture(scope="module")
def of_two(trained, address, tmp_path_factory):
    """The directory of a run that two processes trained in a bucket without an interruption."""
    door = trained.beside(tmp_path_factory.mktemp("two"))
    with on_hosts(door, 2, "gs://bucket/runs/of-two") as two:
        codes, _ = two.end()
        assert codes == [0, 0], two.outputs()
    return fetched("gs://bucket/runs/of-two", door.directory / RUN)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_processes_killed_at_random(trained, of_two, bucket, door, seed):
    """One process or both are killed. Two continue bit for bit, one and four to the rounding of float32."""
    moment = random.Random(seed)
    with on_hosts(door, 2, bucket) as two:
        if seed % 3:
            two.wait_until(lambda: steps(bucket), "the first checkpoint")
        time.sleep(moment.uniform(0, 3 if seed % 3 else 20))
        two.signal(signal.SIGKILL, *([moment.randrange(2)] if seed % 2 else []))
        two.end()
    count = {8: 1, 9: 4}.get(seed, 2)
    with on_hosts(door, count, bucket) as again:
        codes, _ = again.end()
        assert codes == [0] * count, again.outputs()
    ours = fetched(bucket, door.directory / RUN)
    if count == 2:
        assert_same_end(ours, of_two, 40)
    else:
        assert_same_losses(door.directory, trained.directory)


@pytest.mark.slow
def test_adapters_on_a_run_in_a_bucket(address, bucket, door):
    """Their frozen weights are in the bucket too, where a continued run and sampling find them."""
    settings = ("--init-from", address, "--lora.rank", "2", "--optimizer.schedule-steps", "30")
    for steps in ("20", "30"):
        door.run(*COMMAND, bucket, *settings, "--training.steps", steps)
    assert [report.state for report in check_steps(find_steps(bucket))] == ["ok"] * 3
    assert open_storage(bucket).exists("base/0/manifest.json")
    sampled = door.run(
        "sample.py", "--checkpoint", bucket, "--prompt", "the cat", "--max-new-tokens", "8", "--json"
    ).stdout
    assert json.loads(sampled.splitlines()[0])["prompt"] == "the cat"
    open_storage(bucket).delete("base/0/manifest.json")
    refused = door.run(*COMMAND, bucket, *settings, "--training.steps", "30", exit_code=2).stderr
    assert "the adapters' base weights are missing" in refused


@pytest.mark.slow
def test_a_bad_step_in_a_bucket_is_replayed(address, bucket, door):
    settings = (
        "--optimizer.learning-rate 1e6 --checkpoint.every-steps 1 --checkpoint.keep-last 1 --training.sample-tokens 0 "
        f"--data.path {DATA}"
    )
    door.run(*COMMAND, bucket, *settings.split(), "--training.max-skipped-steps", "4", exit_code=1)
    found = json.loads(door.run("nextllm_jax.cli", "replay", f"{bucket}/flight/step-2", "--json").stdout)
    assert (found["reproduced"], found["bit_for_bit"]) == (True, True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_at_random(trained, bucket, door, tmp_path, seed):
    killed_at_random(door, bucket, seed)
    door.run(*COMMAND, bucket)
    assert_same_end(fetched(bucket, tmp_path / "fetched"), trained.directory / "runs" / "config", 40)


@pytest.mark.slow
def test_overwriting_is_finished_after_a_kill(trained, bucket, door, bucket_service):
    """The copy of the old run is complete in the end, wherever the first attempt was killed."""
    assert "profile: `xprof --logdir gs://" in door.run(*COMMAND, bucket, "--profile", "2").stderr
    files = (name for name in open_storage(bucket).files() if not name.startswith("compiled/"))
    before = {name: open_storage(bucket).read(name) for name in files}
    assert any(name.startswith("profile/") and name.endswith("perfetto_trace.json.gz") for name in before)
    for copies in (1, 20, 60):
        with bucket_service.failing(Fault("POST .*rewriteTo", "wait", skip=copies, count=1000, seconds=60)):
            process = door.start(*COMMAND, bucket, "--overwrite")
            while bucket_service.faults[0].struck <= copies and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            process.communicate()
        if copies < 60:
            refused = door.run(*COMMAND, bucket, exit_code=2).stderr
            assert "was interrupted, so part of the run is in" in refused
    door.run(*COMMAND, bucket, "--overwrite")
    after = open_storage(f"{bucket}/overwritten/1")
    assert {name: after.read(name) for name in after.files()} == before
    assert steps(bucket) == [30, 40]


@pytest.mark.slow
def test_a_lease_that_is_lost_while_training(bucket, door):
    """The process stops at its next save, and leaves everything to the one that took over."""
    with Processes(door, 1, "--workdir", bucket, held={0: (TRAINED_A_STEP, 18)}) as one:
        one.wait_for("held")
        one.wait_until(lambda: steps(bucket) == [15], "the checkpoint of step 15")
        taker = json.dumps({"pid": 7, "host": "far", "since": "now", "machine": "far", "start": "1"}).encode()
        open_storage(bucket).write(".lock", taker)
        before = {name: open_storage(bucket).read(name) for name in open_storage(bucket).files()}
        one.release()
        codes, _ = one.end()
        assert codes == [1], one.outputs()
        says = f"^error: .*lost its lease on {bucket}, which process 7 on far since now took over"
        assert re.search(says, one.output(), re.MULTILINE), one.output()
        assert "Traceback" not in one.output()
    after = {name: open_storage(bucket).read(name) for name in open_storage(bucket).files()}
    assert {name: content for name, content in after.items() if "/attempt-" not in name or name in before} == before
