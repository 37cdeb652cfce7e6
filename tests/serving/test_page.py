"""The pages in a browser: with `nextllm serve` as users have them, and with a server that says what a test wants."""

import json
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.serving.browser import ANSWERED, READY, chat, say

pytest.importorskip("starlette", reason="pip install '.[serve]'")
pytest.importorskip("jinja2", reason="pip install '.[interop]'")

from tests.serving.fake import Backend, running
from tests.serving.processes import KEY, NUM_SLOTS, Server, until

STORED = """Object.keys(localStorage).filter((key) => key.startsWith('nextllm.conversation.'))
    .map((key) => JSON.parse(localStorage[key]))"""


@pytest.fixture(scope="module")
def server(tmp_path_factory, compilation_cache) -> Iterator[Server]:
    from tests.serving.models import write_run

    directory = tmp_path_factory.mktemp("server")
    write_run(directory / "bytes")
    with Server(directory, compilation_cache) as server:
        yield server


def test_a_chat_by_keyboard_alone_is_what_the_server_answers(tab, server):
    tab.open(f"{server.url}/")
    tab.until("document.activeElement.name === 'key'")  # the server needs one
    assert "API key is missing" in tab.text("#settings-error")
    for text, field in ((KEY, "seed"), ("", "max_tokens"), ("30", "top_k"), ("", "top_p"), ("", "temperature"),
                        ("0", "system"), ("short", None)):  # fmt: skip
        tab.type(text)
        if field is not None:
            tab.press("Tab", shift=True)
            assert tab.run("document.activeElement.name") == field
    tab.press("Tab")
    tab.press("Enter")
    tab.until(READY)
    tab.type("one")
    tab.press("Enter", shift=True)
    tab.type("two")
    tab.press("Enter")
    tab.until(ANSWERED)

    body = {
        "temperature": 0, "max_tokens": 30,
        "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "one\ntwo"}],
    }  # fmt: skip
    with server.send(body, "/v1/chat/completions") as connection:
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(2**16)
    expected = json.loads(received.partition(b"\r\n\r\n")[2])["choices"][0]
    (conversation,) = tab.run(STORED)
    assert [each["content"] for each in conversation["messages"]] == ["one\ntwo", expected["message"]["content"]]
    assert tab.text(".assistant .note").startswith("30 tokens, ")
    assert "truncated at max tokens" in tab.text(".assistant .note")
    assert KEY not in json.dumps(tab.run("({...localStorage})"))
    shown = tab.text("#messages")
    tab.open(f"{server.url}/")
    tab.until(READY)
    assert tab.text("#messages") == shown


def test_the_status_page(tab, server):
    tab.open(f"{server.url}/status")
    tab.until("document.querySelector('section')")
    assert tab.text("#state") == "The server is ready."
    assert tab.text("h2") == "bytes"
    rows = dict(zip(tab.texts("dt"), tab.texts("dd"), strict=True))
    assert rows["Slots used"] == f"0 of {NUM_SLOTS}"
    assert int(rows["New tokens since the start"]) == server.metrics()["nextllm_new_tokens_total"]


def test_an_answer_comes_piece_by_piece_and_can_be_stopped(tab, backend):
    backend.text, backend.endless = "first half, second half. ", True
    backend.go_on.clear()
    tab.open(f"{backend.url}/")
    tab.until(READY)
    say(tab, "Hello")
    tab.until("document.querySelector('.assistant .content')?.innerText.includes('first half')")
    assert "second half" not in tab.text(".assistant .content")
    backend.go_on.set()
    tab.until("document.querySelector('.assistant .content').innerText.includes('second half')")
    tab.press("Escape")
    tab.until(ANSWERED)
    assert backend.left.wait(60)
    assert tab.text(".assistant .note") == "Stopped."
    (conversation,) = tab.run(STORED)
    assert conversation["messages"][1]["content"].startswith(backend.text)
    assert tab.run("document.activeElement.id") == "prompt"


@pytest.mark.slow
def test_leaving_a_conversation_stops_its_answer(tab, backend):
    backend.endless = True
    for leave in ("document.querySelector('#new').click()", "location.reload()"):
        backend.left.clear()
        tab.open(f"{backend.url}/")
        tab.until(READY)
        tab.click("#new")
        say(tab, "Hello")
        tab.until("document.querySelector('.assistant .content')?.innerText.includes('Hello.')")
        tab.run(leave)
        assert backend.left.wait(60)
        tab.until("document.readyState === 'complete'")  # of the page before, if it is not gone yet
        tab.until("document.querySelector('#stop')?.hidden && document.querySelector('#send')?.hidden === false")
    conversations = tab.run(STORED)
    assert [each["messages"][1]["note"] for each in conversations] == ["Stopped."] * 2
    assert all(each["messages"][1]["content"].startswith("Hello.") for each in conversations)


