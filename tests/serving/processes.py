"""A process of `nextllm serve`, as tests start, ask and watch it."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from tests.conftest import ROOT

KEY = "a key"
NEVER_STOP = {"257": -100, "259": -100}
"""Biases that ban the stop ids of the model in models.py."""
NUM_SLOTS = 4


class Server:
    """A process of `nextllm serve`."""

    def __init__(self, directory: Path, cache: Path, *arguments: str, port: int = 0) -> None:
        """Serve the model `bytes` of a directory, with a compilation cache."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        sizes = ["--num-slots", str(NUM_SLOTS), "--max-length", "1024"]
        arguments = ("--port", str(port), "--checkpoint", "bytes", *sizes, *arguments)
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nextllm_jax.cli", "serve", *arguments],
            cwd=directory, env={**environment, "NEXTLLM_API_KEY": KEY}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._started = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._started.wait(120), self.log
        self.url = re.findall(r"serving .* at (http://\S+)", "".join(self.log))[0]
        self.port = int(self.url.rpartition(":")[2])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.wait()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.log.append(line)
                if "serving " in line:
                    self._started.set()
        self._started.set()

    def wait(self) -> int:
        """The exit code, once all of the log is read."""
        code = self.process.wait(60)
        self._reader.join()
        return code

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return {line.partition("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("nextllm_")}

    def send(self, body: dict, path: str = "/v1/completions") -> socket.socket:
        """A connection with a request on it."""
        content = json.dumps(body).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that unread text stays with the server
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def idle(self) -> bool:
        found = self.metrics()
        return found["nextllm_slots_used"] == found["nextllm_waiting_rows"] == 0


def until(condition) -> None:
    """Wait for at most a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
