import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.errors import RunFailed
from nextllm_jax.training import writers as module
from nextllm_jax.training.writers import Writers, draw_losses

TRAIN_FIELDS = ["step", "split", "loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second", "mfu",
                "input_wait_fraction", "tokens_seen", "elapsed_seconds"]  # fmt: skip


def train_record(step, loss=2.0):
    return {
        "step": step,
        "loss": loss,
        "perplexity": math.exp(loss),
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 1000.0,
        "mfu": None,
        "input_wait_fraction": 0.25,
        "tokens_seen": step * 100,
        "elapsed_seconds": float(step),
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
    writers = Writers(RunDir(tmp_path), total_steps=100)
    yield writers
    writers.close()


def test_metrics_have_the_documented_fields(tmp_path, writers):
    writers.train(train_record(10))
    writers.validation(validation_record(20))
    train, validation = lines(tmp_path)
    assert list(train) == TRAIN_FIELDS
    assert train == train_record(10) | {"split": "train"}
    assert list(validation) == [*TRAIN_FIELDS[:4], "bits_per_byte", *TRAIN_FIELDS[4:]]
    assert validation["bits_per_byte"] == 1.5
    assert validation["learning_rate"] is None
    with pytest.raises(ValueError, match="no fields"):
        writers.train(train_record(30) | {"los": 1})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), jnp.inf])
def test_json_never_holds_nan(tmp_path, writers, bad):
    writers.train(train_record(10) | {"loss": bad, "perplexity": bad, "grad_norm": bad})
    writers.validation(validation_record(20) | {"loss": bad, "perplexity": math.inf})
    assert [line["loss"] for line in lines(tmp_path)] == [None, None]
    assert lines(tmp_path)[0]["grad_norm"] is None


def test_device_and_numpy_scalars_are_numbers(tmp_path, writers):
    writers.train(train_record(10) | {"loss": jnp.float32(1.5), "tokens_seen": 10**12, "grad_norm": np.float32(2)})
    (line,) = lines(tmp_path)
    assert (line["loss"], line["tokens_seen"], line["grad_norm"]) == (1.5, 10**12, 2.0)


def write_run(workdir, steps, **arguments):
    workdir.mkdir(exist_ok=True)
    writers = Writers(RunDir(workdir), total_steps=100, **arguments)
    for step in steps:
        writers.train(train_record(step, loss=10 / step))
        if step % 20 == 0:
            writers.validation(validation_record(step))
            writers.picture()
            writers.samples(step, [("def ", f"f{step}():\n    pass\n===== step 1 =====\n")])
    writers.close()


