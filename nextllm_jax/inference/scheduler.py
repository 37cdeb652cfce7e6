"""`Scheduler`: runs any number of requests in the slots of an engine, first come, first served."""

import collections

from nextllm_jax.inference.decode import CHUNK_TOKENS
from nextllm_jax.inference.engine import Engine
from nextllm_jax.inference.request import Output, Request


class Scheduler:
    """Requests that wait for a slot of the engine or run in one. Other clients must not use these slots."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._waiting: collections.OrderedDict[int, Request] = collections.OrderedDict()
        self._running: dict[int, int] = {}  # the number of each request, by slot
        self._count = 0

    @property
    def done(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and not self._running

    @property
    def waiting(self) -> list[int]:
        """The numbers of the requests that wait for a slot, first come first."""
        return list(self._waiting)

    @property
    def num_running(self) -> int:
        """Number of requests in slots."""
        return len(self._running)

    def submit(self, request: Request) -> int:
        """Add a request; its number, counted from 0. Raises InputError if the engine cannot process it."""
        self.engine.check(request)
        self._waiting[self._count] = request
        self._count += 1
        return self._count - 1

    def cancel(self, number: int) -> None:
        """End a request, which gets no more tokens. Does nothing if it has ended."""
        self._waiting.pop(number, None)
        for slot in [slot for slot, running in self._running.items() if running == number]:
            self.engine.free(slot)
            del self._running[slot]

    def close(self) -> None:
        """End all requests."""
        for number in [*self._waiting, *self._running.values()]:
            self.cancel(number)

    def advance(self, limit: int = CHUNK_TOKENS) -> dict[int, Output]:
        """Give free slots to waiting requests, and generate at most `limit` tokens of each; by number, in order."""
        while self._waiting:
            slot = self.engine.find_slot(next(iter(self._waiting.values())).tokens)
            if slot is None:
                break
            number, request = self._waiting.popitem(last=False)
            self.engine.insert(slot, request)
            self._running[slot] = number
        outputs = self.engine.step(limit, stop_early=bool(self._waiting))
        numbered = {self._running[slot]: output for slot, output in outputs.items()}
        for slot, output in outputs.items():
            if output.finish_reason is not None:
                del self._running[slot]
        return dict(sorted(numbered.items()))
