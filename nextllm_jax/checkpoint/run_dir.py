"""`RunDir`: names all files of a run, and reads and writes those that no library writes.

Orbax, TensorBoard, the profiler and the tokenizer write their own directories, whose paths it provides. Importing this
module does not import jax.
"""

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from etils import epath

from nextllm_jax.checkpoint.orbax_errors import writing
from nextllm_jax.config import Config
from nextllm_jax.config.files import REPLACED, read_config
from nextllm_jax.errors import InputError
from nextllm_jax.storage.interface import Storage
from nextllm_jax.storage.open_storage import as_path, open_storage

CONFIG, METRICS, LOSS, LAYERS, EXPERTS, SAMPLES, TRACKERS = FILES = (
    "config.json", "metrics.jsonl", "loss.png", "layers.png", "experts.png", "samples.txt", "trackers.json",
)  # fmt: skip
CHECKPOINTS, FLIGHT, BASE, TOKENIZER, PROFILE, TENSORBOARD = DIRECTORIES = (
    "checkpoints", "flight", "base", "tokenizer", "profile", "tensorboard",
)  # fmt: skip
_LOCK, _OVERWRITTEN, _COMPILED = ".lock", "overwritten", "compiled"


class RunDir:
    """The files of a run in a directory, which need not exist yet. The constructor accesses no file."""

    def __init__(self, path: epath.PathLike) -> None:
        self._storage = open_storage(path)
        self.path = as_path(path)
        self.checkpoints, self.flight, self.base = self.path / CHECKPOINTS, self.path / FLIGHT, self.path / BASE
        self.tokenizer, self.profile = self.path / TOKENIZER, self.path / PROFILE
        self.tensorboard = self.path / TENSORBOARD
        self.is_local = self._storage.is_local

    def exists(self) -> bool:
        """Whether the directory has a config.json, which may be a run's or another program's."""
        return self._storage.exists(CONFIG)

    def read_config(self) -> Config:
        """The run's config. Raises InputError if config.json is missing or is not a run's."""
        return read_config(self.path / CONFIG)

    def read_replaced(self) -> dict[str, tuple[Any, ...]]:
        """By dotted field, the values that `--allow-change` has replaced in this run; see `write_config`."""
        self.read_config()  # raises InputError for another file
        return {name: _hashable(values) for name, values in json.loads(self.read(CONFIG)).get(REPLACED, {}).items()}

    def write_config(self, config: Config, replaced: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        """Replace config.json. `replaced` has earlier values of fields, see `training.accepted_changes`."""
        values = json.loads(config.to_json()) | ({REPLACED: replaced} if replaced else {})
        self.write(CONFIG, (json.dumps(values, indent=2) + "\n").encode())

    def names(self, directory: str) -> list[str]:
        """The names in one of the run's directories."""
        return self._storage.names(directory)

    def read(self, name: str) -> bytes:
        """The content of a file of the run; empty if it is missing."""
        return self._storage.read(name)

    def write(self, name: str, content: bytes) -> None:
        """Replace a file of the run atomically. Raises RunFailed if it cannot be written."""
        with writing(self.path / name):
            self._storage.write(name, content)

    def append(self, name: str, content: bytes) -> None:
        """Append to a file of the run. If that fails, nothing is appended, and RunFailed is raised.

        In a bucket, the file is written later: at most every 30 seconds, and by `sync`.
        """
        with writing(self.path / name):
            self._storage.append(name, content)

    def sync(self) -> None:
        """Write what was appended. Raises OSError if that fails, or if another process took over the run's lock."""
        self._storage.sync()

    def create_checkpoints(self) -> None:
        """Create the directory of the checkpoints, unless it exists."""
        self._storage.make_directory(CHECKPOINTS)

    def new_profile(self) -> AbstractContextManager[os.PathLike[str]]:
        """A context with a local directory, whose files are in the run's profile/ once it has ended."""
        return self._storage.local_directory(PROFILE)

    def compiled_programs(self, kind: str) -> Storage:
        """The programs that earlier starts compiled for a kind of device. They are no part of the run: `set_aside`
        leaves them, since they are as good for the run that replaces it."""
        return open_storage(self.path / _COMPILED / kind)

    def modified(self, name: str) -> float | None:
        """When a file of the run was written, in seconds since the epoch; None if it is missing."""
        return self._storage.modified(name)

    def clock(self) -> float:
        """The time by the clock of the storage, in seconds since the epoch."""
        return self._storage.clock()

    def free_bytes(self) -> int | None:
        """The space for new files; None if it is not limited."""
        return self._storage.free_bytes()

    def require_run_or_empty(self) -> None:
        """Raise InputError if the directory is not writable, or if it is neither empty nor a run."""
        self._storage.require_writable("", is_directory=True)
        others = sorted(set(self._storage.names()) - {_LOCK, _OVERWRITTEN, _COMPILED})
        if not others:
            return
        try:
            if CONFIG not in others:
                raise InputError(f"it holds {', '.join(others[:3])}{', ...' if others[3:] else ''}")
            self.read_config()
        except InputError as error:
            raise InputError(f"{self.path} is not empty and not a run ({error}); choose another --workdir") from error

    def require_writable(self) -> None:
        """Raise InputError if a file or directory of the run is not writable."""
        for name in (*DIRECTORIES, *FILES):
            self._storage.require_writable(name, is_directory=name not in FILES)

    def set_aside(self) -> epath.Path:
        """Move all files of the run to overwritten/<n>, which is returned. config.json is copied last, and not removed.

        So the directory remains a run until a new config.json is written, and another call can finish an interrupted
        one.
        """
        there = set(self._storage.names())
        names = [name for name in (*DIRECTORIES, *FILES) if name in there and name != CONFIG]
        # An interrupted move that copies has left both, so finishing it may meet names that are there already.
        taken = {CONFIG, *names} if self._storage.renames else {CONFIG}
        number = 1
        while taken.intersection(self._storage.names(target := f"{_OVERWRITTEN}/{number}")):
            number += 1
        for name in names:
            self._storage.move(name, f"{target}/{name}")
        self.write(f"{target}/{CONFIG}", self.read(CONFIG))
        return self.path / target

    def require_no_interrupted_overwrite(self) -> None:
        """Raise InputError if a `set_aside` was killed before it had moved all files."""
        for name in self._storage.names(_OVERWRITTEN):
            if name.isdecimal() and not self._storage.exists(f"{_OVERWRITTEN}/{name}/{CONFIG}"):
                raise InputError(
                    f"an --overwrite of {self.path} was interrupted, so part of the run is in "
                    f"{self.path / _OVERWRITTEN / name}; run again with --overwrite to finish it, or move those files "
                    f"back to {self.path}"
                )

    def lock(self) -> AbstractContextManager[None]:
        """A context that holds the run's lock; creates the directory if needed.

        Entering it raises InputError, which names the other process, if another process trains there.
        """
        return self._storage.lock(_LOCK)

    def require_unlocked(self) -> None:
        """Raise InputError, which names the process, if a process currently trains in the directory."""
        self._storage.require_unlocked(_LOCK)


def _hashable(value: Any) -> Any:
    """A JSON value with tuples for lists, as in a Config."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
