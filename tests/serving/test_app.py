"""The server's answers against those of the LLM, and what it says to requests that it cannot answer."""

import json
import threading
import time
from typing import Any

import pytest

pytest.importorskip("starlette", reason="pip install '.[serve]'")
pytest.importorskip("jinja2", reason="pip install '.[interop]'")
from nextllm_jax.config import SamplingConfig
from nextllm_jax.inference.scheduler import Scheduler
from nextllm_jax.serving.metrics import Metrics
from nextllm_jax.serving.worker import Worker
from nextllm_jax.tokenizer.chat import ChatTemplate
from tests.serving.models import LENGTH, SLOTS, WAITING, make_llm, serving

USER = [{"role": "user", "content": "x"}]
NO_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "wizard"}}}
DEEP = '{"a":' + "[" * 900 + "]" * 900 + "}"
CALL_OF_DEEP_ARGUMENTS = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OPENAI = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def llm():
    return make_llm()


@pytest.fixture(scope="module")
def client(llm):
    with serving({"bytes": llm}) as client:
        yield client


def post(client, path, **body) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client, path, **body) -> list[dict[str, Any]]:
    """The events of a streamed answer."""
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    *events, last, end = response.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def metric(client, name) -> float:
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"nextllm_{name}{{")]
    return float(line.split()[-1])


REQUESTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"temperature": 0}, {"temperature": 0}),
    ({"n": 3, "top_k": 9}, {"num_samples": 3, "top_k": 9}),
    ({"stop": ["a", "e"]}, {"stop": ["a", "e"]}),
    ({"stop": "o"}, {"stop": "o"}),
    ({"presence_penalty": 1.5, "frequency_penalty": 1}, {"presence_penalty": 1.5, "frequency_penalty": 1.0}),
    ({"logit_bias": {"97": 8, "98": -100}}, {"logit_bias": ("97:8", "98:-100")}),
    ({"repetition_penalty": 1.5, "top_p": 0.8}, {"repetition_penalty": 1.5, "top_p": 0.8}),
    ({"min_p": 0.05, "min_tokens": 7}, {"min_p": 0.05, "min_new_tokens": 7}),
    ({"logprobs": 3, "stop": "e"}, {"top_logprobs": 3, "stop": "e"}),
]


@pytest.mark.parametrize(("asked", "same"), REQUESTS, ids=[str(sorted(asked)) for asked, _ in REQUESTS])
def test_completions_are_those_of_generate(llm, client, asked, same):
    prompts = ["hello", "", "über and over"]
    body = {"model": "bytes", "prompt": prompts, "max_tokens": 24, "seed": 5, **asked}
    samples = llm.generate(prompts, max_new_tokens=24, seed=5, num_slots=SLOTS, **OPENAI | same)
    answer = post(client, COMPLETIONS, **body)
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(samples)))
    assert [choice["text"] for choice in answer["choices"]] == [sample.text for sample in samples]
    assert [choice["finish_reason"] for choice in answer["choices"]] == [sample.finish_reason for sample in samples]
    assert answer["usage"]["completion_tokens"] == sum(len(sample.tokens) for sample in samples)
    assert answer["usage"]["prompt_tokens"] == sum(len(llm.tokenizer.encode_prompt(prompt)) for prompt in prompts)
    *events, usage = stream(client, COMPLETIONS, **body, stream_options={"include_usage": True})
    assert usage["choices"] == []
    assert usage["usage"] == answer["usage"]
    choices = [choice for event in events for choice in event["choices"]]
    for index, choice in enumerate(answer["choices"]):
        own = [each for each in choices if each["index"] == index]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        if "logprobs" in asked:
            expected = samples[index].logprobs
            assert expected is not None
            for logprobs in (choice["logprobs"], joined([each["logprobs"] for each in own])):
                assert logprobs["token_logprobs"] == pytest.approx([each.logprob for each in expected], abs=1e-5)
                assert logprobs["tokens"] == [llm.tokenizer.decode([each.id]) for each in expected]
                best = [max(top.values()) for top in logprobs["top_logprobs"]]
                assert best == pytest.approx([each.top[0][1] for each in expected], abs=1e-5)
                assert logprobs["text_offset"][0] == len(prompts[index])


def joined(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}


