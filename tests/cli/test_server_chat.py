"""What `nextllm chat --server` says when the other side is no server, or goes away."""

import socket
import threading

import pytest

from nextllm_jax.cli.server_chat import ServerConversation
from nextllm_jax.errors import RunFailed

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"finish_reason": null, "delta": {"content": "x"}}]}\n\n'
ANSWERS = {
    "no HTTP": (b"SSH-2.0-x\r\n", "cannot be reached"),
    "no JSON": (b"HTTP/1.1 200 OK\r\n\r\ndata: {x\n\n", "cannot be reached"),
    "a page": (b"HTTP/1.1 200 OK\r\n\r\n<html>", "ended before the answer did"),
    "no end": (b"HTTP/1.1 200 OK\r\n\r\n" + EVENT, "ended before the answer did"),
    "half a chunk": (CHUNKED + b"99\r\n" + EVENT, "cannot be reached"),
}


def say(url: str) -> str:
    return "".join(ServerConversation(url, model=None, system=None, settings={"max_tokens": None}).say("hello"))


@pytest.mark.parametrize(("answer", "message"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_none_is_a_sentence(answer, message):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once() -> None:
            connection, _ = listener.accept()
            with connection:
                request = b""
                while b"hello" not in request:  # unread bytes would reset the connection
                    request += connection.recv(2**16)
                connection.sendall(answer)

        thread = threading.Thread(target=answer_once)
        thread.start()
        with pytest.raises(RunFailed, match=message) as error:
            say(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:port", "http://[::1", "http://a b"])
def test_an_address_that_is_none_is_a_sentence(url):
    with pytest.raises(RunFailed, match="cannot be reached"):
        say(url)
