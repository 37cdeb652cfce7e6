"""`CompiledPrograms`: the bucket of a run as the second level of jax's compilation cache.

A new machine has an empty disk, so a run that continues there would compile everything again. The programs that earlier
starts compiled are in compiled/<kind of device>/ of the run, under the names of jax's cache files, which are hashes of
all that determines a program. jax's own cache in a bucket is not used: it waits without a limit for a bucket that does
not answer.
"""

import hashlib
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.storage.interface import Identity
from nextllm_jax.training.hooks import Hook, OptionalOutput
from nextllm_jax.training.state import TrainState
from nextllm_jax.training.step import StepMetrics

FETCH_SECONDS = 30.0
"""The longest time that a start waits for programs."""
PUSH_SECONDS = 300.0
"""Time after which a background thread starts to write no further program."""
CLOSE_SECONDS = 5.0
"""The longest time that the end of a training waits for a program that is being written."""
MOST_BYTES = 2 * 2**30
"""The size of all programs that are stored for a kind of device. The oldest are deleted to make room for new ones."""

_PROGRAM = re.compile(r"[\w.-]+-cache")
"""The names of jax's cache files that hold programs."""

_log = logging.getLogger(__name__)


class CompiledPrograms(Hook):
    """Fetches a run's programs when it is created, and stores new ones after the first step and each evaluation.

    Does nothing for a run on disk, or without a local compilation cache. With `writes` False (in all processes except
    process 0, the only one whose programs jax caches) it stores nothing. Failures are warnings.
    """

    def __init__(self, run: RunDir, *, writes: bool = True) -> None:
        self._local = None if run.is_local else _local_cache()
        self._run, self._writes, self._stepped = run, writes, False
        self._input, self._output = (
            OptionalOutput("fetching compiled programs"),
            OptionalOutput("storing compiled programs"),
        )
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if self._local is not None:
            self._kind, self._known = _kind_of_device(), _programs(self._local)
            self._deadline = time.monotonic() + FETCH_SECONDS
            self._run_in_thread(self._input, self._fetch, self._local)

    def _run_in_thread(self, output: OptionalOutput, work: Callable[[Path], None], local: Path) -> None:
        """Do work that may fail, in a thread that does not keep the process from ending."""
        self._thread = threading.Thread(
            target=output.write, args=[lambda: work(local)], name="compiled programs", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the programs, but not beyond FETCH_SECONDS after this object was created."""
        if self._thread is None:
            return
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            _log.warning(f"fetching compiled programs takes over {FETCH_SECONDS:.0f} s; continuing without waiting")

    def _fetch(self, local: Path) -> None:
        """Copy the programs that are missing here, the newest first."""
        storage, count, size = self._run.compiled_programs(self._kind), 0, 0
        stored = {name: found for name, found in storage.files().items() if _PROGRAM.fullmatch(name)}
        self._known |= stored.keys()
        local.mkdir(parents=True, exist_ok=True)
        for name, found in sorted(stored.items(), key=_age):
            size += found.size
            if size > MOST_BYTES or self._ended():
                break
            if not (local / name).exists() and (content := storage.read(name)):  # empty if it was just deleted
                _write(local / name, content)
                count += 1
        if count:
            _log.info(f"fetched {count} compiled programs of earlier starts")

    def after_step(self, step: int, metrics: StepMetrics) -> None:
        """After the first step of this process, store its programs."""
        if not self._stepped:
            self._stepped = True
            self._store_new()

    def after_evaluation(self, step: int, state: TrainState) -> None:
        """Store the programs of the evaluation and of the samples."""
        self._store_new()

    def _store_new(self) -> None:
        """Store new programs in the background, unless the thread is still busy."""
        if self._writes and self._thread is not None and self._local is not None and not self._thread.is_alive():
            self._deadline = time.monotonic() + PUSH_SECONDS
            if _programs(self._local) - self._known:
                self._run_in_thread(self._output, self._push, self._local)

    def _push(self, local: Path) -> None:
        """Store new programs, and delete the oldest ones if all take too much space."""
        storage = self._run.compiled_programs(self._kind)
        new = {name: (local / name).stat().st_size for name in sorted(_programs(local) - self._known)}
        stored = storage.files()
        size = sum(new.values()) + sum(found.size for found in stored.values())
        for name, found in sorted(stored.items(), key=_age, reverse=True):
            if size <= MOST_BYTES:
                break
            storage.delete(name)
            size -= found.size
        for name in new:
            if self._ended():
                break
            storage.create(name, (local / name).read_bytes())
            self._known.add(name)

    def _ended(self) -> bool:
        """Whether the thread must not start anything more."""
        return self._stopped.is_set() or time.monotonic() > self._deadline

    def close(self) -> None:
        """Stop storing; a program that is being written is completed if that takes less than CLOSE_SECONDS."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)


def _local_cache() -> Path | None:
    """The directory in which jax caches programs; None if it caches none, or not on this machine."""
    directory = jax.config.values["jax_compilation_cache_dir"]
    if not directory or "://" in directory or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    return Path(directory)


def _programs(directory: Path) -> set[str]:
    """The names of the programs in a cache."""
    return set(filter(_PROGRAM.fullmatch, os.listdir(directory))) if directory.is_dir() else set()


def _age(item: tuple[str, Identity]) -> int:
    """A key that sorts stored programs from the newest to the oldest: generations are times."""
    return -item[1].generation


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically, while other processes of this machine may write the same one."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(content)
    new.replace(path)


def _kind_of_device() -> str:
    """A name for the devices. Programs for CPUs work only on those with the same instructions."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return re.sub(r"\W+", "-", device.device_kind)
    try:
        instructions = re.findall(r"^(?:flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    except (OSError, IndexError):
        instructions = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(instructions.encode()).hexdigest()[:8]}"