def test_a_stop_string_within_a_chunk_ends_the_log_probabilities(llm, client):
    body = {"prompt": "a", "seed": 1, "max_tokens": 24, "logprobs": 0}
    whole = post(client, COMPLETIONS, **body)["choices"][0]
    tokens = whole["logprobs"]["tokens"]
    place = next(i for i in range(10, 24) if (i + 1) % 8 and tokens[i] not in tokens[:i] and tokens[i].isascii())
    (choice,) = post(client, COMPLETIONS, **body, stop=tokens[place])["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == tokens[: place + 1]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(whole["logprobs"]["token_logprobs"][: place + 1])


def test_prompts_may_be_token_ids(llm, client):
    tokens = [256, 104, 105]
    text = llm.generate("hi", max_new_tokens=16, seed=1, num_slots=SLOTS, **OPENAI)[0].text
    for prompt in ("hi", tokens, [tokens]):
        assert post(client, COMPLETIONS, prompt=prompt, seed=1)["choices"][0]["text"] == text
    assert len(post(client, COMPLETIONS, prompt=[tokens, [256]])["choices"]) == 2


def test_seeds_are_random_if_none_is_given(client):
    texts = {post(client, COMPLETIONS, prompt="a")["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


MESSAGES = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "tool_call_id": "x", "content": "3"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def test_chats_are_those_of_the_template(llm, client):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "two parts"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_call_id": "x", "content": "3"},
    ]
    template = ChatTemplate(llm.tokenizer)
    for tools, choice in ((None, "auto"), (TOOLS, "auto"), (TOOLS, "none")):
        prompt = template.encode(messages, tools=tools if choice == "auto" else None)
        pieces = llm.stream_tokens(
            [prompt], texts=[""], max_new_tokens=12, sampling=SamplingConfig(**OPENAI), seed=3, top_logprobs=2,
            engine=llm.engine(SLOTS, LENGTH),
        )  # fmt: skip
        (sample,) = [piece.sample for piece in pieces if piece.sample is not None]
        body = {"messages": MESSAGES, "max_tokens": 12, "seed": 3, "logprobs": True, "top_logprobs": 2}
        body |= {"tools": tools, "tool_choice": choice} if tools else {}
        answer = post(client, CHAT, **body)
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        assert answer["choices"][0]["message"]["content"] == sample.text
        shown = [each["logprob"] for each in answer["choices"][0]["logprobs"]["content"]]
        assert shown == pytest.approx([each.logprob for each in sample.logprobs or []], abs=1e-5)
        first, *events = stream(client, CHAT, **body)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == sample.text
    assert post(client, "/tokenize", messages=MESSAGES)["tokens"] == template.encode(messages)


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


def test_an_answer_follows_its_format(llm, client):
    pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    body = {"messages": USER, "seed": 2, "n": 3, "max_tokens": 100}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answer = post(client, CHAT, **body, response_format=schema)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    prompt = ChatTemplate(llm.tokenizer).encode(USER)
    pieces = llm.stream_tokens(
        [prompt] * 3, texts=[""] * 3, samples=range(3), seed=2, max_new_tokens=100,
        sampling=SamplingConfig(**OPENAI, json_schema=json.dumps(SCHEMA)), engine=llm.engine(SLOTS, LENGTH),
    )  # fmt: skip
    samples = {piece.row: piece.sample for piece in pieces if piece.sample is not None}
    assert texts == [samples[row].text for row in range(3)]
    assert all(json.loads(text)["a"] in (1, 2) for text in texts if samples[texts.index(text)].finish_reason == "stop")
    assert any(choice["finish_reason"] == "stop" for choice in answer["choices"])
    events = stream(client, CHAT, **body, response_format=schema)
    shown = [choice for event in events for choice in event["choices"] if choice["index"] == 1]
    assert "".join(choice["delta"].get("content", "") for choice in shown) == texts[1]
    whole = post(client, COMPLETIONS, prompt="x", response_format={"type": "json_object"}, max_tokens=5, seed=1)
    assert whole["choices"][0]["text"].lstrip().startswith("{")


def test_an_answer_without_a_limit_ends_at_the_end_of_the_slot(client):
    bias = {"257": -100, "259": -100}
    answer = post(client, CHAT, messages=[{"role": "user", "content": "x"}], logit_bias=bias)
    assert answer["usage"]["total_tokens"] == LENGTH
    assert answer["choices"][0]["finish_reason"] == "length"
    assert post(client, COMPLETIONS, prompt="x", logit_bias=bias)["usage"]["completion_tokens"] == 16


def test_echo_scores_the_prompt(llm, client):
    text = "a text to score"
    score = llm.score(text)
    answer = post(client, COMPLETIONS, prompt=text, echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == text
    assert answer["usage"]["completion_tokens"] == 0
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(score.logprobs[:-1], abs=1e-5)
    assert choice["logprobs"]["text_offset"][-1] == len("<s>" + text) - 1
    logits = llm.logits([llm.tokenizer.encode_prompt(text)])[0]
    for i, (value, top) in enumerate(
        zip(choice["logprobs"]["token_logprobs"][1:], choice["logprobs"]["top_logprobs"][1:], strict=True)
    ):
        is_greedy = int(logits[i, : llm.tokenizer.vocab_size].argmax()) == llm.tokenizer.encode_prompt(text)[i + 1]
        assert (value == max(top.values())) == is_greedy
    more = post(client, COMPLETIONS, prompt=text, echo=True, logprobs=1, max_tokens=4, seed=2)["choices"][0]
    new = post(client, COMPLETIONS, prompt=text, logprobs=1, max_tokens=4, seed=2)["choices"][0]
    assert more["text"] == text + new["text"]
    joint = choice["logprobs"]["token_logprobs"] + new["logprobs"]["token_logprobs"]
    assert more["logprobs"]["token_logprobs"][1:] == pytest.approx(joint[1:], abs=1e-5)
    events = stream(client, COMPLETIONS, prompt=text, echo=True, logprobs=1, max_tokens=4, seed=2)
    assert "".join(event["choices"][0]["text"] for event in events) == more["text"]
    assert joined([event["choices"][0]["logprobs"] for event in events])["token_logprobs"][1:] == pytest.approx(
        joint[1:], abs=1e-5
    )


def test_other_endpoints(llm, client):
    tokens = post(client, "/tokenize", prompt="héllo")["tokens"]
    assert tokens == llm.tokenizer.encode_prompt("héllo")
    assert post(client, "/tokenize", prompt="héllo", add_special_tokens=False)["tokens"] == tokens[1:]
    assert post(client, "/detokenize", tokens=tokens[1:])["prompt"] == "héllo"
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>"
    assert post(client, "/tokenize", prompt=info["eos_token"], add_special_tokens=False)["tokens"] == [257]
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["bytes"]
    assert client.get("/v1/models/bytes").json()["max_model_len"] == LENGTH
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": "http://x"}).headers


def test_the_page_needs_no_key_and_gives_its_own_files_only(llm):
    with serving({"bytes": llm}, keys=["k"]) as client:
        for path in ("/", "/status", "/page/chat.js"):
            assert client.get(path).status_code == 200
        for path in ("/page/nothing", "/page/%2e%2e/pages.py"):
            assert client.get(path).status_code == 404


WRONG: list[tuple[str, Any, int, str | None]] = [
    (COMPLETIONS, {"prompt": "a", "temprature": 1}, 400, "temprature"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "best_of"),
    (COMPLETIONS, {}, 400, "prompt"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [264]}, 400, None),
    (COMPLETIONS, {"prompt": [-1]}, 400, None),
    (COMPLETIONS, {"prompt": [2**70]}, 400, None),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, None),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**9}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a" * LENGTH}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a", "n": SLOTS + WAITING + 1}, 400, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 1000}, 400, "n"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": 3}, 400, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p"),
    (COMPLETIONS, {"prompt": "a", "seed": 2**32}, 400, "seed"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, 400, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": "x" * 257}, 400, "stop.0"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, 400, "stop.0"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"a": 1}}, 400, None),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"260": 1}}, 400, None),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 1000}}, 400, "logit_bias.1"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"1" * 5000: 1}}, 400, None),
    (COMPLETIONS, {"prompt": "a", "model": "other"}, 404, "model"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"type": "xml"}}, 400, "response_format.type"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"type": "json_schema"}}, 400, "response_format"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"json_schema": {"schema": {}}}}, 400, "response_format"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "response_format": NO_SCHEMA}, 400, "response_format"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"usage": True}}, 400, "stream_options.usage"),
    (COMPLETIONS, [1], 400, None),
    (COMPLETIONS, b"{", 400, None),
    (COMPLETIONS, b'{"prompt": "\xff"}', 400, None),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, None),
    (COMPLETIONS, b"[" * 5000, 400, None),
    (COMPLETIONS, b'{"prompt": "' + b"a" * 10_000 + b'"}', 413, None),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0"),
    (CHAT, {"messages": [CALL_OF_DEEP_ARGUMENTS]}, 400, None),
    (CHAT, {"messages": USER, "top_logprobs": 3}, 400, None),
    (CHAT, {"messages": USER, "tool_choice": "required", "tools": TOOLS}, 400, "tool_choice"),
    (CHAT, {"messages": USER, "max_completion_tokens": 10**6}, 400, "messages"),
    ("/tokenize", {}, 400, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), WRONG, ids=[f"{row[1]!r:.50}" for row in WRONG])
