"""Requests to stop in one process; several processes and exits by a signal are in test_distributed.py."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nextllm_jax.training.signals import StopRequest


def send(number):
    os.kill(os.getpid(), number)


def reached_within_seconds(stop, seconds=10):
    deadline = time.monotonic() + seconds
    while not (name := stop.reached()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_by_name(number):
    before, wakeup = signal.getsignal(number), signal.set_wakeup_fd(-1)
    with StopRequest() as stop:
        assert stop.reached() is None
        send(number)
        assert reached_within_seconds(stop) == stop.name == signal.Signals(number).name
        assert stop.reached() == stop.name
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(wakeup) == -1


def test_signals_at_once_are_one_request():
    with StopRequest() as stop:
        send(signal.SIGTERM)
        assert reached_within_seconds(stop) == "SIGTERM"
        send(signal.SIGTERM)  # would end this process
        assert stop.reached() == "SIGTERM"


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    monkeypatch.setattr("nextllm_jax.training.signals._ONE_REQUEST_SECONDS", 0.0)
    with StopRequest() as stop:
        send(signal.SIGINT)
        assert reached_within_seconds(stop) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


_BUSY = """
import time
from nextllm_jax.training.signals import StopRequest

with StopRequest(may_exit=True):
    print("here", flush=True)
    time.sleep(0.2)  # what a signal cuts short
    for _ in range(200):
        time.sleep(0.1)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_later_signal_ends_a_command_and_says_what_is_lost(number, code):
    command = [sys.executable, "-c", _BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        for pause in (0.1, 1.2, 0.0):  # the second counts as the first
            process.send_signal(number)
            time.sleep(pause)
        _, said = process.communicate(timeout=10)
    assert process.returncode == code
    assert f"a second signal, {number.name}: ended without saving" in said


def test_another_signal_is_no_request():
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with StopRequest() as stop:
            send(signal.SIGUSR1)
            time.sleep(0.05)
            assert stop.reached() is None
    finally:
        signal.signal(signal.SIGUSR1, before)


class Threads:
    """A group of which the test speaks for the others: what was sent, and what comes back."""

    process_id = 1

    def __init__(self):
        self.handlers, self.sent = {}, []

    def on(self, kind, handler):
        self.handlers[kind] = handler

    def send(self, kind, value):
        self.sent.append((kind, value))


def test_all_stop_at_the_first_place_that_none_has_passed():
    group = Threads()
    stop = StopRequest(group)
    for _ in range(3):
        assert stop.reached() is None
    group.handlers["stop"](0, "SIGTERM")
    assert group.sent == [("gather for stop", [3, False])]
    group.handlers["gather for stop"](0, [[5, False], [3, False]])
    assert [stop.reached() for _ in range(4)] == [None, None, "SIGTERM", "SIGTERM"]


def test_a_second_request_changes_nothing():
    group = Threads()
    stop = StopRequest(group)
    for name in ("SIGINT", "SIGTERM"):
        group.handlers["stop"](0, name)
    assert len(group.sent) == 1
    assert stop.name == "SIGINT"
