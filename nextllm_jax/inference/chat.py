"""A conversation with a model: its messages, and a cache from which only the new turn is missing."""

from collections.abc import Iterator, Sequence

from nextllm_jax.config import SamplingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.inference.generate import CachedRow, Speeds
from nextllm_jax.inference.llm import LLM
from nextllm_jax.inference.stream import Sample
from nextllm_jax.tokenizer.chat import ChatTemplate, Message

MAX_ANSWER_TOKENS = 512
_LEAST_CACHE_LENGTH = 1024


class ContextFull(InputError):
    """No token more fits into the model's context; the conversation stands as it was."""


class Conversation:
    """Turns of a user and a model, from an optional `system` message on.

    `template` is a Jinja template instead of the model's own. `sample` is the last answer, `speeds` are those of
    making it. Answers are what they would be if each were made from the whole conversation anew.

    Raises InputError for a model without a template, or a template that fails.
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
        stop: Sequence[str] = (),
    ) -> None:
        self._llm = llm
        self._template = ChatTemplate(llm.tokenizer, template)
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._settings = (max_new_tokens, sampling or SamplingConfig(), seed, tuple(stop))
        self.sample: Sample | None = None
        self.speeds = Speeds()
        self.is_full = False
        """Whether the last answer ended because the model's context did."""
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages: list[Message] = list(self._opening)
        self._cached: CachedRow | None = None

    def say(self, text: str, *, chunk_tokens: int = 8) -> Iterator[str]:
        """The pieces of the model's answer as they are made; the turn counts once they are all taken.

        Raises ContextFull if the text leaves no room for an answer.
        """
        llm, (max_new_tokens, sampling, seed, stop) = self._llm, self._settings
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template.encode(messages)
        context_length = llm.config.context_length
        room = context_length - len(prompt)
        if room < 1:
            raise ContextFull(
                f"the conversation would take {len(prompt):,} tokens and leaves no room for an answer in the model's "
                f"context of {context_length:,}; /reset starts over"
            )
        cached, self._cached = self._cached, None  # whatever happens now, it is gone
        stream = llm.stream_tokens(
            [prompt],
            texts=[text],
            max_new_tokens=min(room, max_new_tokens),
            sampling=sampling,
            seed=seed,
            stop=stop,
            chunk_tokens=chunk_tokens,
            cached=cached,
            least_cache_length=_LEAST_CACHE_LENGTH,
        )
        for piece in stream:
            if piece.text:
                yield piece.text
            self.sample = piece.sample
        assert self.sample is not None
        self.speeds = stream.speeds
        self.is_full = self.sample.finish_reason == "length" and room <= max_new_tokens
        self._cached = stream.cached_row([*prompt, *self.sample.tokens])
        self.messages = [*messages, {"role": "assistant", "content": self.sample.text}]