def test_a_wrong_request_gets_openais_error_object(client, path, body, status, param):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert "\n" not in error["message"]
    assert param is None or error["param"] == param


def test_a_chat_without_a_template_names_the_other_endpoint():
    with serving({"bytes": make_llm(None)}) as client:
        response = client.post(CHAT, json={"messages": USER})
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "bytes has no chat template; use /v1/completions"


def test_paths_methods_and_types(client):
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get(COMPLETIONS).status_code == 405
    assert client.get("/v1/models/other").status_code == 404
    form = client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert form.status_code == 415
    assert post(client, COMPLETIONS, prompt="a", stop=None, logit_bias=None, seed=None)["choices"]


def test_keys(llm):
    with serving({"bytes": llm}, keys=["sécret", "other"]) as client:
        for path in ("/v1/models", "/v1/models/bytes", "/tokenizer_info"):
            assert client.get(path).status_code == 401
        for given in ("", "Bearer", "Bearer wrong", "Bearer ", "Basic other", "other"):
            response = client.post(COMPLETIONS, json={"prompt": "a"}, headers={"Authorization": given})
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for key in ("sécret", "other"):
            header = {"Authorization": f"Bearer {key}".encode()}
            assert client.post(COMPLETIONS, json={"prompt": "a"}, headers=header).status_code == 200
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200


