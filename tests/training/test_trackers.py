"""Trackers: the real packages without a network, and trackers that fail or hang."""

import contextlib
import dataclasses
import io
import os
import struct
import sys
import threading
import time
import types
from unittest import mock

import pytest

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config, LoggingConfig, ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.training import trackers
from nextllm_jax.training.pictures import Pictures
from nextllm_jax.training.trackers import Tracker, open_trackers, require_usable
from nextllm_jax.training.writers import MetricsWriter
from tests.training.test_writers import train_record, validation_record

MODEL = ModelConfig(num_layers=1)


def config_of(tracker, **logging):
    return Config(logging=LoggingConfig(trackers=(tracker,), **logging))


def write_run(run, config, steps, initial_step=None):
    """What a training of these steps writes; the config differs, as when a setting is changed."""
    run.path.mkdir(exist_ok=True)
    with open_trackers(run, config, enabled=True) as opened:
        writer = MetricsWriter(run, MODEL, initial_step=initial_step, trackers=opened)
        drawn = Pictures(run, MODEL, trackers=opened)
        for step in steps:
            writer.train(train_record(step, loss=10 / step))
            drawn.after_step(step, mock.Mock())
        writer.validation(validation_record(step) | {"bits_per_byte/web": 1.25})
        for tracker in opened:
            tracker.samples(step, [("def ", "f()")])
        drawn.close()


