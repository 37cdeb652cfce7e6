"""Standard streams that are closed, that lose their reader, or that lead to a full disk."""

import io
import os
import subprocess
import sys
from unittest import mock

import pytest

from nextllm_jax.standard_streams import unfailing_output, write_at_once
from tests.conftest import ROOT
from tests.processes import saved_steps

TALKS = """
import os, subprocess, sys
from nextllm_jax.cli.main import run_main

def command(argv):
    with open("file", "w") as file:
        assert file.fileno() > 2
        print("to standard output")
        print("to standard error", file=sys.stderr)
        os.write(1, b"past Python's buffers")
        os.write(2, b"past Python's buffers")
        assert sys.stdin.read() == ""
    assert open("file").read() == ""
    child = "import sys; assert None not in (sys.stdin, sys.stdout, sys.stderr)"
    return subprocess.run([sys.executable, "-c", child]).returncode

run_main(command)
"""


def run(redirections, *command, directory=ROOT, **environment):
    """A finished process, started by a shell with some streams redirected."""
    shell = ["bash", "-c", f'exec "$@" {redirections}', "bash", sys.executable]
    return subprocess.run(
        [*shell, *map(str, command)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_at_the_start_is_ignored(tmp_path, closed):
    done = run(closed, "-c", TALKS, directory=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.slow
def test_training_without_any_stream_ends_well(door):
    (door.directory / "data").unlink()  # that of the other tests: these are prepared, by two workers
    arguments = ("--config", "config.py", "--training.steps", "6", "--data.num-processes", "2")
    done = run("<&- >&- 2>&-", ROOT / "train.py", *arguments, directory=door.directory, **door.environment)
    assert done.returncode == 0, done
    assert saved_steps(door.directory / "runs" / "config") == [6]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="stands in for a full disk")
def test_a_full_disk_under_the_output_is_one_sentence():
    done = run(">/dev/full", "-m", "nextllm_jax.cli", "--help")
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["nothing"]])
def test_a_reader_that_has_left_is_not_told(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nextllm_jax.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    both = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert (done.returncode, both.returncode) == ((2, 2) if arguments == ["nothing"] else (1, 1))
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def stream_to(monkeypatch, name, number):
    stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), line_buffering=True)
    for attribute in (name, f"__{name}__"):
        monkeypatch.setattr(sys, attribute, stream)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_leaves_is_told_once_and_the_rest_dropped(monkeypatch, name):
    reader, writer = os.pipe()
    stream_to(monkeypatch, name, writer)
    calls = []
    with unfailing_output(lambda: calls.append("left")):
        print("read", file=getattr(sys, name))
        assert os.read(reader, 100) == b"read\n"
        assert calls == []
        os.close(reader)
        for _ in range(3):
            print("not read", file=getattr(sys, name))
        assert calls == ["left"]
    os.close(writer)


def test_what_a_full_disk_does_not_take_is_dropped(monkeypatch, tmp_path):
    log = tmp_path / "log"
    number = os.open(log, os.O_RDWR | os.O_CREAT)
    stream_to(monkeypatch, "stdout", number)
    with unfailing_output(lambda: pytest.fail("nobody has left")):
        print("before")
        full = os.open("/dev/full", os.O_WRONLY)
        kept = os.dup(number)
        os.dup2(full, number)
        print("x" * 100_000)
        os.dup2(kept, number)
        print("after")
    assert log.read_text() == "before\nafter\n"
    for opened in (number, full, kept):
        os.close(opened)


def test_other_streams_stay_as_they_are(capsys):
    before = sys.stdout
    with unfailing_output(lambda: None):
        assert sys.stdout is before
        print("kept")
    assert capsys.readouterr().out == "kept\n"


def test_a_line_for_nobody_is_no_error(monkeypatch):
    write = mock.Mock(side_effect=BrokenPipeError)
    monkeypatch.setattr("os.write", write)
    write_at_once("text")
    write.assert_called_once_with(2, b"text\n")


def test_training_whose_reader_leaves_is_saved(door):
    process = door.start("train.py", "--config", "config.py", "--training.steps", "100000")
    for line in process.stderr:
        if "step 3/" in line:
            break
    process.stderr.close()
    with process.stdout:
        assert process.stdout.read() == "", "messages and progress go to standard error"
    assert process.wait() == 75
    assert saved_steps(door.directory / "runs" / "config")
