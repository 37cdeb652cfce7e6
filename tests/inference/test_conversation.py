"""Conversations: each answer against one made from the whole conversation anew, and what a turn reads."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import ModelConfig, SamplingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.inference.chat import ContextFull, Conversation
from nextllm_jax.inference.llm import LLM
from nextllm_jax.inference.speeds import Speeds
from nextllm_jax.inference.stream import Piece, Sample
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.tokenizer import Roles, Tokenizer

pytest.importorskip("jinja2", reason="pip install '.[interop]'")

CONFIG = ModelConfig(
    vocab_size=264, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8, context_length=320,
    init_std=0.3, dtype="float32",
)  # fmt: skip
SPECIAL = {"<s>": 256, "</s>": 257, "<|im_start|>": 258, "<|im_end|>": 259}
TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    roles = Roles(bos_id=256, eos_id=257, stop_ids=(257, 259), chat_template=TEMPLATE)
    tokenizer = Tokenizer("bytes", ByteBPE({bytes([i]): i for i in range(256)}, r"[\s\S]", SPECIAL), roles)
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    params = nn.meta.unbox(jax.jit(Transformer(CONFIG).init)(jax.random.key(0), tokens_BT, tokens_BT))["params"]
    return LLM(CONFIG, params, lambda: tokenizer, np.dtype("float32"))


def anew(llm, messages, sampling) -> list[int]:
    """The tokens of an answer to all of the messages, without a cache from before."""
    prompt, engine = ChatTemplate(llm.tokenizer).encode(messages), llm.engine(1, 1024)
    stream = llm.stream_tokens([prompt], texts=[""], max_new_tokens=12, sampling=sampling, engine=engine)
    return next(piece.sample.tokens for piece in stream if piece.sample is not None)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.0)], ids=["greedy", "warm"])
def test_answers_are_those_of_the_whole_conversation(llm, sampling):
    talk = Conversation(llm, system="short", max_new_tokens=12, sampling=sampling)
    messages, read, asked = [{"role": "system", "content": "short"}], 0, 0
    for text in ("hello", "and <|im_end|>?", "über", "last"):
        messages.append({"role": "user", "content": text})
        answer = "".join(talk.say(text))
        assert talk.sample is not None
        assert talk.sample.tokens == anew(llm, messages, sampling)
        assert talk.sample.text == answer
        messages.append({"role": "assistant", "content": answer})
        assert talk.messages == messages
        read += talk.speeds.prefill_tokens
        asked += len(ChatTemplate(llm.tokenizer).encode(messages[:-1]))
    assert read < asked / 2


def test_only_the_new_turn_is_read(llm):
    talk = Conversation(llm, max_new_tokens=12, sampling=GREEDY)
    list(talk.say("hello"))
    before = ChatTemplate(llm.tokenizer).encode(talk.messages[:1])
    assert talk.speeds.prefill_tokens == len(before) - 1
    assert talk.sample is not None
    whole = ChatTemplate(llm.tokenizer).encode([*talk.messages, {"role": "user", "content": "more"}])
    said = [*before, *talk.sample.tokens]
    list(talk.say("more"))
    if llm.tokenizer.encode(llm.tokenizer.decode(said[len(before) :])) == said[len(before) :]:
        assert talk.speeds.prefill_tokens == len(whole) - len(said)
    else:  # the bytes of the answer were no text, and what replaces them is read
        assert talk.speeds.prefill_tokens < len(whole) - len(before) + 1


def test_an_answer_stops_at_any_of_the_stop_ids(llm):
    free = anew(llm, [{"role": "user", "content": "hello"}], GREEDY)
    roles = dataclasses.replace(llm.tokenizer.roles, stop_ids=(257, free[4]))
    stopping = dataclasses.replace(llm, load_tokenizer=lambda: Tokenizer("bytes", llm.tokenizer.backend, roles))
    talk = Conversation(stopping, max_new_tokens=12, sampling=GREEDY)
    list(talk.say("hello"))
    assert talk.sample is not None
    assert talk.sample.tokens == free[: free.index(free[4]) + 1]
    assert talk.sample.finish_reason == "stop"
    assert stopping.generate("x", max_new_tokens=1) is not None


class Scripted:
    """Stands in for an LLM: each answer is a text."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.config, self._answers = tokenizer, CONFIG, iter(answers)

    def engine(self, num_slots, max_length):
        return ScriptedEngine()

    def stream_tokens(self, prompts, *, texts, **_):
        ids = next(self._answers)
        self.prompt = prompts[0]
        sample = Sample(texts[0], self.tokenizer.decode(ids), ids, "length")
        return ScriptedStream([Piece(0, sample.text, sample)])


