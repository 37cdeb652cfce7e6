"""The routes of the server: what each answers, who may ask, and how large a request may be."""

import asyncio
import contextlib
import dataclasses
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nextllm_jax.errors import InputError
from nextllm_jax.serving.answers import DONE, Answer, ChatAnswer, CompletionAnswer, event
from nextllm_jax.serving.errors import ApiError
from nextllm_jax.serving.hosts import host_name, is_loopback
from nextllm_jax.serving.metrics import Metrics
from nextllm_jax.serving.model import Row, ServedModel
from nextllm_jax.serving.pages import page_routes
from nextllm_jax.serving.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    parse,
)
from nextllm_jax.serving.rows import RunningRows
from nextllm_jax.serving.worker import Update

BODY_SECONDS = 30
"""Time in which a body must arrive."""
CLIENT_CLOSED = 499

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request may use. The slots limit its tokens."""

    body_bytes: int
    seconds: float
    """From the body to the end of the answer."""


class Service:
    """The endpoints for `models`, the first of which answers where a request cannot name one.

    Without `keys`, everyone may ask. With `local_only`, the Host of a request must be this machine.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        metrics: Metrics,
        limits: Limits,
        keys: Sequence[str] = (),
        local_only: bool = False,
    ) -> None:
        self._models, self._metrics, self._limits = models, metrics, limits
        self._keys = [key.encode() for key in keys]
        self._local_only = local_only
        self.draining = False

    @property
    def names(self) -> list[str]:
        """The names of the models."""
        return list(self._models)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes: list[Route | Mount] = [
            self._route("/v1/completions", self.completions, "POST"),
            self._route("/v1/chat/completions", self.chat, "POST"),
            self._route("/v1/models", self.models, "GET"),
            self._route("/v1/models/{name:path}", self.model, "GET"),
            self._route("/tokenize", self.tokenize, "POST"),
            self._route("/detokenize", self.detokenize, "POST"),
            self._route("/tokenizer_info", self.tokenizer_info, "GET"),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            *page_routes(),
        ]
        handlers: dict[Any, Any] = {
            ApiError: lambda _, error: _error(error),
            InputError: lambda _, error: _error(ApiError(400, str(error))),
            HTTPException: lambda _, error: _error(ApiError(error.status_code, error.detail, headers=error.headers)),
            ClientDisconnect: lambda _, __: Response(status_code=CLIENT_CLOSED),
            Exception: lambda _, __: _error(ApiError(500, "the server failed on this request; see its log")),
        }
        middleware = [Middleware(_LocalOnly)] if self._local_only else []
        return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware)

    def _route(self, path: str, answer: Callable[[Request], Awaitable[Response]], method: str) -> Route:
        """A route that needs a key, and whose answers are counted."""

        async def endpoint(request: Request) -> Response:
            status = 500
            try:
                self._require_key(request)
                response = await answer(request)
                status = response.status_code
                return response
            except ApiError as error:
                status = error.status
                raise
            except InputError:
                status = 400
                raise
            except ClientDisconnect:
                status = CLIENT_CLOSED
                raise
            finally:
                self._metrics.count_request(path, status)

        return Route(path, endpoint, methods=[method])

    def _require_key(self, request: Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.encode("latin-1"), key) for key in self._keys]
        if self._keys and not (scheme.lower() == "bearer" and any(matches)):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        body = parse(CompletionBody, await self._body(request))
        model = self._named(body.model)
        rows = await run_in_threadpool(model.completion_rows, body)
        answer = CompletionAnswer(model.name, model.llm.tokenizer, rows, echo=body.echo)
        scores_prompt = body.echo and body.logprobs is not None
        return await self._generate(
            request, body, model, rows, answer, scores_prompt=scores_prompt, generates=body.max_tokens > 0
        )

    async def chat(self, request: Request) -> Response:
        """Answers a chat."""
        body = parse(ChatBody, await self._body(request))
        model = self._named(body.model)
        rows = await run_in_threadpool(model.chat_rows, body)
        answer = ChatAnswer(model.name, model.llm.tokenizer, rows)
        return await self._generate(request, body, model, rows, answer)

    async def _generate(
        self,
        request: Request,
        body: GenerationBody,
        model: ServedModel,
        rows: Sequence[Row],
        answer: Answer,
        *,
        scores_prompt: bool = False,
        generates: bool = True,
    ) -> Response:
        """Run the rows, and answer whole or in events. The rows end if the client leaves or the time is over."""
        deadline = asyncio.get_running_loop().time() + self._limits.seconds
        running = RunningRows(model, rows, stop=body.stop, scores_prompt=scores_prompt, generates=generates)
        updates = aiter(running)
        streams = False
        try:
            if not body.stream:
                await _while_connected(request, _collect(updates, answer), deadline)
                return JSONResponse(answer.whole())
            first = await _while_connected(request, anext(updates), deadline)  # errors before it have a status
            streams = True
            events = _events(first, updates, answer, with_usage=body.stream_options.include_usage)
            return EventStream(events, running, deadline)
        finally:
            if not streams:
                running.cancel()

    async def models(self, request: Request) -> Response:
        """Lists the models."""
        return JSONResponse({"object": "list", "data": [_describe(model) for model in self._models.values()]})

    async def model(self, request: Request) -> Response:
        """Describes a model."""
        return JSONResponse(_describe(self._named(request.path_params["name"])))

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a prompt or a chat."""
        body = parse(TokenizeBody, await self._body(request))
        model = self._named(body.model)
        tokens = await run_in_threadpool(model.tokenize, body)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": model.worker.max_length})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = parse(DetokenizeBody, await self._body(request))
        return JSONResponse({"prompt": self._named(body.model).llm.tokenizer.decode(body.tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        """The special tokens and the chat template of the first model, as vLLM gives them."""
        tokenizer = next(iter(self._models.values())).llm.tokenizer
        names = {"bos_token": None, "eos_token": tokenizer.decode([tokenizer.eos_id]), **tokenizer.roles.names}
        return JSONResponse({**names, "chat_template": tokenizer.chat_template})

    async def health(self, request: Request) -> Response:
        """Says whether the workers run; if not, the process should be restarted."""
        return self._status("ok", all(model.worker.alive for model in self._models.values()))

    async def ready(self, request: Request) -> Response:
        """Says whether new requests are taken."""
        return self._status("ready", not self.draining and all(model.worker.alive for model in self._models.values()))

    def _status(self, name: str, holds: bool) -> Response:
        return JSONResponse({"status": name if holds else f"not {name}"}, 200 if holds else 503)

    async def metrics(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def _named(self, name: str | None) -> ServedModel:
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name is None:
            raise ApiError(400, f"the request names no model; the models are {', '.join(self._models)}", param="model")
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(404, f"there is no model {name!r:.80}; the models are {known}", param="model",
                           code="model_not_found")  # fmt: skip
        return self._models[name]

    async def _body(self, request: Request) -> bytes:
        """The body of a request. Raises ApiError if its type is not JSON, or if it is too large or too slow."""
        # A page of another origin cannot send this type: the browser asks first (CORS), and the server does not agree.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON; send it with Content-Type: application/json")
        most = self._limits.body_bytes
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise ApiError(413, f"the body is larger than {most:,} bytes", headers={"Connection": "close"})
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds") from error
        return body


class _LocalOnly:
    """Refuses requests whose Host is another name than this machine's.

    The owner of a domain can point it to 127.0.0.1. A browser then lets pages of the domain read answers of a server
    here, but sends the domain as Host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._app
        if scope["type"] == "http" and not is_loopback(host_name(Headers(scope=scope).get("host", ""))):
            answer = _error(
                ApiError(403, "the Host is not this machine; ask localhost, or start with a key or --no-key")
            )
        await answer(scope, receive, send)


