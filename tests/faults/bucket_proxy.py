"""A storage service on this machine: fake-gcs-server behind a proxy that is stricter, and that can fail on purpose.

The server ignores conditions of deletions and of uploads of the kind `media`, for which it also computes wrong
checksums. So the proxy makes those uploads `multipart`, and checks the condition of a deletion itself.
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import re
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator

BUCKET = "bucket"


@dataclasses.dataclass
class Fault:
    """What happens to the next `count` requests whose "METHOD path" matches `pattern`, after `skip` others.

    The path of an upload ends in "&name=" and the name of the object, also where the client sends the name elsewhere.

    `status`: the answer, and the request is not carried out; with `after` it is carried out first. "cut": half of the
    answer (or of the upload), then the connection is closed. "flip": one bit of what is downloaded is inverted.
    "wait": it takes `seconds` longer.
    """

    pattern: str
    action: int | str
    count: int = 1
    skip: int = 0
    after: bool = False
    seconds: float = 0.0
    struck: int = 0


class Proxy:
    """A context with the address of the service, and the faults to inject."""

    def __init__(self, binary: str) -> None:
        self._binary = binary
        self.faults: list[Fault] = []
        self.settings: dict[str, object] = {}
        """What descriptions of the bucket say in addition, such as a soft delete policy."""
        self.ignores_conditions = False
        self.requests: list[str] = []
        """ "METHOD path" of each request."""
        self._lock = threading.Lock()
        self.conditional = threading.Lock()

    def __enter__(self) -> "Proxy":
        self.backend = _free_port()
        options = {
            "scheme": "http",
            "backend": "memory",
            "host": "127.0.0.1",
            "port": self.backend,
            "log-level": "error",
        }
        arguments = [f"-{name}={value}" for name, value in options.items()]
        self._server = subprocess.Popen(
            [self._binary, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._front = _Front(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._front.server_port}"
        threading.Thread(target=self._front.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                self.forward("POST", "/storage/v1/b?project=x", json.dumps({"name": BUCKET}).encode(), {})
                return self
            if time.monotonic() > deadline or self._server.poll() is not None:
                raise RuntimeError("fake-gcs-server does not answer")
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self._front.shutdown()
        self._front.server_close()
        self._server.kill()
        self._server.wait()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for programs that use the service."""
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}

    @contextlib.contextmanager
    def failing(self, *faults: Fault) -> Iterator[None]:
        """A context in which faults happen."""
        self.faults = list(faults)
        try:
            yield
        finally:
            self.faults = []

    def next_fault(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if re.search(fault.pattern, request):
                    fault.struck += 1
                    if fault.skip < fault.struck <= fault.skip + fault.count:
                        return fault
        return None

    def forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, list, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=60)
        try:
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Front(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """Nothing: clients that are killed close their connections."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client to confirm its head
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def _handle(self) -> None:
        body = self._body()
        name = re.search(rb'"name": ?"([^"]*)"', body[:2000]) if "uploadType=multipart" in self.path else None
        fault = self.proxy.next_fault(f"{self.command} {self.path}{f'&name={name[1].decode()}' if name else ''}")
        action = fault.action if fault else None
        if fault and action == "wait":
            time.sleep(fault.seconds)
        if action == "cut" and body:
            self._close()
            return
        if isinstance(action, int) and not (fault and fault.after):
            self._answer(action, [], json.dumps({"error": {"code": action, "message": "injected"}}).encode())
            return
        status, headers, content = self._carry_out(body)
        if isinstance(action, int):
            status, headers, content = action, [], b"{}"
        if action == "flip" and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self._answer(status, headers, content, cut=action == "cut")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _carry_out(self, body: bytes) -> tuple[int, list, bytes]:
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        if self.command == "GET" and address.path == f"/storage/v1/b/{BUCKET}":
            found = json.loads(self.proxy.forward("GET", self.path, b"", {})[2])
            return 200, [], json.dumps(found | self.proxy.settings).encode()
        skipped = {"host", "connection", "transfer-encoding", "content-length", "accept-encoding"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        conditional = "ifGenerationMatch" in query or "if_generation_match" in query
        if self.proxy.ignores_conditions:
            self.path = re.sub(r"[?&]ifGenerationMatch=\d+", "", self.path)
        with self.proxy.conditional if conditional else contextlib.nullcontext():
            if self.command == "DELETE" and conditional:
                status, _, found = self.proxy.forward("GET", address.path, b"", {})
                if status == 200 and json.loads(found)["generation"] != query["ifGenerationMatch"]:
                    return 412, [], b'{"error": {"code": 412, "message": "conditionNotMet"}}'
            if self.command == "POST" and query.get("uploadType") == "media":
                return self._multipart(address.path, query, body)
            return self.proxy.forward(self.command, self.path, body, headers)

    def _multipart(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, list, bytes]:
        query, mark = query | {"uploadType": "multipart"}, "==the-next-part=="
        metadata = json.dumps({"name": query.pop("name")})
        head = f"--{mark}\r\nContent-Type: application/json\r\n\r\n{metadata}\r\n--{mark}\r\n"
        whole = f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + body + f"\r\n--{mark}--\r\n".encode()
        headers = {"Content-Type": f'multipart/related; boundary="{mark}"'}
        return self.proxy.forward("POST", f"{path}?{urllib.parse.urlencode(query)}", whole, headers)

    def _answer(self, status: int, headers: list, content: bytes, *, cut: bool = False) -> None:
        with contextlib.suppress(OSError):
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self._close()

    def _close(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