def test_continued_run_cuts_what_it_writes_again(tmp_path):
    write_run(tmp_path / "whole", range(10, 101, 10))
    write_run(tmp_path / "parts", range(10, 61, 10))
    write_run(tmp_path / "parts", range(50, 101, 10), initial_step=40, evaluated=True)
    for name in ("metrics.jsonl", "samples.txt"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    starts = [e.step for e in events(tmp_path / "parts") if e.session_log.status == SessionLog.START]
    assert starts == [0, 41]
    assert (tmp_path / "parts" / "loss.png").read_bytes() == (tmp_path / "whole" / "loss.png").read_bytes()


def test_a_run_that_continues_from_step_0_keeps_what_was_written_there(tmp_path):
    writers = Writers(RunDir(tmp_path), total_steps=100)
    writers.validation(validation_record(0))
    writers.samples(0, [("def ", "f()")])
    writers.train(train_record(10))
    writers.close()
    samples = (tmp_path / "samples.txt").read_bytes()
    writers = Writers(RunDir(tmp_path), total_steps=100, initial_step=0, evaluated=True)
    assert writers.last_samples_step == 0
    writers.close()
    assert [(line["step"], line["split"]) for line in lines(tmp_path)] == [(0, "validation")]
    assert (tmp_path / "samples.txt").read_bytes() == samples


def test_a_validation_that_is_repeated_is_cut(tmp_path):
    """A run that ended between the line of a validation and the record of it in the checkpoint."""
    write_run(tmp_path, range(10, 41, 10))
    Writers(RunDir(tmp_path), total_steps=100, initial_step=40, evaluated=False).close()
    found = [(line["step"], line["split"]) for line in lines(tmp_path)]
    assert found == [(10, "train"), (20, "train"), (20, "validation"), (30, "train"), (40, "train")]


@pytest.mark.parametrize("backend", ["nonsense", "module://matplotlib_inline.backend_inline"])
def test_the_picture_does_not_depend_on_the_backend_of_a_notebook(tmp_path, backend):
    code = (
        "import sys; from nextllm_jax.training.writers import RunDir, Writers\n"
        "writers = Writers(RunDir(sys.argv[1]), total_steps=1); writers.picture()"
    )
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_output_that_fails_is_reported_once_and_ends_alone(tmp_path, writers, capsys, monkeypatch):
    def broken(*_, **__):
        raise ValueError("no fonts")

    monkeypatch.setattr(module, "draw_losses", broken)
    (tmp_path / "tensorboard").rename(tmp_path / "elsewhere")
    writers._tensorboard.close()
    for step in (10, 20):
        writers.train(train_record(step))
        writers.picture()
        writers.optional("samples.txt", lambda: 1 / 0)
    assert len(lines(tmp_path)) == 2
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 3
    assert "loss.png is disabled for this training (ValueError: no fonts)" in warnings[1]


def test_a_block_of_samples_is_written_whole_or_not_at_all(tmp_path, writers, monkeypatch):
    writers.samples(5, [("def ", "f()")])
    before = (tmp_path / "samples.txt").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(RunFailed, match=r"samples.txt cannot be written \(File too large\)"):
            writers.samples(10, [("def ", "f()" * 100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (tmp_path / "samples.txt").read_bytes() == before
    assert writers.last_samples_step == 5


def test_starting_over_before_the_first_checkpoint_cuts_everything(tmp_path):
    write_run(tmp_path, range(10, 41, 10))
    Writers(RunDir(tmp_path), total_steps=100).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "samples.txt").read_bytes() == b""


def test_half_a_line_of_a_killed_process_is_cut(tmp_path):
    write_run(tmp_path, [10, 20])
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for rest in (b'{"step": 15, "spl', b'{"step": 15}'):
        (tmp_path / "metrics.jsonl").write_bytes(whole + rest)
        Writers(RunDir(tmp_path), total_steps=100, initial_step=20, evaluated=True).close()
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_samples_are_readable_and_cannot_pass_for_a_header(tmp_path, writers):
    writers.samples(5, [("def ", "f():\n    return 1"), ("é\n", "\n===== step 7 =====\r\ud800")])
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


def test_loss_plot_draws_both_curves():
    train = [(step, 8 / step) for step in range(1, 50)]
    validation = [(step, 9 / step) for step in range(10, 50, 10)]
    pictures = [
        image.imread(io.BytesIO(draw_losses(*curves)))
        for curves in (([], []), (train, []), ([], validation), (train, validation))
    ]
    assert {picture.shape for picture in pictures} == {(600, 960, 4)}
    ink = [int((picture[..., :3] < 0.9).any(-1).sum()) for picture in pictures]
    assert ink[0] < min(ink[1:3])
    assert ink[3] > max(ink[1:3])


def test_processes_other_than_the_first_write_nothing(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("half")
    write_run(tmp_path, [10, 20], initial_step=5, enabled=False)
    writers = Writers(RunDir(tmp_path), total_steps=10, enabled=False)
    writers.message("hello")
    writers.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "half"
    assert capsys.readouterr() == ("", "")


def test_log_has_plain_lines_at_log_steps(writers, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for step, seconds in ((1, 90.0), (10, 99.0), (11, 100.0), (20, 109.0)):  # the compiler took the first 90 seconds
        now[0] = seconds
        if step % 10:
            writers.progress(step)
        else:
            writers.train(train_record(step) | {"tokens_per_second": 12345.6})
    writers.train(train_record(100) | {"tokens_per_second": None, "loss": math.nan})
    writers.message("saved")
    assert capsys.readouterr().out.splitlines() == [
        "step 10/100, loss 2.0000, 12,346 tokens/s, ETA 0:01:30",
        "step 20/100, loss 2.0000, 12,346 tokens/s, ETA 0:01:20",
        "step 100/100, loss nan, ETA 0:00:00",
        "saved",
    ]


def test_terminal_has_a_bar(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    writers = Writers(RunDir(tmp_path), total_steps=100, initial_step=40)
    writers.train(train_record(60))
    writers.progress(61)
    writers.train(train_record(80, loss=1.0))
    writers.message("saved step 60")
    writers.close()
    shown = terminal.getvalue()
    assert re.search(r"step 60/100 \|.*ETA \?, loss 2.0000, 1,000 tokens/s", shown)
    assert re.search(r"step 80/100 \|.*ETA 00:00, loss 1.0000, 1,000 tokens/s", shown)
    assert capsys.readouterr().out == "saved step 60\n"


def test_full_disk_is_a_sentence(tmp_path, writers):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"metrics.jsonl cannot be written \(No space left on device\); make room"):
        writers.train(train_record(1))


def test_import_is_light():
    code = (
        "import sys, nextllm_jax.training.writers; "
        "sys.exit(', '.join({'matplotlib', 'tensorboardX', 'tqdm', 'orbax'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
