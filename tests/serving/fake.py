"""A server with the real pages, whose model says what a test wants, a few characters at a time."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from nextllm_jax.serving.pages import page_routes
from nextllm_jax.serving.server import bind, url
from tests.serving.processes import until

PIECE = 7


class Backend:
    """What the server says, and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.text = "Hello."
        self.endless = False
        """Say the text again and again."""
        self.breaks = False
        """End without an end."""
        self.error: tuple[int, Any] | None = None
        """Status and body of the answer; a text is no JSON."""
        self.metrics = ""
        self.bodies: list[dict[str, Any]] = []
        self.go_on = threading.Event()
        """The second half of the text waits for it."""
        self.go_on.set()
        self.left = threading.Event()
        """A client has left before the end."""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                *page_routes(),
                Route("/v1/models", lambda _: JSONResponse({"data": [{"id": "first"}, {"id": "second"}]})),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/ready", lambda _: JSONResponse({})),
                Route("/metrics", lambda _: PlainTextResponse(self.metrics)),
            ]
        )

    async def chat(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if self.error is not None:
            status, body = self.error
            return PlainTextResponse(body, status) if isinstance(body, str) else JSONResponse(body, status)
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        ended = False
        try:
            first = True
            while first or self.endless:
                first = False
                for start in range(0, len(self.text), PIECE):
                    if start * 2 >= len(self.text):
                        while not self.go_on.is_set():
                            await asyncio.sleep(0.01)
                    yield self._event({"choices": [{"delta": {"content": self.text[start : start + PIECE]}}]})
                    await asyncio.sleep(0.01 if self.endless else 0)
            if not self.breaks:
                yield self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                yield self._event({"choices": [], "usage": {"completion_tokens": 12}})
                yield "data: [DONE]\n\n"
            ended = True
        finally:
            if not ended:
                self.left.set()

    def _event(self, chunk: dict[str, Any]) -> str:
        return f"data: {json.dumps(chunk)}\n\n"


@contextlib.contextmanager
def running(app: Starlette) -> Iterator[str]:
    """The address at which an application runs in this process."""
    with bind("127.0.0.1", 0) as sock:
        config = uvicorn.Config(app, log_config=None, log_level="critical", lifespan="off", ws="none", loop="asyncio",
                                timeout_graceful_shutdown=1)  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield url(sock)
        server.should_exit = True
        thread.join(60)
