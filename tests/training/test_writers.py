import io
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config, ModelConfig, TrainingConfig
from nextllm_jax.errors import RunFailed
from nextllm_jax.training.metrics import TrainMeter
from nextllm_jax.training.pictures import Pictures
from nextllm_jax.training.samples import Samples
from nextllm_jax.training.start import Start
from nextllm_jax.training.train_log import TrainLog
from nextllm_jax.training.writers import MetricsWriter
from tests.runs import metrics

MODEL = ModelConfig(num_layers=1)
TRAIN_FIELDS = ["step", "split", "loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second",
                "processed_tokens_per_second", "mfu",
                "input_wait_fraction", "tokens_seen", "elapsed_seconds",
                "gradient_norms", "activation_rms"]  # fmt: skip


def train_record(step, loss=2.0):
    return {
        "step": step,
        "loss": loss,
        "perplexity": math.exp(loss),
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 1000.0,
        "processed_tokens_per_second": 1010.0,
        "mfu": None,
        "input_wait_fraction": 0.25,
        "tokens_seen": step * 100,
        "elapsed_seconds": float(step),
        "gradient_norms": [0.1, 0.2, 0.3, 0.4],
        "activation_rms": [1.0, 2.0, 3.0],
    }


def validation_record(step, loss=2.5):
    return {"step": step, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": 1.5}


def lines(workdir):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """Every event of the run's TensorBoard files; the framing is length, checksum, event, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


@pytest.fixture
def writers(tmp_path):
    writers = MetricsWriter(RunDir(tmp_path), MODEL)
    yield writers
    writers.close()


def samples_of(workdir, initial_step=None):
    config = Config(training=TrainingConfig(sample_prompts=("def ", "import ", "class ")))
    return Samples(RunDir(workdir), Start(config, mock.Mock(return_value=[mock.Mock()])), initial_step)


def test_metrics_have_the_documented_fields(tmp_path, writers):
    writers.train(train_record(10))
    writers.validation(validation_record(20))
    train, validation = lines(tmp_path)
    assert list(train) == TRAIN_FIELDS
    assert train == train_record(10) | {"split": "train"}
    assert list(validation) == [*TRAIN_FIELDS[:4], "bits_per_byte", *TRAIN_FIELDS[4:-2]]
    assert validation["bits_per_byte"] == 1.5
    assert validation["learning_rate"] is None
    with pytest.raises(ValueError, match="no fields"):
        writers.train(train_record(30) | {"los": 1})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), jnp.inf])
def test_json_never_holds_nan(tmp_path, writers, bad):
    writers.train(train_record(10) | {"loss": bad, "perplexity": bad, "grad_norm": bad, "gradient_norms": [bad, 1 / 3]})
    writers.validation(validation_record(20) | {"loss": bad, "perplexity": math.inf})
    assert [line["loss"] for line in lines(tmp_path)] == [None, None]
    assert (lines(tmp_path)[0]["grad_norm"], lines(tmp_path)[0]["gradient_norms"]) == (None, [None, 0.3333])


def test_device_and_numpy_scalars_are_numbers(tmp_path, writers):
    writers.train(train_record(10) | {"loss": jnp.float32(1.5), "tokens_seen": 10**12, "grad_norm": np.float32(2)})
    (line,) = lines(tmp_path)
    assert (line["loss"], line["tokens_seen"], line["grad_norm"]) == (1.5, 10**12, 2.0)


def test_norms_of_gradients_add_up_to_that_of_all(trained):
    for line in metrics(trained.directory / "runs" / "config", "train"):
        assert len(line["gradient_norms"]) == len(line["activation_rms"]) + 1 == 6
        assert math.hypot(*line["gradient_norms"]) == pytest.approx(line["grad_norm"], rel=1e-3)


def write_run(workdir, steps, initial_step=None, **arguments):
    workdir.mkdir(exist_ok=True)
    writers = MetricsWriter(RunDir(workdir), MODEL, initial_step=initial_step, **arguments)
    samples, pictures = samples_of(workdir, initial_step), Pictures(RunDir(workdir), MODEL)
    for step in steps:
        writers.train(train_record(step, loss=10 / step))
        if step % 20 == 0:
            writers.validation(validation_record(step))
            samples.write(step, [("def ", f"f{step}():\n    pass\n===== step 1 =====\n")])
            pictures.after_evaluation(step, mock.Mock())
    pictures.close()
    writers.close()


def test_continued_run_cuts_what_it_writes_again(tmp_path):
    write_run(tmp_path / "whole", range(10, 101, 10))
    write_run(tmp_path / "parts", range(10, 61, 10))
    write_run(tmp_path / "parts", range(50, 101, 10), initial_step=40, evaluated=True)
    for name in ("metrics.jsonl", "samples.txt", "loss.png", "layers.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    starts = [e.step for e in events(tmp_path / "parts") if e.session_log.status == SessionLog.START]
    assert starts == [0, 41]


def test_a_run_that_continues_from_step_0_keeps_what_was_written_there(tmp_path):
    writers = MetricsWriter(RunDir(tmp_path), MODEL)
    writers.validation(validation_record(0))
    samples_of(tmp_path).write(0, [("def ", "f()")])
    writers.train(train_record(10))
    writers.close()
    written = (tmp_path / "samples.txt").read_bytes()
    MetricsWriter(RunDir(tmp_path), MODEL, initial_step=0, evaluated=True).close()
    samples_of(tmp_path, 0).after_evaluation(0, mock.Mock())
    assert [(line["step"], line["split"]) for line in lines(tmp_path)] == [(0, "validation")]
    assert (tmp_path / "samples.txt").read_bytes() == written


def test_a_validation_that_is_repeated_is_cut(tmp_path):
    """A run that ended between the line of a validation and the record of it in the checkpoint."""
    write_run(tmp_path, range(10, 41, 10))
    MetricsWriter(RunDir(tmp_path), MODEL, initial_step=40, evaluated=False).close()
    found = [(line["step"], line["split"]) for line in lines(tmp_path)]
    assert found == [(10, "train"), (20, "train"), (20, "validation"), (30, "train"), (40, "train")]


def test_event_files_that_fail_are_reported_once_and_end_alone(tmp_path, writers, messages):
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    for step in (10, 20):
        writers.train(train_record(step))
    assert len(lines(tmp_path)) == 2
    (message,) = messages.messages
    assert message.startswith("TensorBoard is disabled for this training (")


def test_a_block_of_samples_is_written_whole_or_not_at_all(tmp_path):
    samples = samples_of(tmp_path)
    samples.write(5, [("def ", "f()")])
    before = (tmp_path / "samples.txt").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(RunFailed, match=r"samples.txt cannot be written \(File too large\)"):
            samples.write(10, [("def ", "f()" * 100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (tmp_path / "samples.txt").read_bytes() == before
    samples_of(tmp_path, 10).after_evaluation(5, mock.Mock())
    assert (tmp_path / "samples.txt").read_bytes() == before, "step 5 is there"


def test_starting_over_before_the_first_checkpoint_cuts_everything(tmp_path):
    write_run(tmp_path, range(10, 41, 10))
    MetricsWriter(RunDir(tmp_path), MODEL).close()
    samples_of(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "samples.txt").read_bytes() == b""


def test_half_a_line_of_a_killed_process_is_cut(tmp_path):
    write_run(tmp_path, [10, 20])
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for rest in (b'{"step": 15, "spl', b'{"step": 15}'):
        (tmp_path / "metrics.jsonl").write_bytes(whole + rest)
        MetricsWriter(RunDir(tmp_path), MODEL, initial_step=20, evaluated=True).close()
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_samples_are_readable_and_cannot_pass_for_a_header(tmp_path):
    samples_of(tmp_path).write(5, [("def ", "f():\n    return 1"), ("é\n", "\n===== step 7 =====\r\ud800")])
    assert (tmp_path / "samples.txt").read_bytes().decode() == (
        "===== step 5 =====\n\n"
        "prompt: 'def '\n    def f():\n        return 1\n\n"
        "prompt: 'é\\n'\n    é\n    \n    ===== step 7 =====\r?\n\n"
    )


def test_tensorboard_has_the_scalars(tmp_path, writers):
    writers.train(train_record(10) | {"grad_norm": math.nan})
    writers.validation(validation_record(20))
    scalars = {(e.step, v.tag): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert scalars[10, "train/loss"] == 2.0
    assert scalars[20, "validation/bits_per_byte"] == 1.5
    assert (10, "train/grad_norm") not in scalars
    assert (10, "train/step") not in scalars
    assert scalars[10, "train/gradient_norms/layer 0 mlp"] == pytest.approx(0.3)
    assert scalars[10, "train/activation_rms/embedding"] == 1.0


def test_processes_other_than_the_first_write_nothing(tmp_path, messages):
    (tmp_path / "metrics.jsonl").write_text("half")
    run = RunDir(tmp_path)
    writers = MetricsWriter(run, MODEL, initial_step=5, enabled=False)
    writers.train(train_record(10))
    writers.validation(validation_record(20))
    pictures = Pictures(run, MODEL, enabled=False)
    pictures.after_evaluation(20, mock.Mock())
    pictures.close()
    Samples(run, Start(Config(), mock.Mock()), 5, enabled=False)
    writers.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "half"
    assert messages.messages == []


class Reads(TrainMeter):
    """A meter that has measured given values."""

    def __init__(self, **values):
        super().__init__(flops_per_token=1.0, peak_flops=None, tokens_per_step=1)
        self.values = values

    def add(self, metrics):
        pass

    def read(self, step):
        return train_record(step) | self.values


def make_log(writers, **values):
    config = Config(training=TrainingConfig(steps=100, log_every_steps=10))
    return TrainLog(config, Reads(**values), writers)


def test_log_has_plain_lines_at_log_steps(writers, messages, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    log = make_log(writers, tokens_per_second=12345.6, processed_tokens_per_second=12400.0)
    for step, seconds in ((1, 90.0), (10, 99.0), (11, 100.0), (20, 109.0)):  # the compiler took the first 90 seconds
        now[0] = seconds
        log.after_step(step, mock.Mock())
    log.write_line(20)  # as a run that fails: the line is there already
    make_log(writers, tokens_per_second=None, loss=math.nan).after_step(100, mock.Mock())
    make_log(writers, tokens_per_second=300, processed_tokens_per_second=2000).after_step(100, mock.Mock())
    assert messages.messages == [
        "step 10/100, loss 2.0000, 12,346 tokens/s, ETA 0:01:30",
        "step 20/100, loss 2.0000, 12,346 tokens/s, ETA 0:01:20",
        "step 100/100, loss nan, ETA ?",
        "step 100/100, loss 2.0000, 300 tokens/s in the loss mask (2,000 processed), ETA ?",
    ]


def test_terminal_has_a_bar(writers, monkeypatch, messages):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, now = Terminal(), [0.0]
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("nextllm_jax.training.train_log.time.monotonic", lambda: now[0])
    log = make_log(writers)
    for step, seconds in ((59, 0), (60, 1), (61, 2), (70, 20), (80, 31)):
        now[0] = seconds
        log.after_step(step, mock.Mock())
    log.close()
    shown = terminal.getvalue()
    assert re.search(r"step: *60%.* 60/100 .*ETA .*loss 2.0000, 1,000 tokens/s", shown)
    assert re.search(r"step: *80%.* 80/100 .*ETA .*loss 2.0000, 1,000 tokens/s", shown)
    lines = [message.partition(",")[0] for message in messages.messages]
    assert lines == ["step 60/100", "step 80/100"], "every 30 seconds, a line that stays"


def test_full_disk_is_a_sentence(tmp_path, writers):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"metrics.jsonl cannot be written \(No space left on device\); make room"):
        writers.train(train_record(1))


def test_import_is_light():
    code = (
        "import sys, nextllm_jax.training.writers; "
        "sys.exit(', '.join({'matplotlib', 'tensorboard', 'tqdm', 'orbax'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