HOSTS = {
    "localhost": True, "LOCALHOST:8000": True, "127.0.0.1:8000": True, "127.1.2.3": True, "[::1]:8000": True,
    "": False, "evil.example:8000": False, "localhost.evil.example": False, "127.0.0.1.evil.example": False,
    "evil@localhost.evil.example": False, "10.0.0.1": False, "0.0.0.0:8000": False, "[::1": False, "[::2]": False,
}  # fmt: skip


def test_a_local_server_answers_to_names_of_this_machine_only(llm):
    with serving({"bytes": llm}, local_only=True) as client:
        for path in ("/v1/models", "/", "/page/chat.js", "/metrics"):
            got = {host: client.get(path, headers={"Host": host}).status_code == 200 for host in HOSTS}
            assert got == HOSTS
        refused = client.post(COMPLETIONS, json={"prompt": "a"}, headers={"Host": "evil.example"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, None)


def test_several_models(llm):
    with serving({"one": llm, "two": make_llm(None)}) as client:
        response = client.post(COMPLETIONS, json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
        for name in ("one", "two"):
            assert post(client, COMPLETIONS, model=name, prompt="a")["model"] == name
        response = client.post(CHAT, json={"model": "two", "messages": USER})
        assert response.status_code == 400
        assert "chat template" in response.json()["error"]["message"]


@pytest.fixture
def held(monkeypatch):
    """An event that the engines wait for before each chunk."""
    go = threading.Event()
    advance = Scheduler.advance

    def wait(self, *args):
        assert go.wait(60)
        return advance(self, *args)

    go.set()
    monkeypatch.setattr(Scheduler, "advance", wait)
    yield go
    go.set()


def in_threads(*calls) -> list[threading.Thread]:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def until(condition) -> None:
    while not condition():
        time.sleep(0.01)


def test_a_full_queue_is_429(llm, held):
    with serving({"bytes": llm}) as client:
        held.clear()
        answers = []
        row = {"prompt": "a", "n": SLOTS + WAITING, "seed": 1}
        threads = in_threads(lambda: answers.append(client.post(COMPLETIONS, json=row)))
        worker = client.models["bytes"].worker
        until(lambda: worker._num_rows == SLOTS + WAITING)
        for stream_too in (False, True):
            refused = client.post(COMPLETIONS, json={"prompt": "b", "stream": stream_too})
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert refused.json()["error"]["type"] == "rate_limit_error"
        held.set()
        threads[0].join()
        assert len(answers[0].json()["choices"]) == SLOTS + WAITING
        assert post(client, COMPLETIONS, prompt="b")["choices"]
        assert worker._num_rows == 0


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_that_takes_too_long_ends_and_frees_its_slot(llm, held, streams):
    with serving({"bytes": llm}, seconds=0.5) as client:
        held.clear()
        response = client.post(COMPLETIONS, json={"prompt": "a", "stream": streams})
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        held.set()
        assert post(client, COMPLETIONS, prompt="a")["choices"]
        assert client.models["bytes"].worker._num_rows == 0


def test_a_failing_step_fails_its_rows_and_no_others(llm, monkeypatch, caplog):
    """The rows in slots get 500. Those that wait go on in a new engine, and so does the server."""
    expected = llm.generate("w", max_new_tokens=16, seed=4, num_slots=SLOTS, **OPENAI)[0].text
    with serving({"bytes": llm}) as client:
        entered, go = threading.Event(), threading.Event()
        advance = Scheduler.advance
        failures = [RuntimeError("a kernel failed")]

        def fail_once(self, *args):
            outputs = advance(self, *args)
            entered.set()
            assert go.wait(60)
            if failures and self.waiting:
                raise failures.pop()
            return outputs

        monkeypatch.setattr(Scheduler, "advance", fail_once)
        answers: dict[str, Any] = {}
        bias = {"257": -100, "259": -100}
        first = {"prompt": "a secret", "n": SLOTS, "max_tokens": 64, "logit_bias": bias}
        second = {"prompt": "w", "seed": 4}
        threads = in_threads(lambda: answers.update(first=client.post(COMPLETIONS, json=first)))
        assert entered.wait(60)
        threads += in_threads(lambda: answers.update(second=client.post(COMPLETIONS, json=second)))
        worker = client.models["bytes"].worker
        until(lambda: worker._num_rows == SLOTS + 1)
        go.set()
        for thread in threads:
            thread.join()
        assert answers["first"].status_code == 500
        assert answers["first"].json()["error"]["type"] == "server_error"
        assert answers["second"].json()["choices"][0]["text"] == expected
        assert post(client, COMPLETIONS, **second)["choices"][0]["text"] == expected
        assert client.get("/health").status_code == 200
        assert "a kernel failed" in caplog.text
        assert "secret" not in caplog.text
        assert worker._num_rows == 0


def test_a_warm_up_compiles_all_batch_sizes(llm):
    metrics = Metrics().of_model("warm")
    worker = Worker(llm, num_slots=SLOTS, max_length=LENGTH, max_waiting=0, metrics=metrics, warm_up=True)
    assert worker._scheduler is not None
    compiled = [name.split()[2] for name in worker._scheduler.engine.programs if name.startswith("decoding of")]
    assert compiled == ["1", "2", "4"]
    worker.close(10)


def test_metrics_count_what_happens(llm):
    with serving({"bytes": llm}) as client:
        bias = {"257": -100, "259": -100}
        for _ in range(2):
            post(client, COMPLETIONS, prompt="a" * 40, max_tokens=20, logit_bias=bias)
        client.post(COMPLETIONS, json={})
        text = client.get("/metrics").text
        assert 'nextllm_requests_total{endpoint="/v1/completions",status="200"} 2.0' in text
        assert 'nextllm_requests_total{endpoint="/v1/completions",status="400"} 1.0' in text
        assert metric(client, "prompt_tokens_total") == 2 * 41
        assert metric(client, "prompt_tokens_read_total") == 40  # the second finds its prompt in the cache
        assert metric(client, "new_tokens_total") == 2 * 20
        assert metric(client, "slots") == SLOTS
        assert metric(client, "slots_used") == metric(client, "waiting_rows") == metric(client, "cache_used_ratio") == 0
        assert metric(client, "time_to_first_token_seconds_count") == 2
        assert metric(client, "time_per_token_seconds_count") == 2
