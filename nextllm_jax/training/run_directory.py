"""The directory of a run: who may use it, and that nothing in it is lost by mistake."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Collection, Iterator, Sequence

import jax
from etils import epath

from nextllm_jax.config import Config
from nextllm_jax.distributed import Group
from nextllm_jax.errors import InputError
from nextllm_jax.orbax_errors import writing
from nextllm_jax.training.resume_guard import CONFIG, Change, read_run, require_resumable

_LOCK = ".lock"
_OVERWRITTEN = "overwritten"
# What a run writes. config.json is the last: as long as it is there, a directory is known for a run.
_FILES = ("metrics.jsonl", "loss.png", "samples.txt", "tensorboard", "tokenizer", "flight", "checkpoints", CONFIG)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """An open run."""

    path: epath.Path
    set_aside: epath.Path | None = None
    """Where the files of an overwritten run went."""
    changes: Sequence[Change] = ()
    """In what a continued run differs from what it was, by consent."""

    def accept(self, config: Config) -> None:
        """Make `config` the one in config.json, once a continued run has passed its checks."""
        if jax.process_index() == 0:
            write_atomically(self.path / CONFIG, config.to_json().encode())


@contextlib.contextmanager
def open_run(
    workdir: epath.PathLike,
    config: Config,
    *,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
    group: Group | None = None,
) -> Iterator[RunDirectory]:
    """The run in `workdir`, new or continued, locked against a second training until the context ends.

    Writes the config to config.json of a new run; a continued run keeps its own until `accept`. With `overwrite`
    the files of the run that is there go to overwritten/<n>; whatever else lies in the directory stays.
    Every process of `group` calls it; process 0 does the work and the others wait for it. No lock on gs:// and the
    like, nor on file systems that have none.

    Raises InputError for a directory that is not a run and not empty, a run of another config (but for fields that
    may differ, `allow_change` among them), a run that another process trains, and a directory that cannot be written.
    """
    path, group = epath.Path(workdir), group or Group()
    if group.process_id != 0:
        group.gather(None)
        if not (path / CONFIG).exists():
            raise InputError(
                f"process {group.process_id} does not see {path / CONFIG}, which process 0 wrote; --workdir must name "
                "a directory that all processes share"
            )
        yield RunDirectory(path)
        return
    with contextlib.ExitStack() as stack:
        try:
            require_run_or_empty(path)
            path.mkdir(parents=True, exist_ok=True)
            if "://" not in str(path):
                stack.enter_context(_lock(path))
            run = _take_over(path, config, overwrite, allow_change)
        except OSError as error:
            raise InputError(
                f"run directory {path} cannot be used ({error.strerror or error}); "
                "choose another --workdir, or make it writable"
            ) from error
        group.gather(None)
        yield run


def write_atomically(path: epath.Path, content: bytes) -> None:
    """Replace a file by `content`, whole or not at all. Raises RunFailed if it cannot be written."""
    new = path.parent / f".{path.name}.new"
    with writing(path):
        new.write_bytes(content)
        new.replace(path)


def require_run_or_empty(workdir: epath.PathLike) -> None:
    """Raise InputError if there is something in `workdir` that is not a run."""
    path = epath.Path(workdir)
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path} is a file; --workdir must name a directory")
    ours = {_LOCK, _OVERWRITTEN, f".{CONFIG}.new"}
    foreign = sorted(item.name for item in path.iterdir() if item.name not in ours)
    if not foreign:
        return
    if CONFIG not in foreign:
        raise InputError(
            f"{path} is not empty and not a run (it holds {', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}); "
            "choose another --workdir"
        )
    read_run(path)


def _take_over(path: epath.Path, config: Config, overwrite: bool, allow_change: Collection[str]) -> RunDirectory:
    """Make the directory the run of `config`: a new one, or the one that is there if it may go on so."""
    set_aside = None
    if (path / CONFIG).exists():
        if not overwrite:
            return RunDirectory(path, changes=require_resumable(path, config, allow_change))
        set_aside = _set_aside(path)
    write_atomically(path / CONFIG, config.to_json().encode())
    return RunDirectory(path, set_aside)


def _set_aside(path: epath.Path) -> epath.Path:
    """Move the files of the run in `path` to the first free overwritten/<n>, and nothing else."""
    number = 1
    while (path / _OVERWRITTEN / str(number)).exists():
        number += 1
    target = path / _OVERWRITTEN / str(number)
    target.mkdir(parents=True)
    for name in _FILES:
        if (path / name).exists():
            (path / name).rename(target / name)
    return target


@contextlib.contextmanager
def _lock(path: epath.Path) -> Iterator[None]:
    """Hold the directory's lock, which the system lets go of when the process ends, however it ends.

    Raises InputError, naming the holder, if another process has it.
    """
    descriptor = os.open(os.fspath(path / _LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(path, _holder(descriptor)) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            yield  # a network file system without locks
            return
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        # Not only closed: a forked child may hold the descriptor still.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def require_unlocked(path: epath.PathLike) -> None:
    """Raise InputError, naming the holder, if a process trains in the run directory `path` now; needs locks."""
    try:
        descriptor = os.open(os.fspath(epath.Path(path) / _LOCK), os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(path, _holder(descriptor)) from error
    except OSError:
        return
    finally:
        os.close(descriptor)  # which lets go of the lock too


def _in_use(path: epath.PathLike, holder: str) -> InputError:
    return InputError(f"{path} is being trained by {holder}; stop that, or choose another --workdir")


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError):
        return "another process"
