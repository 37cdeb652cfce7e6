"""The lm-evaluation-harness's `local-completions` through a server, against the harness's run of the same model."""

import os
import threading
import time

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
pytest.importorskip("lm_eval", reason="pip install '.[lm-eval]'")
pytest.importorskip("tenacity", reason="pip install '.[test]'")
pytest.importorskip("starlette", reason="pip install '.[serve]'")
import uvicorn

from nextllm_jax.serving.server import bind, url
from tests.serving.models import make_llm, served_app

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the harness has many dependencies

CONTEXTS = ["Q: one\nA:", "a longer context, über"]
CONTINUATIONS = [" yes", " ü", "eee"]


@pytest.fixture(scope="module")
def llm():
    return make_llm()


@pytest.fixture
def address(llm):
    """A server in a thread."""
    with served_app({"bytes": llm}) as (app, _), bind("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield url(sock)
        server.should_exit = True
        thread.join()


def test_local_completions_gives_the_harness_s_own_numbers(llm, address):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from nextllm_jax.evaluation.harness import HarnessModel

    def greedy(context):
        return context, llm.tokenizer.decode([int(llm.logits([llm.tokenizer.encode(context)])[0, -1, :260].argmax())])

    served = LocalCompletionsAPI(
        base_url=f"{address}/v1/completions", model="bytes", tokenizer_backend="remote", batch_size=4, max_retries=1,
        max_length=64,
    )  # fmt: skip
    own = HarnessModel(llm=llm, batch_size=4)
    # Contexts of the harness's own models begin with BOS, and those of its API models do not.
    own.tok_encode = lambda string, **_: llm.tokenizer.encode(string)
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    pairs.append(next(pair for pair in map(greedy, "abcdefghijk") if pair[1].isalnum() and pair[1].isascii()))

    def asked(kind, arguments):
        return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]

    expected = own.loglikelihood(asked("loglikelihood", pairs))
    found = served.loglikelihood(asked("loglikelihood", pairs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1]
    until = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    generating = asked("generate_until", [(context, dict(until)) for context in CONTEXTS])
    expected_texts = own.generate_until(generating)
    generating = asked("generate_until", [(context, dict(until)) for context in CONTEXTS])
    assert served.generate_until(generating) == expected_texts