ERRORS = {
    "busy": ((429, {"error": {"message": "all slots are in use; try again"}}), "all slots are in use; try again"),
    "proxy": ((502, "<script>alert(1)</script>"), "The server answered with status 502"),
    "odd": ((500, {"detail": 1}), "The server answered with status 500"),
}


@pytest.mark.slow
def test_errors_are_readable_and_can_be_tried_again(tab, backend):
    for error, message in ERRORS.values():
        backend.error = error
        tab.open(f"{backend.url}/")
        tab.until(READY)
        tab.click("#new")
        say(tab, "Hello")
        tab.until("!document.querySelector('#error').hidden")
        assert message in tab.text("#error")
        assert tab.texts(".message") == ["Hello"]
    backend.error, backend.breaks = None, True
    assert tab.text("#regenerate") == "Try again"
    tab.click("#regenerate")
    tab.until("!document.querySelector('#error').hidden")
    assert tab.text("#error").endswith("The connection ended before the answer did.")
    assert tab.text(".assistant .note") == "Ended with an error."
    backend.breaks = False
    tab.click("#regenerate")
    tab.until("document.querySelector('.assistant .note').innerText.startsWith('12 tokens, ')")
    assert tab.run("document.querySelector('#error').hidden")
    backend.error = 503, {"error": {"message": "later"}}
    tab.click("#regenerate")
    tab.until("!document.querySelector('#error').hidden")
    assert tab.text(".assistant .content") == "Hello."  # the old answer stays


@pytest.mark.slow
def test_a_server_that_is_gone(tab):
    backend = Backend()
    with running(backend.app()) as backend.url:
        chat(tab, backend.url)
        tab.run("document.querySelector('footer a').remove()")
    say(tab, "more")
    tab.until("!document.querySelector('#error').hidden")
    assert tab.text("#error").endswith("The server cannot be reached.")


@pytest.mark.slow
def test_settings_are_sent_and_kept(tab, backend):
    chat(tab, backend.url)
    assert backend.bodies[0] == {
        "model": "first", "messages": [{"role": "user", "content": "Hello"}], "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    tab.run("document.querySelector('#open-settings').click()")
    tab.type("Be short.")
    fields = {"temperature": "0.5", "top_p": "0.9", "top_k": "4", "max_tokens": "7", "seed": "3"}
    for value in fields.values():
        tab.press("Tab")
        tab.type(value)
    tab.press("Enter")
    tab.run("""document.querySelector('#model').value = 'second';
        document.querySelector('#model').dispatchEvent(new Event('change'))""")
    tab.open(f"{backend.url}/")
    tab.until(READY)
    tab.click("#regenerate")
    until(lambda: len(backend.bodies) == 2)
    tab.until(ANSWERED)
    expected = {"model": "second"} | {name: float(value) for name, value in fields.items()}
    assert backend.bodies[1].items() >= expected.items()
    assert backend.bodies[1]["messages"] == [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}
    ]  # fmt: skip
    say(tab, "more")
    until(lambda: len(backend.bodies) == 3)
    assert [each["role"] for each in backend.bodies[2]["messages"]] == ["system", "user", "assistant", "user"]
    tab.until(ANSWERED)


@pytest.mark.slow
def test_conversations_by_keyboard(tab, backend):
    for message in ("one", "two"):
        tab.open(f"{backend.url}/")
        tab.until(READY)
        tab.run("document.querySelector('#new').focus()")
        tab.press("Enter")
        say(tab, message)
        tab.until(ANSWERED)
    assert tab.texts("#conversations .open") == ["two", "one"]
    tab.run("document.querySelector('#new').focus()")
    for _ in range(2):
        tab.press("Tab")
    tab.press("Enter")  # rename
    tab.type("<b>better</b>")
    tab.press("Enter")
    assert tab.texts("#conversations .open") == ["<b>better</b>", "one"]
    assert tab.run("document.activeElement.innerText") == "<b>better</b>"
    tab.press("Tab")
    tab.press("Enter")
    tab.type("other")
    tab.press("Escape")  # not renamed
    for key in ("Tab", "Tab", "Enter"):
        tab.press(key)
    assert tab.text("#confirm-text") == "Delete “<b>better</b>”?"
    tab.press("Escape")
    assert len(tab.run(STORED)) == 2
    tab.press("Enter")
    tab.press("Tab")
    tab.press("Enter")
    tab.until("document.querySelectorAll('#conversations li').length === 1")
    assert tab.texts(".message") == []
    tab.open(f"{backend.url}/")
    tab.until(READY)
    assert tab.texts(".message .content") == ["one", "Hello."]


