"""Writes an output as a whole or not at all."""

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from nextllm_jax.errors import InputError, RunFailed, failed_path
from nextllm_jax.progress import progress_bar
from nextllm_jax.storage.interface import StorageError
from nextllm_jax.storage.open_storage import as_path, is_address, open_bucket

_CONFIG = "config.json"


@contextlib.contextmanager
def new_output(output: str) -> Iterator[Path]:
    """A context with a temporary path next to `output`. It is renamed to `output` on success and deleted otherwise.

    For an address, it is in the directory for temporary files, and uploaded. SIGTERM and SIGHUP raise SystemExit
    meanwhile. Raises as `require_new` does, and RunFailed for a full disk.
    """
    require_new(output)
    if is_address(output):
        with tempfile.TemporaryDirectory(prefix="nextllm-", ignore_cleanup_errors=True) as temporary, _signals_raise():
            partial = Path(temporary, "output")
            with _failing_as_output(partial):
                yield partial
            _upload(partial, output)
    else:
        with _new_on_disk(Path(output)) as partial:
            yield partial


def _upload(partial: Path, output: str) -> None:
    """Write a file or a directory to an address. The config.json of a directory, which marks it, is written last."""
    bucket = open_bucket(output if partial.is_dir() else output.rpartition("/")[0])
    names = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
    config = names.pop(_CONFIG, None)
    files = names if partial.is_dir() else {output.rpartition("/")[2]: partial}
    try:
        for name, path in progress_bar(files.items(), desc=f"uploading {output}", unit=" files"):
            bucket.upload(name, path)
    except (KeyboardInterrupt, SystemExit):  # after other errors, the bucket would refuse this too
        for name in files:
            bucket.delete(name)
        raise
    if config and bucket.create(_CONFIG, config.read_bytes()) is None:
        raise InputError(f"another process wrote {output} meanwhile; choose another --output")


@contextlib.contextmanager
def _new_on_disk(output: Path) -> Iterator[Path]:
    partial = output.parent / f".{output.name}.partial"
    with _failing_as_output(output), _signals_raise():
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)
            yield partial
            if output.is_dir():
                output.rmdir()  # an empty one, which a file could not replace
            partial.rename(output)
        except BaseException:
            _discard(partial)
            raise


def require_new(output: str) -> None:
    """Raise InputError if `output` exists and is not an empty directory, and RunFailed if it cannot be written."""
    if not is_address(output):
        _require_new_on_disk(Path(output))
    elif as_path(output).exists():
        raise InputError(f"{output} exists; choose another --output, or remove it")


def _require_new_on_disk(output: Path) -> None:
    with _failing_as_output(output):
        is_empty = output.is_dir() and not output.is_symlink() and not any(output.iterdir())
        if not output.name or (os.path.lexists(output) and not is_empty):
            raise InputError(f"{output} exists; choose another --output, or remove it")
        parent = next(path for path in output.absolute().parents if os.path.lexists(path))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            number = errno.EACCES if parent.is_dir() else errno.ENOTDIR
            raise OSError(number, os.strerror(number), str(parent))


@contextlib.contextmanager
def _failing_as_output(output: Path) -> Iterator[None]:
    """Raise RunFailed, which names the path that failed, for an OSError."""
    try:
        yield
    except StorageError:  # of a bucket that the model is read from
        raise
    except OSError as error:
        path = failed_path(error, output)
        raise RunFailed(
            f"{output} cannot be written ({path}: {error.strerror or error}); make room, make {path} a "
            "writable directory, or choose another --output"
        ) from error


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Raise SystemExit at SIGTERM and SIGHUP, if they would otherwise end the process without cleaning up."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    stopping = []
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
        numbers = (signal.SIGTERM, signal.SIGHUP)
        stopping = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in stopping:
            signal.signal(number, stop)
        yield
    finally:
        for number in stopping:
            signal.signal(number, signal.SIG_DFL)


def _discard(partial: Path) -> None:
    """Remove an incomplete output. The threads of a failed save may create it again for a moment."""
    for _ in range(10):
        if not os.path.lexists(partial):
            break
        with contextlib.suppress(OSError):
            _remove(partial)
        time.sleep(0.2)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