def records(path):
    """The records in a file that wandb writes offline: a log in LevelDB's format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    content, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(b"".join(parts))
            parts = []


@pytest.mark.filterwarnings("default")
def test_wandb_offline_gets_config_metrics_samples_and_pictures_and_continues(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run, config = RunDir(tmp_path / "small"), config_of("wandb", project="mine")
    require_usable(["wandb"])
    try:
        write_run(run, config, [10, 20])
        write_run(run, dataclasses.replace(config, seed=1), [30], initial_step=20)
    finally:
        wandb.teardown()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime)
    assert len(files) == 2
    found = []
    for file in files:
        rows, run_record = {}, None
        for record in records(file):
            if record.HasField("run"):
                run_record = record.run
            if record.HasField("history"):
                values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows[int(values["_step"])] = values
        found.append((run_record, rows))
    (first, rows), (second, others) = found
    assert (first.project, first.display_name) == ("mine", "small")
    assert first.run_id == second.run_id
    assert {item.key for item in first.config.update} >= {"model", "optimizer", "seed"}
    assert sorted(rows) == [10, 20]
    assert sorted(others) == [30]
    assert rows[20]["train/loss"] == "0.5"
    assert rows[20]["train/gradient_norms/layer 0 mlp"] == "0.3"
    assert rows[20]["validation/bits_per_byte/web"] == "1.25"
    for name in ("samples", "loss.png", "layers.png"):
        assert (files[0].parent / "files" / rows[20][f"{name}/path"].strip('"')).exists()


@pytest.mark.filterwarnings("default")
def test_trackio_gets_config_metrics_samples_and_pictures_and_continues(tmp_path, monkeypatch, capsys):
    assert "trackio" not in sys.modules, "it reads TRACKIO_DIR once"
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="pip install '.[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    run, config = RunDir(tmp_path / "small"), config_of("trackio", project="mine")
    write_run(run, config, [10, 20])
    write_run(run, config, [30], initial_step=20)
    assert capsys.readouterr().out == "", "a training writes nothing to standard output"
    (name,) = SQLiteStorage.get_runs("mine")
    assert name.startswith("small-")
    logged = SQLiteStorage.get_logs("mine", name)
    assert [line["step"] for line in logged if "train/loss" in line] == [10, 20, 30]
    together = {key: value for line in logged if line["step"] == 20 for key, value in line.items()}
    assert together["train/loss"] == 0.5
    assert together["validation/bits_per_byte/web"] == 1.25
    (row,) = together["samples"]["_value"]
    assert row == {"step": 20, "prompt": "def ", "continuation": "f()"}
    for name in ("loss.png", "layers.png"):
        assert (tmp_path / "trackio" / "media" / together[name]["file_path"]).exists()


def test_a_run_in_a_bucket_keeps_its_id(bucket, monkeypatch):
    ids = []
    monkeypatch.setitem(trackers._OPEN, "trackio", lambda config, name, run_id: ids.append((name, run_id)))
    for enabled in (True, True, False):
        with open_trackers(RunDir(f"{bucket}/small"), config_of("trackio"), enabled=enabled) as opened:
            assert len(opened) == enabled
    assert ids[0] == ids[1]
    assert (len(ids), ids[0][0]) == (2, "small")


def test_a_moved_run_keeps_its_name_and_a_damaged_file_is_named(tmp_path, monkeypatch):
    found, run = [], RunDir(tmp_path / "small")
    monkeypatch.setitem(trackers._OPEN, "trackio", lambda config, *identity: found.append(identity))

    def begin(run):
        with open_trackers(run, config_of("trackio"), enabled=True):
            pass

    run.path.mkdir()
    begin(run)
    moved = RunDir(run.path.rename(tmp_path / "moved"))
    begin(moved)
    moved.write("trackers.json", b'{"id": "0123abcd"}')  # of an earlier version
    begin(moved)
    assert found == [("small", found[0][1]), ("small", found[0][1]), ("moved", "0123abcd")]
    for content in (b"{", b"[]", b"{}"):
        moved.write("trackers.json", content)
        with pytest.raises(InputError, match=r"moved/trackers.json is damaged; delete it to begin a new run"):
            begin(moved)


def test_a_tracker_that_hangs_delays_no_step_and_only_shortly_the_end(tmp_path, monkeypatch, messages):
    released = threading.Event()
    monkeypatch.setattr(trackers, "_FINISH_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "_QUEUE_ITEMS", 10)
    monkeypatch.setitem(trackers._OPEN, "trackio", lambda *_: released.wait())
    started = time.monotonic()
    with open_trackers(RunDir(tmp_path), config_of("trackio"), enabled=True) as (tracker,):
        for step in range(100):
            tracker.scalars(step, {"loss": 1.0})
    assert time.monotonic() - started < 1
    released.set()
    tracker.wait(time.monotonic() + 10)
    assert messages.messages == [
        "trackio is 10 lines behind, so it will lack some",
        "trackio did not finish within 0 s, so it may lack the last lines",
    ]


@pytest.mark.parametrize("step", ["open", "log", "finish"])
def test_a_tracker_that_fails_is_reported_once(step, messages):
    package, run = mock.Mock(), mock.Mock()
    open_run = mock.Mock(return_value=(package, run))
    calls = {"open": open_run, "log": run.log, "finish": run.finish}
    calls[step].side_effect = OSError(28, "No space left on device")
    tracker = Tracker("wandb", open_run)
    for number in range(3):
        tracker.scalars(number, {"loss": 1.0})
        tracker.picture(number, "loss.png", _png())
    tracker.finish(time.monotonic() + 10)
    tracker.wait(time.monotonic() + 10)
    tracker.scalars(4, {"loss": 1.0})
    assert messages.messages == ["wandb is disabled for this training (No space left on device)"]


@pytest.mark.parametrize(("tracker", "arguments"), [("wandb", {"exit_code": 1}), ("trackio", {})])
def test_wandb_shows_that_a_training_failed(tracker, arguments, tmp_path, monkeypatch):
    run = mock.Mock()
    monkeypatch.setitem(trackers._OPEN, tracker, lambda *_: (mock.Mock(), run))
    for error in (None, RuntimeError("diverged")):
        with contextlib.suppress(RuntimeError), open_trackers(RunDir(tmp_path), config_of(tracker), enabled=True):
            if error:
                raise error
    assert run.finish.call_args_list == [mock.call(), mock.call(**arguments)]


def test_a_tracker_that_exits_is_reported(messages):
    tracker = Tracker("wandb", mock.Mock(side_effect=SystemExit(1)))
    tracker.wait(time.monotonic() + 10)
    assert messages.messages == ["wandb is disabled for this training (RuntimeError: it calls sys.exit)"]


def _png():
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "PNG")
    return content.getvalue()


def test_standard_output_is_restored_after_a_tracker_that_does_not_finish(tmp_path, monkeypatch):
    released, stdout = threading.Event(), sys.stdout
    run = mock.Mock(finish=lambda: released.wait())
    monkeypatch.setattr(trackers, "_FINISH_SECONDS", 0.2)
    monkeypatch.setitem(trackers._OPEN, "trackio", lambda *_: (mock.Mock(), run))
    with open_trackers(RunDir(tmp_path), config_of("trackio"), enabled=True):
        pass
    assert sys.stdout is stdout
    released.set()


def test_a_package_that_fails_is_an_error_of_one_line(monkeypatch):
    package = types.ModuleType("wandb")  # as that of a directory, such as wandb's own output
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(InputError, match=r"trackers wandb needs the package wandb; "):
        require_usable(["wandb"])
    package.__file__ = "wandb.py"
    package.setup = mock.Mock(side_effect=ValueError("mode:\n  should be online"))
    with pytest.raises(InputError, match=r"wandb cannot be used \(ValueError: mode: should be online\); correct its"):
        require_usable(["wandb"])


def test_a_package_or_a_login_that_is_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"trackers trackio needs the package trackio; .* 'nextllm_jax\[trackio\]'"):
        require_usable(["trackio"])
    wandb = pytest.importorskip("wandb", reason="pip install '.[wandb]'")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    wandb.teardown()  # else it has read the environment already
    with pytest.raises(InputError, match="wandb, which is not logged in; run wandb login, or set WANDB_MODE=offline"):
        require_usable(["wandb"])
    wandb.teardown()
