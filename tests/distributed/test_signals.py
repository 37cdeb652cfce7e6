"""Requests to stop in one process; several processes and exits by a signal are in test_distributed.py."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest

from nextllm_jax.distributed import signals
from nextllm_jax.distributed.signals import StopRequest
from tests.test_standard_streams import stream_to


@pytest.fixture(autouse=True)
def usual_handlers():
    """As in the foreground: a job in the background of a script ignores SIGINT, and one under nohup SIGHUP."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    """The time that signals come at, as the test sets it."""
    now = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(signals, "time", types.SimpleNamespace(monotonic=lambda: now.now))
    return now


def send(number):
    os.kill(os.getpid(), number)


def reached_within_seconds(stop, seconds=60):
    deadline = time.monotonic() + seconds
    while not (name := stop.reached()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_request_by_name(number):
    before, wakeup = signal.getsignal(number), signal.set_wakeup_fd(-1)
    with StopRequest() as stop:
        assert stop.reached() is None
        send(number)
        assert reached_within_seconds(stop) == stop.name == signal.Signals(number).name
        assert stop.reached() == stop.name
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(wakeup) == -1


def test_signals_at_once_are_one_request(clock):
    with StopRequest() as stop:
        send(signal.SIGTERM)
        assert reached_within_seconds(stop) == "SIGTERM"
        send(signal.SIGTERM)  # would end this process
        assert stop.reached() == "SIGTERM"


def test_signals_at_once_are_one_request_when_python_learns_of_them_late(clock):
    """A long call into C++ holds up the handlers, and when it returns the second is no more insistent than before."""
    with StopRequest() as stop:
        send(signal.SIGINT)
        assert reached_within_seconds(stop) == "SIGINT"
        clock.now = 5.0
        stop._handle(signal.SIGINT, None)


def test_a_second_ctrl_c_does_not_wait(clock):
    with StopRequest() as stop:
        send(signal.SIGINT)
        assert reached_within_seconds(stop) == "SIGINT"
        clock.now = 5.0
        with pytest.raises(KeyboardInterrupt):
            send_and_wait(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def send_and_wait(number):
    """A signal may come to another thread first, and to this one later than `send` returns."""
    send(number)
    for _ in range(6000):
        time.sleep(0.01)


def test_a_hangup_after_a_request_leaves_the_time_to_save(clock):
    with StopRequest() as stop:
        send(signal.SIGTERM)
        assert reached_within_seconds(stop) == "SIGTERM"
        clock.now = 5.0
        send(signal.SIGHUP)  # would end this process
    assert stop.name == "SIGTERM"


def test_nohup_keeps_its_promise_and_ctrl_c_still_stops():
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop:
        send(signal.SIGHUP)
        send(signal.SIGINT)
        assert reached_within_seconds(stop) == "SIGINT"
    assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_leaves_is_a_request(monkeypatch, clock, name):
    reader, writer = os.pipe()
    stream_to(monkeypatch, name, writer)
    with StopRequest() as stop:
        os.close(reader)
        print("not read", file=getattr(sys, name))
        assert reached_within_seconds(stop) == "SIGPIPE"
    os.close(writer)


_BUSY = """
import time
from nextllm_jax.distributed.signals import StopRequest

with StopRequest(may_exit=True):
    print("here", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_later_signal_ends_a_command_and_says_what_is_lost(number, code):
    command = [sys.executable, "-c", _BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        while process.poll() is None:  # those of the first second are one
            process.send_signal(number)
            time.sleep(0.1)
        said = process.stderr.read()
    assert process.returncode == code
    assert f"second signal {number.name}: exiting without saving" in said


_ENDING = """
import time
from nextllm_jax.distributed.signals import StopRequest

with StopRequest(may_exit=True):
    pass
print("here", flush=True)
time.sleep(1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_command_that_has_finished_does_not_change_its_exit_code(number):
    with subprocess.Popen([sys.executable, "-c", _ENDING], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(number)
    assert process.returncode == 0


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