@pytest.mark.slow
def test_what_another_page_wrote_into_the_storage_is_no_conversation(tab, backend):
    tab.open(f"{backend.url}/")
    for index, value in enumerate(("", "null", "[]", '{"id": "a"}', '{"id": "a", "messages": [{"role": "user"}]}')):
        tab.run(f"localStorage['nextllm.conversation.{index}'] = {json.dumps(value)}")
    tab.run("localStorage['nextllm.settings'] = '{'")
    chat(tab, backend.url)
    assert tab.texts("#conversations .open") == ["Hello"]
    tab.run("localStorage.clear()")


@pytest.mark.slow
def test_a_full_storage_is_a_sentence(tab, backend):
    tab.open(f"{backend.url}/")
    tab.run("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }")
    say(tab, "Hello")
    tab.until(ANSWERED)
    assert "its storage is full or off" in tab.text("#error")
    assert tab.texts(".message .content") == ["Hello", "Hello."]


@pytest.mark.slow
def test_a_model_without_a_chat_template_continues_text(tab):
    from tests.serving.models import make_llm, served_app

    with served_app({"plain": make_llm(None)}) as (app, models), running(app) as url:
        tab.open(f"{url}/")
        tab.until(READY)
        tab.run("localStorage['nextllm.settings'] = JSON.stringify({temperature: 0, max_tokens: 9, system: 'a '})")
        tab.open(f"{url}/")
        tab.until(READY)
        say(tab, "b")
        tab.until(ANSWERED)
        assert "plain has no chat template" in tab.text("#notice")
        llm = models["plain"].llm
        body = json.dumps({"prompt": "a b", "temperature": 0, "max_tokens": 9}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            expected = json.load(response)["choices"][0]["text"]
        assert llm.tokenizer.chat_template is None
        assert tab.run(STORED)[0]["messages"][1]["content"] == expected
        tab.run("localStorage.clear()")


METRICS = """# TYPE nextllm_slots gauge
nextllm_slots{model="a \\"b\\"\\\\"} 4.0
nextllm_slots_used{model="a \\"b\\"\\\\"} 3.0
nextllm_waiting_rows{model="a \\"b\\"\\\\"} 2.0
nextllm_new_tokens_total{model="a \\"b\\"\\\\"} %d
nextllm_time_to_first_token_seconds_bucket{le="0.1",model="a \\"b\\"\\\\"} 1.0
nextllm_time_to_first_token_seconds_bucket{le="0.2",model="a \\"b\\"\\\\"} 3.0
nextllm_time_to_first_token_seconds_bucket{le="+Inf",model="a \\"b\\"\\\\"} 3.0
"""


@pytest.mark.slow
def test_the_status_page_follows_the_metrics(tab, backend):
    backend.metrics = METRICS % 1000
    tab.open(f"{backend.url}/status")
    tab.until("document.querySelector('section')")
    assert tab.text("h2") == 'a "b"\\'
    rows = dict(zip(tab.texts("dt"), tab.texts("dd"), strict=True))
    assert (rows["Slots used"], rows["Rows in the queue"], rows["New tokens/s"]) == ("3 of 4", "2", "0.0")
    assert (rows["Time to first token, median"], rows["Time to first token, 95 %"]) == ("0.13 s", "0.19 s")
    backend.metrics = METRICS % 3000
    tab.until("document.querySelectorAll('dd')[5].innerText === '3,000'")
    assert float(tab.texts("dd")[3]) > 0


@pytest.mark.slow
def test_a_wheel_has_the_pages(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nextllm_jax", tmp_path / "nextllm_jax")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    pages = {path.name for path in (ROOT / "nextllm_jax" / "serving" / "page").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        assert {f"nextllm_jax/serving/page/{name}" for name in pages} <= set(archive.namelist())
