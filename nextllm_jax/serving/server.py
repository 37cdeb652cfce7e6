"""Runs the application at an address until a signal, and then lets its requests end."""

import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from nextllm_jax.errors import InputError
from nextllm_jax.serving.app import Service

_UNREAD_SECONDS = 60
"""A connection whose client reads nothing for this long is closed by the kernel."""

_log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which does not listen yet. Raises InputError if the address cannot be used."""
    with contextlib.ExitStack() as stack:
        try:
            (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
            sock.bind(address)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--host {host} --port {port} cannot be used ({reason}); choose others") from error
        stack.pop_all()
    return sock


def url(sock: socket.socket) -> str:
    """The address of a socket for a browser."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Exits after the running requests on the first SIGTERM or SIGINT, and at once on the second."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or []:
            _log.info("serving %s at %s", ", ".join(self._service.names), url(sock))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own context raises the signal again at the end, so the exit code would not be 0.
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        self.force_exit = self.should_exit
        self.should_exit = self._service.draining = True


def serve(service: Service, sock: socket.socket, *, drain_seconds: int) -> None:
    """Answer requests until SIGTERM or SIGINT; requests that run then have `drain_seconds` to end."""
    config = uvicorn.Config(
        service.app(),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http="h11",
        loop="asyncio",
        lifespan="off",
        timeout_graceful_shutdown=drain_seconds,
    )
    server = _Server(config, service)
    server.run(sockets=[sock])
    _log.info("the server has ended")
