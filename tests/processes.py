"""Several processes of train.py that train together on this machine, as a test starts, signals and watches them."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.conftest import ROOT, Door
from tests.runs import INJECT

PATIENCE_SECONDS = 240
RUN = "runs/config"


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


class Processes:
    """A context: `count` processes of train.py that meet at a free port, killed at its end if they are left.

    `arguments` go to all, `own` to one process by its number; the numbers in `absent` are not started. With `slices`
    the first of them are in slice 0, as if their machines were joined by a faster network, the next in slice 1. In
    `held` a process's number has a function and a count: it prints "held" at that call and waits for `release`.
    `directories` are the working directories of the processes; without them all use that of the door.
    """

    def __init__(
        self,
        door: Door,
        count: int,
        *arguments,
        own=None,
        absent=(),
        slices=1,
        held=None,
        directories=None,
        **environment,
    ):
        self._directory = door.directory
        self.address = f"localhost:{free_port()}"
        self._started = {}
        self._outputs = {}
        for number in range(count):
            if number in absent:
                continue
            place, calls = (held or {}).get(number, (None, 0))
            command = [
                sys.executable,
                *([INJECT, "hold", place, calls] if place else []),
                ROOT / "train.py",
                "--config",
                "config.py",
                *arguments,
                *(own or {}).get(number, ()),
            ]
            if count > 1:
                place = {"coordinator-address": self.address, "num-processes": count, "process-id": number}
                command += [word for name, value in place.items() for word in (f"--distributed.{name}", value)]
            if slices > 1:
                environment = {**environment, "JAX_PARTITION_INDEX": str(number * slices // count)}
            self._outputs[number] = door.directory / f"output-{number}-{self.address[10:]}"
            with self._outputs[number].open("w") as output:
                self._started[number] = subprocess.Popen(
                    [str(word) for word in command],
                    cwd=directories[number] if directories else door.directory,
                    env={**door.environment, **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        for process in self._started.values():
            process.kill()
            process.wait()

    def output(self, number: int = 0) -> str:
        return self._outputs[number].read_text(errors="replace")

    def outputs(self) -> str:
        return "\n".join(f"--- process {number}\n{self.output(number)}" for number in self._started)

    def wait_for(self, pattern: str, number: int = 0) -> None:
        """Return once the process has printed what the pattern matches."""
        self.wait_until(lambda: re.search(pattern, self.output(number)), pattern)

    def wait_until(self, condition, what: str = "") -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}\n{self.outputs()}"
            assert any(process.poll() is None for process in self._started.values()), f"{what}\n{self.outputs()}"
            time.sleep(0.01)

    def signal(self, signal_number: int, *numbers: int) -> None:
        """Send a signal to some processes, or to all."""
        for number in numbers or self._started:
            self._started[number].send_signal(signal_number)

    def release(self) -> None:
        """Let processes that are held go on."""
        (self._directory / "released").touch()

    def end(self) -> tuple[list[int], float]:
        """The exit codes of all, and the seconds until the last had ended."""
        started = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in self._started.values():
                process.wait(timeout=max(0.1, started + PATIENCE_SECONDS - time.monotonic()))
        codes = [process.poll() for process in self._started.values()]
        assert None not in codes, f"still running: {codes}\n{self.outputs()}"
        return codes, time.monotonic() - started


def saved_steps(run: Path) -> list[int]:
    """The complete checkpoints in a run directory."""
    checkpoints = run / "checkpoints"
    return (
        sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()) if checkpoints.exists() else []
    )


def devices(count: int) -> str:
    """XLA_FLAGS for so many simulated devices."""
    return f"--xla_force_host_platform_device_count={count}"


def losses(directory, split):
    lines = [json.loads(line) for line in (directory / RUN / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == split}


def assert_same_metrics(directory, other):
    """Each line of metrics.jsonl with the numbers of the other run, but for times; sums in another order differ."""
    runs = [(run / RUN / "metrics.jsonl").read_text().splitlines() for run in (directory, other)]
    for ours, theirs in zip(*[map(json.loads, lines) for lines in runs], strict=True):
        exact = ["step", "split", "tokens_seen", "learning_rate"]
        assert [ours.get(name) for name in exact] == [theirs.get(name) for name in exact]
        for name in ("loss", "perplexity", "bits_per_byte", "grad_norm"):
            if ours.get(name) is not None:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4 if name == "grad_norm" else 5e-5)


def assert_same_losses(directory, other, *, rtol=2e-5, but_validation_of=()):
    """Each line of metrics.jsonl once, with the losses of the other run; some ends of parts were evaluated too."""
    for split in ("train", "validation"):
        ours, theirs = losses(directory, split), losses(other, split)
        ours = {step: loss for step, loss in ours.items() if split == "train" or step not in but_validation_of}
        assert list(ours) == list(theirs)
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=rtol)
