"""A server under load, with hostile clients, and with faults: processes that are killed, files that disappear."""

import asyncio
import json
import random
import shutil
import signal
import string
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="pip install '.[serve]'")
pytest.importorskip("jinja2", reason="pip install '.[interop]'")
pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.models import make_llm, serving, write_run
from tests.serving.processes import KEY, NEVER_STOP, Server, until

pytestmark = pytest.mark.slow

NUM_CLIENTS, ROUNDS = 200, 20
PROMPTS = [f"prompt {i}" for i in range(20)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("load")
    write_run(directory / "bytes")
    return directory


@pytest.fixture
def server(directory, compilation_cache):
    with Server(directory, compilation_cache, "--max-waiting", "16") as server:
        yield server


def body_of(prompt: str) -> dict:
    return {"prompt": prompt, "seed": PROMPTS.index(prompt), "max_tokens": 24}


async def exchange(server: Server, content: bytes, *, read=None) -> tuple[int, bytes]:
    """The status and the body of an answer to a request; `read` reads it instead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        head += f"Authorization: Bearer {KEY}\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        if read is not None:
            return 0, await read(reader)
        answer = await reader.read()
        return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]
    finally:
        writer.close()


async def honest(server: Server, rng: random.Random, expected: dict[str, str]) -> None:
    """Ask until there is room."""
    prompt = rng.choice(PROMPTS)
    while True:
        status, answer = await exchange(server, json.dumps(body_of(prompt)).encode())
        if status == 200:
            assert json.loads(answer)["choices"][0]["text"] == expected[prompt]
            return
        assert status == 429, answer
        await asyncio.sleep(rng.random() / 5)


async def hostile(server: Server, rng: random.Random) -> None:
    """Leave, read slowly, or send garbage."""
    stream = json.dumps({"prompt": "x", "stream": True, "max_tokens": 500, "logit_bias": NEVER_STOP}).encode()
    kind = rng.randrange(5)

    async def leave(reader: asyncio.StreamReader) -> bytes:
        return await reader.read(1)

    async def read_slowly(reader: asyncio.StreamReader) -> bytes:
        for _ in range(3):
            await reader.read(1)
            await asyncio.sleep(1)
        return b""

    if kind <= 1:
        await exchange(server, stream, read=leave if kind == 0 else read_slowly)
        return
    content = [b'{"prompt": "' + b"a" * 2**20 + b'"}', b'{"prompt": [1, ', b'{"prompt": "\xff\xfe"}'][kind - 2]
    try:
        status, answer = await exchange(server, content)
    except ConnectionError:  # the rest of a body that is too large is not read
        assert kind == 2
        return
    assert status == (413 if kind == 2 else 400)
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


async def load(server: Server, expected: dict[str, str], rounds: int) -> None:
    async def client(number: int) -> None:
        rng = random.Random(number)
        for _ in range(rounds):
            await (hostile(server, rng) if number % 5 == 0 else honest(server, rng, expected))

    await asyncio.gather(*map(client, range(NUM_CLIENTS)))


def used(server: Server) -> tuple[int, int]:
    """Resident bytes of the server, and its open files and sockets."""
    process = Path("/proc", str(server.process.pid))
    resident = int((process / "statm").read_text().split()[1]) * 4096
    return resident, len(list((process / "fd").iterdir()))


def ask(server: Server, body: dict) -> dict:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def test_honest_clients_get_their_answers_among_hostile_ones(server):
    expected = {prompt: ask(server, body_of(prompt))["choices"][0]["text"] for prompt in PROMPTS}
    _, files = used(server)
    asyncio.run(load(server, expected, ROUNDS // 2))
    until(server.idle)
    first, _ = used(server)
    asyncio.run(load(server, expected, ROUNDS // 2))
    until(server.idle)
    until(lambda: used(server)[1] <= files)
    resident, _ = used(server)
    assert resident < 1.1 * first
    assert ask(server, body_of(PROMPTS[0]))["choices"][0]["text"] == expected[PROMPTS[0]]
    assert "Traceback" not in "".join(server.log)


def test_a_killed_server_starts_again_with_the_same_answers(directory, compilation_cache):
    with Server(directory, compilation_cache) as server:
        expected = ask(server, body_of(PROMPTS[0]))
        with server.send({"prompt": "x", "stream": True, "max_tokens": 1000, "logit_bias": NEVER_STOP}) as connection:
            connection.recv(1)
            server.process.kill()
            server.wait()
        with Server(directory, compilation_cache, port=server.port) as again:
            assert ask(again, body_of(PROMPTS[0]))["choices"] == expected["choices"]


def test_sigterm_under_load_ends_at_the_limit(directory, compilation_cache):
    """Requests that take longer are cut off, those of clients that read nothing too, and the exit code is 0."""
    with Server(directory, compilation_cache, "--drain-seconds", "1") as server:
        bodies = [{"prompt": "x", "n": 2, "max_tokens": 1000, "logit_bias": NEVER_STOP, "stream": i % 2 == 0,
                   "logprobs": 20} for i in range(30)]  # fmt: skip
        connections = [server.send(body) for body in bodies]
        until(lambda: server.metrics()["nextllm_slots_used"] == 4)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        for connection in connections:
            connection.close()


def test_a_model_that_disappears_is_served_until_the_end(directory, compilation_cache, tmp_path):
    shutil.copytree(directory / "bytes", tmp_path / "bytes")
    with Server(tmp_path, compilation_cache) as server:
        expected = ask(server, body_of(PROMPTS[1]))
        shutil.rmtree(tmp_path / "bytes")
        assert ask(server, body_of(PROMPTS[1]))["choices"] == expected["choices"]
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_lowercase, max_size=3), inner),
    max_leaves=5,
)
FIELDS = {
    "model": st.sampled_from(["bytes", "other"]),
    "prompt": st.text(max_size=5) | st.lists(st.integers(-1, 270), max_size=4),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "x"]), "content": st.text()}),
        max_size=3,
    ),
    "max_tokens": st.integers(-1, 12),
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(-1, 2),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 3),
    "presence_penalty": st.floats(-3, 3),
    "logit_bias": st.dictionaries(st.integers(-1, 270).map(str) | st.text(max_size=2), st.floats(-101, 101)),
    "n": st.integers(0, 5),
    "seed": st.integers(-1, 2**33),
    "stop": st.text(max_size=2) | st.lists(st.text(max_size=2), max_size=3),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "top_logprobs": st.integers(-1, 21),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "min_tokens": st.integers(0, 9),
    "tools": st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=2), max_size=2),
    "response_format": st.fixed_dictionaries(
        {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": JSON})}
    ),
}
WITH_PROMPT = {"prompt": st.text(max_size=5), "messages": st.just([{"role": "user", "content": "x"}])}
VALID = {name: values for name, values in FIELDS.items() if name not in WITH_PROMPT}
BODIES = st.fixed_dictionaries(WITH_PROMPT, optional=VALID) | st.fixed_dictionaries(
    {}, optional={name: values | JSON for name, values in FIELDS.items()}
)


@pytest.fixture(scope="module")
def client():
    with serving({"bytes": make_llm()}) as client:
        yield client


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]), body=BODIES)
def test_any_body_gets_an_answer_or_an_error(client, path, body):
    wanted = "prompt" if path == "/v1/completions" else "messages"
    body = {key: value for key, value in body.items() if key not in {"prompt", "messages"} - {wanted}}
    check(client.post(path, json=body))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_get_an_error(client, content):
    response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    check(response)


def check(response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code == 200:
        assert response.text.endswith("data: [DONE]\n\n") or json.loads(response.text)
    else:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
