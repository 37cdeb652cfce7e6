"""Trains small runs in processes of `nextllm train`, on whatever devices are there, and follows their progress.

The calling process may have settings for planning, under which jax sees no devices; the runs get an environment of
their own.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from nextllm_jax.checkpoint.run_dir import METRICS
from nextllm_jax.config import Config
from nextllm_jax.config.fields import command_line_options
from nextllm_jax.config.files import workdir_of
from nextllm_jax.errors import EXIT_BAD_INPUT, InputError, RunFailed

_POLL_SECONDS = 0.5
_EXEC_UNTIL_PARENT_DIES = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A program that becomes another one, to which the kernel sends SIGTERM when its parent dies. So no run trains on after
its ladder was killed."""
_MEASURED_SECONDS, _MEASURED_STEPS = 8.0, 30


class Interrupted(Exception):
    """A signal arrived, and a run that was being trained has saved what it needs to continue."""


class Trainer(NamedTuple):
    """How runs of one config file are trained."""

    file_name: str
    """The config file."""
    file: Config
    """Its content."""
    environment: Mapping[str, str]
    """Environment variables of the training processes."""

    def num_devices(self) -> int:
        """The number of devices on which runs are trained. Raises RunFailed if jax does not start."""
        program = [sys.executable, "-c", "import jax; print(jax.device_count())"]
        done = subprocess.run(program, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunFailed(f"jax finds no devices: {(done.stderr.splitlines() or ['no message'])[-1]}")
        return int(done.stdout)

    def train(self, config: Config, show: Callable[[int], None]) -> None:
        """Train a run to its end, or continue it. `show` gets the last step whenever metrics.jsonl grows.

        Raises Interrupted if a signal stopped it, and InputError or RunFailed if it fails.
        """
        run = Path(workdir_of(config))
        with self._process(config) as process:
            while not _has_ended(process):
                show(max((record["step"] for record in read_metrics(run)), default=0))

    def measure(self, config: Config) -> float:
        """The tokens per second of a config's training, from a few steps of a run that is deleted afterwards."""
        run, rates = Path(workdir_of(config)), []
        shutil.rmtree(run, ignore_errors=True)
        with self._process(config, may_be_killed=True) as process:
            while not _has_ended(process):
                records = [each for each in read_metrics(run) if each.get("processed_tokens_per_second")]
                rates = [each["processed_tokens_per_second"] for each in records]
                seconds = records[-1]["elapsed_seconds"] - records[0]["elapsed_seconds"] if records else 0
                if len(rates) > 2 and (seconds > _MEASURED_SECONDS or len(rates) > _MEASURED_STEPS):
                    process.kill()
                    break
        shutil.rmtree(run, ignore_errors=True)
        _log_of(run).unlink()
        if not rates:
            raise RunFailed("the speed of training could not be measured, since no step was timed; run it again")
        return median(rates)

    @contextlib.contextmanager
    def _process(self, config: Config, *, may_be_killed: bool = False) -> Iterator[subprocess.Popen]:
        """A process that trains. On leaving, it has ended; if it failed, an exception with its last line is raised."""
        run = Path(workdir_of(config))
        run.parent.mkdir(parents=True, exist_ok=True)
        options = command_line_options(config, self.file)
        program = [sys.executable, "-m", "nextllm_jax.cli", "train", "--config", self.file_name, *options]
        if sys.platform == "linux":
            program = [sys.executable, "-c", _EXEC_UNTIL_PARENT_DIES, *program]
        with open(_log_of(run), "a") as log, contextlib.ExitStack() as stack:
            process = subprocess.Popen(
                program, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            stopped: list[int] = []

            def forward(number: int, _: Any) -> None:
                stopped.append(number)
                process.send_signal(number)

            stack.enter_context(_handled_signals(forward))
            try:
                yield process
            except BaseException:
                process.kill()
                raise
            finally:
                process.wait()
        if stopped:
            raise Interrupted
        if process.returncode not in (0, -signal.SIGKILL if may_be_killed else 0):
            lines = _log_of(run).read_text(errors="replace").splitlines()
            reason = (lines or ["no message"])[-1].removeprefix("error: ")
            message = f"the training in {run} failed with exit code {process.returncode}: {reason}"
            raise (InputError if process.returncode == EXIT_BAD_INPUT else RunFailed)(message)


def _log_of(run: Path) -> Path:
    """The file with the messages of a run."""
    return run.with_name(f"{run.name}.log")


def _has_ended(process: subprocess.Popen) -> bool:
    """Whether the process has ended, after waiting for a moment."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_POLL_SECONDS)
        return True
    return False


@contextlib.contextmanager
def _handled_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """A context with a handler of the signals that ask to stop. SIGHUP stays ignored if it is, as under nohup."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """A context in which signals that ask to stop raise Interrupted, except while a run is trained."""

    def interrupt(*_: Any) -> None:
        raise Interrupted

    return _handled_signals(interrupt)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; none if the run has not started. Raises InputError for a damaged
    file."""
    file = run / METRICS
    try:
        text = file.read_text()
        records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        damage = next((str(record) for record in records if not {"split", "step"} <= set(record)), None)
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        records, damage = [], str(error)
    if damage is not None:
        raise InputError(f"{file} is damaged ({damage}); delete {run} to train this run again")
    return records


def finished_loss(config: Config) -> float | None:
    """The bits per byte of a run at its last step; None if it has not finished.

    Raises InputError if it is not a number, or if the validation set has none, as one without text.
    """
    run = Path(workdir_of(config))
    for record in reversed(read_metrics(run)):
        if record["split"] == "validation" and record["step"] == config.training.steps:
            loss = record.get("bits_per_byte")
            if loss is None and record.get("loss") is None:
                raise InputError(
                    f"the validation loss of the run in {run} is not finite; give a lower --optimizer.learning-rate, "
                    "and another --workdir"
                )
            if loss is None:
                raise InputError(f"the validation set of {config.data.path} has no bits per byte; give text as data")
            return loss
    return None
