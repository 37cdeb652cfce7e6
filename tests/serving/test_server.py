"""One server process, as OpenAI's client, browsers that leave, slow readers and `nextllm chat --server` use it."""

import os
import signal
import socket
from unittest.mock import MagicMock

import pytest

import nextllm_jax
from nextllm_jax.cli.main import COMMANDS
from nextllm_jax.config import SamplingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.inference.chat import Conversation
from tests.serving.processes import KEY, NEVER_STOP, NUM_SLOTS, Server, until

openai = pytest.importorskip("openai", reason="pip install '.[test]'")
pytest.importorskip("starlette", reason="pip install '.[serve]'")
pytest.importorskip("jinja2", reason="pip install '.[interop]'")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    from tests.serving.models import write_run

    directory = tmp_path_factory.mktemp("server")
    write_run(directory / "bytes")
    return directory


@pytest.fixture(scope="module")
def server(directory, compilation_cache):
    with Server(directory, compilation_cache) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def llm(directory):
    return nextllm_jax.load(directory / "bytes")


def test_openais_client_completes(client):
    settings = {
        "model": "bytes", "prompt": ["one", "two"], "max_tokens": 20, "n": 2, "seed": 3, "stop": "e", "user": "someone",
        "temperature": 0.7, "top_p": 0.9, "logprobs": 2, "logit_bias": {}, "extra_body": {"top_k": 0, "min_tokens": 2},
    }  # fmt: skip
    answer = client.completions.create(**settings)
    assert len({choice.text for choice in answer.choices}) == 4
    for choice in answer.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) > 2
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in answer.choices)
    texts = [""] * 4
    for chunk in client.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_openais_client_chats(client, llm):
    talk = Conversation(llm, system="short", max_new_tokens=20, sampling=SamplingConfig(temperature=0), seed=1)
    expected = "".join(talk.say("hello"))
    settings = {
        "model": "bytes", "max_completion_tokens": 20, "temperature": 0, "seed": 1,
        "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}],
    }  # fmt: skip
    answer = client.chat.completions.create(**settings, logprobs=True, top_logprobs=1, response_format={"type": "text"})
    assert answer.choices[0].message.content == expected
    assert bytes(b for each in answer.choices[0].logprobs.content for b in each.bytes).decode(errors="replace")
    with_tools = client.chat.completions.create(
        **settings, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
    )
    assert with_tools.usage.prompt_tokens > answer.usage.prompt_tokens
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-1].usage == answer.usage


def test_openais_client_gets_its_own_errors(server, client):
    assert [model.id for model in client.models.list()] == ["bytes"]
    assert client.models.retrieve("bytes").owned_by == "nextllm_jax"
    with pytest.raises(openai.NotFoundError, match="the models are bytes"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="unknown field best_of"):
        client.completions.create(model="bytes", prompt="a", best_of=2)
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError, match="API key"):
        wrong.models.list()


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_slots(server, client, streams):
    client.completions.create(model="bytes", prompt="a", n=NUM_SLOTS)  # compiles
    before = server.metrics()["nextllm_new_tokens_total"]
    body = {"prompt": "a", "n": NUM_SLOTS, "max_tokens": 1000, "stream": streams, "logit_bias": NEVER_STOP}
    with server.send(body) as connection:
        if streams:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        until(lambda: server.metrics()["nextllm_slots_used"] == NUM_SLOTS)
    until(server.idle)
    assert server.metrics()["nextllm_new_tokens_total"] - before < NUM_SLOTS * 1000


def test_a_slow_reader_holds_up_no_other(server, client):
    body = {"prompt": "a", "max_tokens": 600, "stream": True, "logprobs": 20, "logit_bias": NEVER_STOP}
    with server.send(body) as slow:
        assert slow.recv(1)
        assert client.completions.create(model="bytes", prompt="a", max_tokens=40).choices[0].text
        until(server.idle)  # its text waits, and its slot is free
        received = b""
        while b"[DONE]" not in received[-100:]:
            received += slow.recv(2**16)


@pytest.mark.parametrize(
    "content",
    [b"\x16\x03\x01\x02\x00\x01", b"POST / HTTP/1.1\r\nHost: x\r\n" + b"a" * 99_999],
    ids=["TLS", "endless head"],
)
def test_no_http_ends_in_an_error(server, content):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(content)
        assert connection.recv(12).startswith(b"HTTP/1.1 4")