class EventStream(StreamingResponse):
    """Sends events until the rows end, the client leaves or the deadline passes, and then cancels the rows."""

    def __init__(self, events: AsyncIterator[bytes], running: RunningRows, deadline: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._running, self._deadline = running, deadline

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            with contextlib.suppress(OSError):
                body = event(_timeout().body())
                await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": False}), 1)
        finally:
            self._running.cancel()


async def _collect(updates: AsyncIterator[tuple[int, Update]], answer: Answer) -> None:
    async for index, update in updates:
        answer.add(index, update)


async def _events(
    first: tuple[int, Update], updates: AsyncIterator[tuple[int, Update]], answer: Answer, *, with_usage: bool
) -> AsyncIterator[bytes]:
    """The answer as events, up to [DONE] or an error."""
    for chunk in answer.opening():
        yield event(chunk)
    try:
        async for index, update in _chain(first, updates):
            answer.add(index, update)
            if chunk := answer.chunk(index, update):
                yield event(chunk)
    except ApiError as error:
        yield event(error.body())
        return
    if with_usage:
        yield event(answer.usage_chunk())
    yield DONE


async def _chain(first: T, others: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for each in others:
        yield each


async def _while_connected(request: Request, work: Awaitable[T], deadline: float) -> T:
    """The result of `work`. Raises ClientDisconnect if the client leaves first, and ApiError after the deadline."""

    async def client_leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves())
    try:
        async with asyncio.timeout_at(deadline):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    except TimeoutError as error:
        raise _timeout() from error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _timeout() -> ApiError:
    # OpenAI's clients repeat a request that took too long, unless they are told not to.
    return ApiError(504, "the request took too long; lower max_tokens", code="timeout",
                    headers={"x-should-retry": "false"})  # fmt: skip


def _describe(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "nextllm_jax",
        "max_model_len": model.worker.max_length,
    }


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)
