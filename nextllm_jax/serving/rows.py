"""`RunningRows`: the rows of one request, from the worker's thread to the event loop of the server."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence

from nextllm_jax.inference.stream import TextRow
from nextllm_jax.serving.errors import ApiError
from nextllm_jax.serving.model import Row, ServedModel
from nextllm_jax.serving.worker import Job, QueueFull, Update

RETRY_SECONDS = 1


class RunningRows:
    """Submits rows, and yields (index, update) as they arrive. `cancel` ends the rows that have not ended.

    Updates wait in memory until they are read, so a slow reader holds up no other. Raises ApiError if the queue is
    full, and while iterating if the engine fails.
    """

    def __init__(
        self, model: ServedModel, rows: Sequence[Row], *, stop: Sequence[str], scores_prompt: bool, generates: bool
    ) -> None:
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._jobs = [
            Job(
                request=row.request,
                row=TextRow(row.prompt, model.llm.tokenizer, stop, with_logprobs=row.request.top_logprobs is not None),
                deliver=functools.partial(self._deliver, row.index),
                scores_prompt=scores_prompt,
                generates=generates,
            )
            for row in rows
        ]
        try:
            model.worker.submit(self._jobs)
        except QueueFull as error:
            raise ApiError(
                429,
                f"all slots of {model.name} and the queue for them are in use; try again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            ) from error

    def _deliver(self, index: int, update: Update) -> None:
        """Pass an update to the event loop; called in the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed when the server exits
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

    def cancel(self) -> None:
        """End the rows; the worker frees their slots after its current chunk."""
        self._model.worker.cancel(self._jobs)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        running = len(self._jobs)
        while running:
            index, update = await self._updates.get()
            if update.failed:
                raise ApiError(500, "the engine failed on this request; see the server's log", code="engine_error")
            running -= update.finish_reason is not None
            yield index, update