def test_chat_with_a_server_is_a_chat_with_its_model(server, llm, capsys, monkeypatch):
    monkeypatch.setenv("NEXTLLM_API_KEY", KEY)
    options = ["--server", server.url, "--system", "short", "--max-new-tokens", "24", "--seed", "3"]
    talk = Conversation(llm, system="short", max_new_tokens=24, seed=3)
    expected = "".join(talk.say("hello")) + "\n"
    assert COMMANDS["chat"]([*options, "--prompt", "hello", "--model", "bytes"]) == 0
    assert capsys.readouterr().out == expected
    lines = iter(["hello", "more", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert COMMANDS["chat"](options) == 0
    assert capsys.readouterr().out == expected + "".join(talk.say("more")) + "\n"
    with pytest.raises(InputError, match="the server says: there is no model 'other'"):
        COMMANDS["chat"]([*options, "--prompt", "x", "--model", "other"])
    schema = ["--prompt", "x", "--json-schema", '{"const": 17}', "--logit-bias", "97:1", "--min-new-tokens", "2"]
    assert COMMANDS["chat"]([*options, *schema]) == 0
    assert capsys.readouterr().out.strip() == "17"
    with pytest.raises(InputError, match="--json does not go with --server"):
        COMMANDS["chat"]([*options, "--json"])
    with pytest.raises(InputError, match="either --checkpoint PATH or --server URL"):
        COMMANDS["chat"](["--prompt", "x"])


START: dict[str, tuple[list[str], str]] = {
    "host": (["--checkpoint", "x", "--host", "0.0.0.0"], "other machines can reach --host 0.0.0.0"),
    "names": (["--checkpoint", "a/x", "--checkpoint", "x"], "two models have the name 'x'"),
    "no name": (["--checkpoint", "=x"], "must be PATH or NAME=PATH"),
    "no keys": (["--checkpoint", "x", "--api-key-file", os.devnull], "has no key"),
    "slots": (["--checkpoint", "x", "--num-slots", "0"], "num_slots is 0"),
    "no model": (["--checkpoint", "x", "--port", "0"], "x does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), START.values(), ids=START)
def test_what_cannot_start_is_a_sentence(arguments, message, monkeypatch):
    monkeypatch.delenv("NEXTLLM_API_KEY", raising=False)
    with pytest.raises(InputError, match=message):
        COMMANDS["serve"](arguments)


ACCESS = {"local": ([], None, 403), "no key": (["--no-key"], None, 200), "key": ([], "k", 200)}


@pytest.mark.parametrize(("arguments", "key", "status"), ACCESS.values(), ids=ACCESS)
def test_a_server_without_a_key_is_for_this_machine_only(arguments, key, status, monkeypatch):
    """An unknown Host is refused, unless there are keys or --no-key."""
    from starlette.testclient import TestClient

    monkeypatch.delenv("NEXTLLM_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("NEXTLLM_API_KEY", key)
    services = []
    monkeypatch.setattr("nextllm_jax.serving.server.serve", lambda service, *_, **__: services.append(service))
    monkeypatch.setattr("nextllm_jax.cli.serve.load_model", lambda *_: MagicMock())
    assert COMMANDS["serve"](["--checkpoint", "x", "--port", "0", *arguments]) == 0
    client = TestClient(services[0].app(), base_url="http://evil.example")
    assert client.get("/metrics").status_code == status


def test_a_port_in_use_and_several_processes_are_sentences(server, monkeypatch):
    with pytest.raises(InputError, match=f"--port {server.port} cannot be used"):
        COMMANDS["serve"](["--checkpoint", "x", "--port", str(server.port)])
    for name, value in {"JOB_ID": "1", "STEP_NUM_TASKS": "2", "STEP_NODELIST": "a", "PROCID": "0", "LOCALID": "0",
                        "NTASKS": "2", "STEP_NUM_NODES": "1"}.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(InputError, match="runs in one process, and this is one of 2"):
        COMMANDS["serve"](["--checkpoint", "x"])


def test_sigterm_lets_requests_end(server, client):
    """The last test: the server is gone after it."""
    body = {"prompt": "a", "max_tokens": 1000, "stream": True, "logit_bias": NEVER_STOP, "seed": 1}
    with server.send(body) as connection:
        received = connection.recv(1)
        server.process.send_signal(signal.SIGTERM)
        while part := connection.recv(2**16):
            received += part
    assert received.count(b'"finish_reason": "length"') == 1
    assert b"data: [DONE]" in received
    assert server.wait() == 0
    assert server.log[-1] == "the server has ended\n"
    assert "Traceback" not in "".join(server.log)
