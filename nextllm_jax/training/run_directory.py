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
from pathlib import Path

from etils import epath

from nextllm_jax.checkpoint import step_files
from nextllm_jax.checkpoint.orbax_errors import writing
from nextllm_jax.config import Config
from nextllm_jax.config.files import CONFIG, local_workdir
from nextllm_jax.distributed.process_group import Group
from nextllm_jax.errors import InputError
from nextllm_jax.training.resume_guard import Change, read_run, require_resumable

_LOCK = ".lock"
_OVERWRITTEN = "overwritten"
_FILES = ("metrics.jsonl", "loss.png", "samples.txt", CONFIG)
_DIRECTORIES = ("tensorboard", "tokenizer", "flight", "profile", "checkpoints", "base")
_CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """An open run."""

    path: epath.Path
    writes: bool = True
    """Whether this process writes the run's files."""
    set_aside: epath.Path | None = None
    """Where the files of an overwritten run went."""
    changes: Sequence[Change] = ()
    """In what a continued run differs from what it was, by consent."""

    def accept(self, config: Config) -> None:
        """Make `config` the one in config.json, once a continued run has passed its checks."""
        if self.writes:
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
    Every process of `group` calls it; process 0 does the work and the others wait for it. File systems without locks
    get none.

    Raises InputError as `require_usable` does, and for a run that another process trains.
    """
    path, group = epath.Path(workdir), group or Group()
    if group.process_id != 0:
        group.gather(None)
        if not (path / CONFIG).exists():
            raise InputError(
                f"process {group.process_id} does not see {path / CONFIG}, which process 0 wrote; --workdir must name "
                "a directory that all processes share"
            )
        yield RunDirectory(path, writes=False)
        return
    with contextlib.ExitStack() as stack:
        try:
            require_run_or_empty(path)
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(path))
            run = _take_over(path, config, overwrite, allow_change)
            (path / _CHECKPOINTS).mkdir(exist_ok=True)  # from here on, a run without it has lost its checkpoints
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
        try:
            new.write_bytes(content)
            new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise


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


def require_startable(config: Config, *, overwrite: bool, allow_change: Collection[str]) -> list[Change]:
    """`require_usable` of the config's run directory, which no process may be training in."""
    workdir = local_workdir(config)
    require_unlocked(workdir)
    return require_usable(workdir, config, overwrite=overwrite, allow_change=allow_change)


def require_usable(
    workdir: epath.PathLike, config: Config, *, overwrite: bool = False, allow_change: Collection[str] = ()
) -> list[Change]:
    """Raise InputError if `config` cannot be trained in `workdir`, as a new run or as one that is continued.

    Raises if the directory is neither empty nor a run, if the config differs in a field that may not change, if the
    run is past training.steps, if checkpoints or base weights are missing, or if a file is not writable. Returns the
    changes of a continued run that `allow_change` permits.
    """
    path = epath.Path(workdir)
    require_run_or_empty(path)
    _require_writable(path)
    if overwrite or not (path / CONFIG).exists():
        return []
    _require_no_move_cut_short(path)
    changes = require_resumable(path, config, allow_change)
    for name in _FILES + _DIRECTORIES:
        _require_writable_entry(path / name, is_directory=name in _DIRECTORIES)
    saved = step_files.saved_steps(path / _CHECKPOINTS)
    if not saved:
        _require_nothing_lost(path)
    elif max(saved) > config.training.steps:
        raise InputError(f"the run is at step {max(saved)} already, beyond training.steps {config.training.steps}")
    elif config.lora.rank:
        from nextllm_jax.checkpoint.base import base_id  # imports jax, which other runs do not need yet

        base_id(path)
    return changes


def _require_writable(path: epath.Path) -> None:
    """Raise InputError unless files can be made in a directory, or the directory itself."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{place} is a file; --workdir must name a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{place} is not writable; choose another --workdir, or make it writable")


def _require_writable_entry(path: epath.Path, *, is_directory: bool) -> None:
    if not path.exists():
        return
    if path.is_dir() != is_directory:
        kinds = ("a file", "a directory")
        raise InputError(f"{path} is {kinds[not is_directory]}, but a run keeps {kinds[is_directory]} there; move it")
    if not is_directory and not os.path.isfile(path):
        raise InputError(f"{path} is no regular file, as a run keeps there; move it")
    if not os.access(path, os.W_OK | os.X_OK if is_directory else os.W_OK):
        raise InputError(f"{path} is not writable; make it writable, or choose another --workdir")


def _require_nothing_lost(path: epath.Path) -> None:
    """Raise InputError if metrics.jsonl shows that a checkpoint must have existed and none does.

    A save is certain to be complete once the next one was due.
    """
    config, last = read_run(path), _last_metrics_step(path / "metrics.jsonl")
    first_save = min(config.checkpoint.every_steps, config.training.evaluate_every_steps)
    certain = 0 if config.init_from is not None else 2 * first_save
    if last is not None and (last > certain or not (path / _CHECKPOINTS).exists()):
        raise InputError(
            f"{path} has metrics up to step {last}, but no checkpoint in {path / _CHECKPOINTS}; restore that "
            "directory (is its disk mounted?), or start over with --overwrite"
        )


def _last_metrics_step(path: epath.Path) -> int | None:
    """The last step of metrics.jsonl; None without any."""
    last = None
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line of a process that was killed
            last = int(json.loads(line)["step"])
    return last


def _take_over(path: epath.Path, config: Config, overwrite: bool, allow_change: Collection[str]) -> RunDirectory:
    """Make the directory the run of `config`: a new one, or the one that is there if it may go on so."""
    changes = require_usable(path, config, overwrite=overwrite, allow_change=allow_change)
    set_aside = None
    if (path / CONFIG).exists():
        if not overwrite:
            return RunDirectory(path, changes=changes)
        set_aside = _set_aside(path)
    write_atomically(path / CONFIG, config.to_json().encode())
    return RunDirectory(path, set_aside=set_aside)


def _set_aside(path: epath.Path) -> epath.Path:
    """Move the files of the run in `path` to overwritten/<n>, and nothing else; config.json is copied, as the last.

    A move that was cut short goes on where it was. The run keeps its config.json until the new one replaces it, so the
    directory is known for a run at any time.
    """
    names = [name for name in (*_DIRECTORIES, *_FILES) if name != CONFIG and os.path.lexists(path / name)]
    number = 1
    while _is_taken(target := path / _OVERWRITTEN / str(number), names):
        number += 1
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).rename(target / name)
    write_atomically(target / CONFIG, (path / CONFIG).read_bytes())
    return target


def _is_taken(target: epath.Path, names: Collection[str]) -> bool:
    return (target / CONFIG).exists() or any(os.path.lexists(target / name) for name in names)


def _require_no_move_cut_short(path: epath.Path) -> None:
    """Raise InputError if an --overwrite was killed while it moved the run's files."""
    moved = (path / _OVERWRITTEN).iterdir() if (path / _OVERWRITTEN).is_dir() else ()
    for directory in moved:
        if directory.name.isdecimal() and not (directory / CONFIG).exists():
            raise InputError(
                f"an --overwrite of {path} was cut short, and part of the run is in {directory}; run it again with "
                f"--overwrite to finish it, or move what is in there back to {path}"
            )


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
