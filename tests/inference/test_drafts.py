"""Drafts change the number of steps, and not the tokens."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import SamplingConfig
from nextllm_jax.inference.drafts import from_history
from nextllm_jax.inference.engine import Engine
from nextllm_jax.inference.programs import Network
from nextllm_jax.inference.request import Output, Request
from nextllm_jax.inference.scheduler import Scheduler
from nextllm_jax.model.transformer import Transformer
from tests.inference.test_engine import CONFIG, GREEDY, MIXED, MODEL, NEVER, VOCAB, WARM

SMALL = Transformer(dataclasses.replace(CONFIG, num_layers=1, layer_pattern=("global",)), MODEL.dtype)
REPEATED = [7, 8, 9, 10, 11, 12] * 3
PROMPTS = [REPEATED, [5], [3, 4, 3, 4, 3], list(range(1, 15))]
LIMITED = {"max_new_tokens": 20, "stop_ids": (NEVER,)}


def params_of(model, seed):
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(seed), tokens_BT, tokens_BT))["params"]


@pytest.fixture(scope="module")
def params():
    return params_of(MODEL, 0)


@pytest.fixture(scope="module")
def engines(params):
    """Without drafts, with drafts from the history, from the same model, and from another one."""
    drafts = [
        {},
        {"draft_tokens": 3},
        {"draft_tokens": 3, "draft": Network(MODEL, params)},
        {"draft_tokens": 3, "draft": Network(SMALL, params_of(SMALL, 1))},
    ]
    return [Engine(MODEL, params, num_slots=4, max_length=64, vocab_size=VOCAB, **each) for each in drafts]


def results(engine: Engine, requests, limit=64) -> list[Output]:
    scheduler = Scheduler(engine)
    found = {scheduler.submit(request): Output([], None, []) for request in requests}
    while not scheduler.done:
        for number, new in scheduler.advance(limit).items():
            old = found[number]
            found[number] = Output(
                old.tokens + new.tokens,
                new.finish_reason,
                old.logprobs + new.logprobs,
                None if new.accepted is None else (old.accepted or 0) + new.accepted,
            )
    return list(found.values())


@pytest.mark.parametrize("kind", [1, 2, 3], ids=["history", "same model", "another model"])
def test_drafts_do_not_change_what_a_request_gets(engines, kind):
    """Seven kinds of settings together, with limits, stop ids, log probabilities and chunks that cut a step."""
    requests = [
        Request(
            tokens=prompt, max_new_tokens=17 + i, sampling=sampling, seed=i, stop_ids=(NEVER, 3 * i), top_logprobs=2
        )
        for i, sampling in enumerate(MIXED)
        for prompt in PROMPTS
    ]
    plain, drafted = results(engines[0], requests), results(engines[kind], requests, limit=6)
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]
    assert [each.finish_reason for each in drafted] == [each.finish_reason for each in plain]
    for each, expected in zip(drafted, plain, strict=True):
        assert [top.id for top in each.logprobs] == each.tokens
        wanted = [top.logprob for top in expected.logprobs]
        np.testing.assert_allclose([top.logprob for top in each.logprobs], wanted, atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_draft_model_that_is_the_model_is_always_right(engines, sampling):
    (output,) = results(engines[2], [Request(tokens=[5, 6], sampling=sampling, **LIMITED)])
    assert output.accepted == 15  # 20 tokens in 5 steps of 1 + 3


def test_a_repetition_is_drafted_from_the_history(engines):
    bias = SamplingConfig(temperature=0, logit_bias=("17:100",))
    (output,) = results(engines[1], [Request(tokens=[1, 2], sampling=bias, **LIMITED)])
    assert output.tokens == [17] * 20
    assert output.accepted == 13  # 17, 17, then 17 is drafted in each step: 4 x (1 + 3), and 2 of the last
    assert results(engines[0], [Request(tokens=[1, 2], sampling=bias, **LIMITED)])[0].accepted is None


def test_guesses_follow_the_latest_of_the_longest_matches():
    def guesses(tokens, count=4):
        history_BS = np.full((1, 16), -1, np.int32)
        history_BS[0, : len(tokens)] = tokens
        return from_history(jnp.asarray(history_BS), jnp.asarray([len(tokens) - 1], jnp.int32), count)[0].tolist()

    assert guesses([1, 2, 3, 4, 5, 1, 2, 3]) == [4, 5, 1, 2]
    assert guesses([1, 2, 3, 4, 9, 3, 5, 2, 3]) == [4, 9, 3, 5]  # two tokens match, although 3, 5 is later
    assert guesses([6, 3, 7, 6, 3, 8, 6, 3]) == [8, 6, 3, 8]  # the later of two equals; its three tokens repeat
    assert guesses([5, 5]) == [5, 5, 5, 5]
    assert guesses([1, 2, 3]) == guesses([1]) == [-1] * 4
