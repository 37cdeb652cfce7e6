"""A conversation with a model. It keeps the cache, so each turn processes only the new tokens."""

import itertools
from collections.abc import Iterator, Sequence

from nextllm_jax.config import SamplingConfig
from nextllm_jax.config.checks import require_integer, require_seed, require_text, stop_strings
from nextllm_jax.errors import InputError
from nextllm_jax.inference.buckets import bucket
from nextllm_jax.inference.engine import Engine
from nextllm_jax.inference.llm import LLM
from nextllm_jax.inference.speeds import Speeds
from nextllm_jax.inference.stream import Sample
from nextllm_jax.tokenizer.chat import ChatTemplate, Message

MAX_ANSWER_TOKENS = 512
_LEAST_CACHE_LENGTH = 1024


class ContextFull(InputError):
    """The conversation leaves no room in the model's context for an answer. It is unchanged."""


class Conversation:
    """A conversation between a user and a model, which may begin with a `system` message.

    `template` is a Jinja template that replaces the model's own. `sample` is the last answer, and `speeds` is its
    throughput. Answers are the same as if each were generated from the whole conversation without a cache.

    Raises InputError if the model has no template, if the template fails, or for an invalid setting.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        system: str | None = None,
        template: str | None = None,
        max_new_tokens: int = MAX_ANSWER_TOKENS,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> None:
        for name, text in (("system", system), ("template", template)):
            if text is not None:
                require_text(name, text)
        require_integer("max_new_tokens", max_new_tokens)
        require_seed(seed)
        self._llm = llm
        self._template = ChatTemplate(llm.tokenizer, template)
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._settings = (max_new_tokens, sampling or SamplingConfig(), seed, stop_strings(stop))
        self.sample: Sample | None = None
        self.speeds = Speeds()
        self._engine: Engine | None = None
        self.is_full = False
        """Whether the last answer ended because the model's context was full."""
        self.reset()

    def reset(self) -> None:
        """Remove all messages except the system message."""
        self.messages: list[Message] = list(self._opening)

    def say(self, text: str, *, chunk_tokens: int = 8) -> Iterator[str]:
        """The model's answer in pieces, as it is generated.

        The message and its answer become part of the conversation when all pieces have been read. If not all are read,
        the conversation is unchanged. Raises ContextFull if the message leaves no room for an answer.
        """
        require_text("the message", text)
        llm, (max_new_tokens, sampling, seed, stop) = self._llm, self._settings
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template.encode(messages)
        context_length = llm.config.context_length
        room = context_length - len(prompt)
        if room < 1:
            raise ContextFull(
                f"the conversation has {len(prompt):,} tokens, which leaves no room for an answer in the model's "
                f"context of {context_length:,}; /reset starts over"
            )
        max_new_tokens = min(room, max_new_tokens)
        length = bucket(max(len(prompt) + max_new_tokens, _LEAST_CACHE_LENGTH), 16)
        # An answer that is not read to its end may leave the engine without a state, or in use.
        engine, self._engine = self._engine or llm.engine(1, length), None
        engine.grow(length)
        before = engine.speeds
        stream = llm.stream_tokens(
            [prompt],
            texts=[text],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            chunk_tokens=chunk_tokens,
            engine=engine,
        )
        for piece in stream:
            if piece.text:
                yield piece.text
            self.sample = piece.sample
        assert self.sample is not None
        self._engine, self.speeds = engine, stream.speeds - before
        self.is_full = self.sample.finish_reason == "length" and room == max_new_tokens
        self.messages = [*messages, self._answer(messages, [*prompt, *self.sample.tokens])]

    def _answer(self, messages: list[Message], tokens: Sequence[int]) -> Message:
        """The last answer as a message; `tokens` are its prompt and the answer.

        The text of a SentencePiece model begins with the space of its first token, which many templates write too. The
        space is left out if the next prompt then begins with more of the tokens.
        """
        assert self.sample is not None
        text = self.sample.text
        answers: list[Message] = [
            {"role": "assistant", "content": each} for each in dict.fromkeys((text, text.removeprefix(" ")))
        ]

        def shared(answer: Message) -> int:
            ids = self._template.encode([*messages, answer], add_generation_prompt=False)
            return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, tokens, strict=False)))

        return max(answers, key=shared) if len(answers) > 1 else answers[0]
