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
_MEASURED_SECONDS, _MEASURED_STEPS = 8.0, 30


class Interrupted(Exception):
    """A signal arrived, and the run has saved what it needs to continue."""


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
        with open(_log_of(run), "a") as log, contextlib.ExitStack() as stack:
            process = subprocess.Popen(
                program, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            stopped = stack.enter_context(_forwarded_signals(process))
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
def _forwarded_signals(process: subprocess.Popen) -> Iterator[list[int]]:
    """A context in which signals that ask to stop are sent on to a process; it yields the list of those that came."""
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in stops}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; none if the run has not started."""
    with contextlib.suppress(FileNotFoundError):
        text = (run / METRICS).read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return []


def finished_loss(config: Config) -> float | None:
    """The bits per byte of a run at its last step; None if it has not finished.

    Raises InputError if the validation set has none, as one without text.
    """
    for record in reversed(read_metrics(Path(workdir_of(config)))):
        if record["split"] == "validation" and record["step"] == config.training.steps:
            if record["bits_per_byte"] is None:
                raise InputError(f"the validation set of {config.data.path} has no bits per byte; give text as data")
            return record["bits_per_byte"]
    return None