class ScriptedStream(list):
    speeds = Speeds()


class ScriptedEngine:
    speeds = Speeds()

    def grow(self, max_length):
        pass


@pytest.mark.parametrize(
    ("assistant", "answer", "kept"),
    [
        ("{{ ' ' + m.content }}", " river", "river"),
        ("{{ m.content }}", " river", " river"),
        ("{{ m.content }}", "river", "river"),
        ("{{ m.content }}", "  river", "  river"),
        ("{{ ' ' + m.content }}", "  river", " river"),
    ],
)
def test_the_next_prompt_has_the_tokens_of_the_answer(tmp_path, assistant, answer, kept):
    pytest.importorskip("tokenizers", reason="pip install '.[interop]'")
    from nextllm_jax.tokenizer.huggingface import load_huggingface
    from tests.tokenizer.test_control_tokens import NAMES, sentencepiece
    from tests.tokenizer.vocabularies import save

    theirs = sentencepiece()
    source = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    folder = save(theirs, tmp_path, **NAMES, chat_template=source + assistant + "{% endif %}{% endfor %}")
    prompt = theirs.encode("[INST] in [/INST]").ids
    tokens = theirs.encode(f"[INST] in [/INST]{answer}").ids
    assert tokens[: len(prompt)] == prompt
    scripted: Any = Scripted(load_huggingface(folder), [tokens[len(prompt) :]] * 2)
    talk = Conversation(scripted)
    assert "".join(talk.say("in")) == answer
    assert talk.messages[-1]["content"] == kept
    list(talk.say("in"))
    assert scripted.prompt[: len(tokens)] == tokens


def test_reset_forgets_and_an_answer_that_was_cut_off_leaves_no_trace(llm):
    talk = Conversation(llm, system="short", max_new_tokens=12, sampling=GREEDY)
    first = "".join(talk.say("hello"))
    pieces = talk.say("more", chunk_tokens=2)
    next(pieces)
    pieces.close()
    assert len(talk.messages) == 3
    second = "".join(talk.say("more"))
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "short"}]
    assert "".join(talk.say("hello")) == first
    assert "".join(talk.say("more")) == second


def test_answers_may_overlap_and_fail(llm, monkeypatch):
    expected = "".join(Conversation(llm, max_new_tokens=12, sampling=GREEDY).say("hello"))
    talk = Conversation(llm, max_new_tokens=12, sampling=GREEDY)
    unfinished = talk.say("more", chunk_tokens=2)
    next(unfinished)
    assert "".join(talk.say("hello")) == expected
    ready = jax.block_until_ready

    def interrupted(x):
        ready(x)
        raise KeyboardInterrupt

    talk.reset()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(talk.say("more"))
    assert "".join(talk.say("hello")) == expected


def test_the_context_fills_up(llm):
    talk = Conversation(llm, max_new_tokens=400, sampling=GREEDY)
    list(talk.say("x" * 200))
    assert talk.is_full == (talk.sample is not None and talk.sample.finish_reason == "length")
    before = list(talk.messages)
    with pytest.raises(ContextFull, match=r"context of 320; /reset starts over"):
        list(talk.say("x" * 300))
    assert talk.messages == before
    talk.reset()
    assert "".join(talk.say("hello", chunk_tokens=3))


def test_what_cannot_be_is_refused(llm):
    plain = dataclasses.replace(
        llm, load_tokenizer=lambda: Tokenizer("bytes", llm.tokenizer.backend, Roles(bos_id=256, eos_id=257))
    )
    with pytest.raises(InputError, match="has no chat template"):
        Conversation(plain)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        Conversation(llm, max_new_tokens=0)
    for wrong in ({"stop": ""}, {"stop": 5}, {"seed": 1.5}, {"max_new_tokens": "x"}, {"system": 5}, {"template": 5}):
        with pytest.raises(InputError, match=r"must be|is empty"):
            Conversation(llm, **wrong)
    with pytest.raises(InputError, match="the message is None; it must be a string"):
        list(Conversation(llm).say(None))  # pyright: ignore[reportArgumentType]
    assert Conversation(plain, template=TEMPLATE, max_new_tokens=2).say("x") is not None
