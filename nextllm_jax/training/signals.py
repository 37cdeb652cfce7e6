"""A request to stop, from Ctrl-C or SIGTERM, that the training loop looks at between steps."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into a flag.

    A second signal acts as if this were not here, for a user who does not want to wait. Python runs
    handlers between bytecodes, so a signal during a compilation is seen when it ends.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the signal that came; None: none."""
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
