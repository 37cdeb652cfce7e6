import os
import signal

import pytest

from nextllm_jax.training.signals import StopRequest


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_by_name(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.name is None
        send(number)
        assert stop.name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait():
    with StopRequest() as stop:
        send(signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
