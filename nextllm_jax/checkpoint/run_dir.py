"""`RunDir`: the one owner of a run's files, which names each of them and writes those that no library writes.

Orbax, TensorBoard, the profiler and the tokenizer write directories of their own and get their paths. Needs no jax.
"""

from contextlib import AbstractContextManager

from etils import epath

from nextllm_jax.checkpoint.orbax_errors import writing
from nextllm_jax.config import Config
from nextllm_jax.config.files import read_config
from nextllm_jax.errors import InputError
from nextllm_jax.storage.disk import Disk

CONFIG, METRICS, LOSS, SAMPLES = FILES = ("config.json", "metrics.jsonl", "loss.png", "samples.txt")
CHECKPOINTS, FLIGHT, BASE, TOKENIZER, PROFILE, TENSORBOARD = DIRECTORIES = (
    "checkpoints", "flight", "base", "tokenizer", "profile", "tensorboard",
)  # fmt: skip
_LOCK, _OVERWRITTEN = ".lock", "overwritten"


class RunDir:
    """The files of a run in a directory, which need not exist yet. Constructing it touches no file."""

    def __init__(self, path: epath.PathLike) -> None:
        self.path = epath.Path(path)
        self.checkpoints, self.flight, self.base = self.path / CHECKPOINTS, self.path / FLIGHT, self.path / BASE
        self.tokenizer, self.profile = self.path / TOKENIZER, self.path / PROFILE
        self.tensorboard = self.path / TENSORBOARD
        self._storage = Disk(self.path)

    def exists(self) -> bool:
        """Whether the directory has a config.json, of a run or of another program."""
        return self._storage.exists(CONFIG)

    def read_config(self) -> Config:
        """The run's config. Raises InputError if there is none."""
        return read_config(self.path / CONFIG)

    def write_config(self, config: Config) -> None:
        """Replace config.json."""
        self.write(CONFIG, config.to_json().encode())

    def names(self, directory: str) -> list[str]:
        """What one of the run's directories holds."""
        return self._storage.names(directory)

    def read(self, name: str) -> bytes:
        """The content of a file of the run; empty if it is missing."""
        return self._storage.read(name)

    def write(self, name: str, content: bytes) -> None:
        """Replace a file of the run, whole or not at all. Raises RunFailed if it cannot be written."""
        with writing(self.path / name):
            self._storage.write(name, content)

    def append(self, name: str, content: bytes) -> None:
        """Extend a file of the run, by all of `content` or not at all. Raises RunFailed if it cannot be written."""
        with writing(self.path / name):
            self._storage.append(name, content)

    def require_run_or_empty(self) -> None:
        """Raise InputError if the directory cannot be written, or holds something that is not a run."""
        self._storage.require_writable("", is_directory=True)
        others = sorted(set(self._storage.names()) - {_LOCK, _OVERWRITTEN})
        if not others:
            return
        try:
            if CONFIG not in others:
                raise InputError(f"it holds {', '.join(others[:3])}{', ...' if others[3:] else ''}")
            self.read_config()
        except InputError as error:
            raise InputError(f"{self.path} is not empty and not a run ({error}); choose another --workdir") from error

    def require_writable(self) -> None:
        """Raise InputError if a file or a directory of the run cannot be written."""
        for name in (*DIRECTORIES, *FILES):
            self._storage.require_writable(name, is_directory=name not in FILES)

    def set_aside(self) -> epath.Path:
        """Move every file of the run to overwritten/<n>, config.json last and as a copy. Returns that directory.

        Until a new config.json replaces it, the directory still is a run, and a move that was interrupted is
        finished by the next one.
        """
        there = set(self._storage.names())
        names = [name for name in (*DIRECTORIES, *FILES) if name in there and name != CONFIG]
        number = 1
        while {CONFIG, *names}.intersection(self._storage.names(target := f"{_OVERWRITTEN}/{number}")):
            number += 1
        for name in names:
            self._storage.move(name, f"{target}/{name}")
        self.write(f"{target}/{CONFIG}", self.read(CONFIG))
        return self.path / target

    def require_no_interrupted_overwrite(self) -> None:
        """Raise InputError if a `set_aside` was killed before it had moved everything."""
        for name in self._storage.names(_OVERWRITTEN):
            if name.isdecimal() and not self._storage.exists(f"{_OVERWRITTEN}/{name}/{CONFIG}"):
                raise InputError(
                    f"an --overwrite of {self.path} was interrupted, and part of the run is in "
                    f"{self.path / _OVERWRITTEN / name}; run it again with --overwrite to finish it, or move what is "
                    f"in there back to {self.path}"
                )

    def lock(self) -> AbstractContextManager[None]:
        """A context that holds the run's lock; creates the directory if needed.

        Entering it raises InputError, naming the other process, if one trains there.
        """
        return self._storage.lock(_LOCK)

    def require_unlocked(self) -> None:
        """Raise InputError, naming the process, if one trains in the directory now."""
        self._storage.require_unlocked(_LOCK)
