"""Headless Chromium, driven by its DevTools protocol over a pipe."""

import base64
import contextlib
import fcntl
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 60
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "Space": (32, " ")}
SHIFT = 8

READY = "document.querySelector('#model').value"
ANSWERED = "document.querySelector('.assistant') && !document.querySelector('#send').hidden"


class Tab:
    """A tab of a new Chromium. What happened in it is in `requests`, `dialogs` and `problems`."""

    def __init__(self, process: subprocess.Popen, write: int, read: int) -> None:
        self._process, self._write = process, write
        self._received: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()
        self._session: str | None = None
        self._number = 0
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.problems: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def _read(self, read: int) -> None:
        with os.fdopen(read, "rb") as pipe:
            rest = b""
            while part := os.read(pipe.fileno(), 2**16):
                *messages, rest = (rest + part).split(b"\0")
                for message in messages:
                    self._received.put(json.loads(message))

    def _send(self, method: str, **parameters: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        return self._number

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, **parameters)
        while True:
            message = self._received.get(timeout=SECONDS)
            if message.get("id") == number:
                assert "error" not in message, (method, message)
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(parameters["message"])
            self._send("Page.handleJavaScriptDialog", accept=True)
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["source"] != "network":
            self.problems.append(parameters["entry"]["text"])

    def open(self, url: str) -> None:
        """Load an address."""
        found = self._call("Page.navigate", url=url)
        assert "errorText" not in found, (url, found)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression, once it is there if it is a promise."""
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"), self.problems)
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """The text of an element as it is shown."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.innerText)")

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a mouse does."""
        place = self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self._call("Input.insertText", text=text)

    def press(self, name: str, *, shift: bool = False) -> None:
        code, text = KEYS[name]
        key = " " if name == "Space" else name
        event = {"key": key, "code": name, "windowsVirtualKeyCode": code, "modifiers": SHIFT * shift}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self._call("Input.dispatchKeyEvent", type="keyUp", **event)

    def resize(self, width: int, height: int) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """Set the system's colors: light or dark."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def open_tab(directory: Path) -> Iterator[Tab]:
    """A tab of a Chromium whose profile is in a directory."""
    assert PROGRAM is not None
    ours_read, theirs_write = os.pipe()
    theirs_read, ours_write = os.pipe()
    # Chromium reads from 3 and writes to 4; the numbers that the shell gets must be neither.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in (theirs_read, theirs_write)]
    command = [
        PROGRAM, "--headless", "--remote-debugging-pipe", f"--user-data-dir={directory}", "--no-first-run",
        "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--no-sandbox", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", *command],
        pass_fds=ends, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    for end in (theirs_read, theirs_write, *ends):
        os.close(end)
    try:
        yield Tab(process, ours_write, ours_read)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours_write)


def chat(tab: Tab, url: str, message: str = "Hello") -> None:
    """Open the page and get an answer."""
    tab.open(f"{url}/")
    tab.until(READY)
    say(tab, message)
    tab.until(ANSWERED)


def say(tab: Tab, message: str) -> None:
    """Type a message and send it."""
    tab.run("document.querySelector('#prompt').focus()")
    tab.type(message)
    tab.press("Enter")
