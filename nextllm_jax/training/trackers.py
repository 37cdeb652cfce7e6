"""Trackers: Weights & Biases and trackio, which show the metrics, samples and pictures of a run.

Both packages have the same objects: a run with `log` and `finish`, images and tables. Each tracker has a thread and a
bounded queue, so it delays no step, whatever its package or its server does.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import logging
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from nextllm_jax.checkpoint.run_dir import TRACKERS, RunDir
from nextllm_jax.config import Config
from nextllm_jax.errors import InputError, missing_package
from nextllm_jax.training.hooks import OptionalOutput

_log = logging.getLogger(__name__)

_QUEUE_ITEMS = 1000
"""What a tracker can be behind before it misses something."""

_FINISH_SECONDS = 20.0
"""How long the end of a training waits for its trackers."""

_Values = Callable[[Any], dict[str, Any]]
"""What to log, given the tracker's package."""

_End = Callable[[Any], None]
"""Ends a run of the tracker's package."""


class Tracker:
    """A tracker of a run. Its methods return at once.

    What comes while the queue is full is dropped, with one warning. `open_run` returns the package and its run. If
    that or anything later fails, one message says so, and the tracker is disabled.
    """

    def __init__(self, name: str, open_run: Callable[[], tuple[Any, Any]]) -> None:
        self.name, self._open_run = name, open_run
        self._queue: queue.Queue[tuple[int, _Values] | _End] = queue.Queue(_QUEUE_ITEMS)
        self._is_behind = self._is_abandoned = False
        work = functools.partial(OptionalOutput(name).write, self._work)
        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""
        self._put(step, lambda _: dict(values))

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Log a table of (prompt, continuation) pairs."""
        columns, rows = ["step", "prompt", "continuation"], [[step, *each] for each in texts]
        self._put(step, lambda package: {"samples": package.Table(columns=columns, data=rows)})

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Log a picture, given the content of a PNG file."""

        def values(package: Any) -> dict[str, Any]:
            from PIL import Image  # which matplotlib needs

            return {name: package.Image(Image.open(io.BytesIO(png)))}

        self._put(step, values)

    def finish(self, deadline: float, *, failed: bool = False) -> None:
        """Ask the tracker to end its run, until a time of time.monotonic(). trackio does not show whether it failed."""
        arguments = {"exit_code": 1} if failed and self.name == "wandb" else {}
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(lambda run: run.finish(**arguments), timeout=max(deadline - time.monotonic(), 0))

    def wait(self, deadline: float) -> None:
        """Wait until the run has ended, until a time of time.monotonic(). Then the thread is left to itself."""
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            _log.warning(f"{self.name} did not finish within {_FINISH_SECONDS:.0f} s, so it may lack the last lines")
            self._is_abandoned = True
            _abandon(self.name)

    def _put(self, step: int, values: _Values) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            if not self._is_behind:
                _log.warning(f"{self.name} is {_QUEUE_ITEMS} lines behind, so it will lack some")
            self._is_behind = True

    def _work(self) -> None:
        try:
            package, run = self._open_run()
            while isinstance(item := self._queue.get(), tuple):
                step, values = item
                run.log(values(package), step=step)
            item(run)
        except SystemExit:  # which would end a thread silently
            raise RuntimeError("it calls sys.exit") from None
        except Exception:
            if not self._is_abandoned:
                raise


@contextlib.contextmanager
def open_trackers(run: RunDir, config: Config, *, enabled: bool) -> Iterator[Sequence[Tracker]]:
    """The trackers of a run, which end with the context. None if not `enabled` (in all processes except process 0)."""
    if not (enabled and config.logging.trackers):
        yield []
        return
    name, run_id = _identity(run)
    # trackio prints, and a training writes nothing to standard output. A redirection is one for all threads.
    with contextlib.redirect_stdout(sys.stderr):
        trackers = [
            Tracker(tracker, functools.partial(_OPEN[tracker], config, name, run_id))
            for tracker in config.logging.trackers
        ]
        failed = True
        try:
            yield trackers
            failed = False
        finally:
            deadline = time.monotonic() + _FINISH_SECONDS
            for tracker in trackers:
                tracker.finish(deadline, failed=failed)
            for tracker in trackers:
                tracker.wait(deadline)


def _identity(run: RunDir) -> tuple[str, str]:
    """The name and the id of a run in its trackers. They are in trackers.json, so they stay if the run is moved."""
    name = PurePath(os.path.abspath(run.path) if run.is_local else str(run.path)).name
    if not run.read(TRACKERS):
        run.write(TRACKERS, json.dumps({"name": name, "id": secrets.token_hex(4)}).encode())
    try:
        found = {"name": name, **json.loads(run.read(TRACKERS))}  # earlier versions did not store the name
        return str(found["name"]), str(found["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{run.path / TRACKERS} is damaged; delete it to begin a new run in the trackers, or restore it"
        ) from error


def require_usable(trackers: Sequence[str]) -> None:
    """Raise InputError if a tracker's package is missing or fails, or if Weights & Biases is online without a login."""
    for name in trackers:
        try:
            package = importlib.import_module(name)
            if getattr(package, "__file__", None) is None:  # a directory of this name, such as wandb's own output
                raise ModuleNotFoundError(name=name)
            usable = name != "wandb" or _may_log_in(package)
        except ModuleNotFoundError as error:
            raise missing_package(f"logging.trackers {name} needs", error, f"nextllm_jax[{name}]") from error
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"logging.trackers {name} cannot be used ({type(error).__name__}: {reason}); correct its environment "
                "variables or its installation, or leave it out"
            ) from error
        if not usable:
            raise InputError(
                "logging.trackers has wandb, which is not logged in; run wandb login, or set WANDB_MODE=offline"
            )


def _may_log_in(wandb: Any) -> bool:
    """Whether wandb.init will not ask for a key on a terminal, in the middle of the training."""
    return wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)


def _open_wandb(config: Config, name: str, run_id: str) -> tuple[Any, Any]:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(
        project=config.logging.project,
        id=run_id,
        name=name,
        resume="allow",
        config=dataclasses.asdict(config),
        settings=wandb.Settings(console="off", quiet=True, finish_timeout=_FINISH_SECONDS),
    )
    return wandb, run


def _open_trackio(config: Config, name: str, run_id: str) -> tuple[Any, Any]:
    import trackio  # pyright: ignore[reportMissingImports]

    run = trackio.init(
        project=config.logging.project,
        name=f"{name}-{run_id}",  # trackio finds the run by its name
        resume="allow",
        config=dataclasses.asdict(config),
        embed=False,
    )
    return trackio, run


_OPEN = {"wandb": _open_wandb, "trackio": _open_trackio}


def _abandon(name: str) -> None:
    """Let the process exit without what the tracker has not sent."""
    if name == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]

        # First it removes its exit handler, which would wait for the server. The rest may take forever.
        thread = threading.Thread(target=wandb.teardown, daemon=True)
        thread.start()
        thread.join(1)
