"""`Writer`: writes arrays through orbax, and runs tasks on checkpoints in the background, one after another."""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from nextllm_jax.checkpoint import orbax_errors, step_files
from nextllm_jax.storage.open_storage import open_storage

_CHUNK_BYTES = 2**24
"""Limit on the chunks of an array. Chunks are compressed and decompressed in parallel."""


class _Attempt(ocp.path.atomicity.CommitFileTemporaryPath):
    """Where orbax writes in a bucket: there are no directories to create, and the name is new, so nothing is there."""

    async def create(self) -> epath.Path:
        """The path. Sends no request itself; the store writes orbax's metadata of a step in a thread."""
        if self._checkpoint_metadata_store is not None:
            metadata = {"init_timestamp_nsecs": time.time_ns()}
            self._checkpoint_metadata_store.write(self.get() / step_files.ORBAX_METADATA, metadata)
        return self.get()


class Writer:
    """Writes trees of arrays, and runs tasks in a thread. `directory` is where, or next to where, all is written."""

    def __init__(self, directory: epath.Path) -> None:
        orbax_errors.silence_tracebacks()
        # Orbax by default creates directories in threads; if that fails, other threads wait for them forever.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        temporary = None if open_storage(directory).renames else _Attempt
        items = ocp.CompositeOptions(async_options=options, temporary_path_class=temporary)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(composite_options=items),
            async_options=options,
            file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
            temporary_path_class=temporary,
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: tuple[int, concurrent.futures.Future[None]] | None = None

    def write(self, path: epath.Path, items: dict[str, Any]) -> None:
        """Start writing named trees to a new directory. Returns once the arrays may be donated."""
        chunks = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
        trees = {
            name: ocp.args.StandardSave(tree, save_args=jax.tree.map(lambda _: chunks, tree))
            for name, tree in items.items()
        }
        self._checkpointer.save(path, args=ocp.args.Composite(**trees))

    def wait_for_arrays(self) -> None:
        """Wait until all processes have written what `write` started. Raises what went wrong."""
        self._checkpointer.wait_until_finished()

    def submit(self, step: int, task: Callable[[], None]) -> None:
        """Run a task about a step after those submitted before, unless one of them fails."""
        before = self._last[1] if self._last else None

        def in_order() -> None:
            if before is not None:
                before.result()
            task()

        self._last = step, self._thread.submit(in_order)

    def take(self) -> tuple[int, BaseException | None] | None:
        """The last task's step and what went wrong in it, once it is done; None if there is none."""
        if self._last is None:
            return None
        step, task = self._last
        error = task.exception()  # for a full disk, tensorstore and asyncio raise many types of exceptions
        self._last = None
        return step, error

    def failed(self) -> bool:
        """Whether the last task has already failed."""
        return self._last is not None and self._last[1].done() and self._last[1].exception() is not None

    def close(self) -> None:
        """Wait for the last task, and stop the threads."""
        self._thread.shutdown()
        with contextlib.suppress(Exception):  # after a failed save, whose error was already raised
            self._checkpointer.close()
