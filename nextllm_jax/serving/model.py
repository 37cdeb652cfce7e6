"""`ServedModel`: a model with its name, its worker, and what turns the bodies of requests into rows for the engine."""

import dataclasses
import functools
import threading
import time
from collections.abc import Sequence

from nextllm_jax.errors import InputError
from nextllm_jax.inference.llm import LLM
from nextllm_jax.inference.request import Request
from nextllm_jax.serving.errors import ApiError
from nextllm_jax.serving.protocol import ChatBody, ChatMessage, CompletionBody, GenerationBody, TokenizeBody
from nextllm_jax.serving.worker import Worker
from nextllm_jax.tokenizer.chat import ChatTemplate, Tools


@dataclasses.dataclass(frozen=True)
class Row:
    """A row to generate: sample `index % n` of the prompt `index // n`."""

    index: int
    prompt: str
    request: Request


@dataclasses.dataclass(frozen=True, eq=False)
class ServedModel:
    """A model of a server, with its name and its worker."""

    name: str
    llm: LLM
    worker: Worker
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def completion_rows(self, body: CompletionBody) -> list[Row]:
        """The rows of /v1/completions. Raises ApiError or InputError if the model cannot process them."""
        tokenizer = self.llm.tokenizer
        if isinstance(body.prompt[0], str):
            texts, prompts = body.prompt, [tokenizer.encode_prompt(text) for text in body.prompt]
        else:
            texts, prompts = [tokenizer.decode(tokens) for tokens in body.prompt], body.prompt
        return self._rows(body, prompts, texts, max(1, body.max_tokens), body.logprobs)

    def chat_rows(self, body: ChatBody) -> list[Row]:
        """The rows of /v1/chat/completions. Raises ApiError or InputError if the model cannot process them."""
        tokens = self.encode_chat(body.messages, body.tools if body.tool_choice == "auto" else None)
        most = body.max_completion_tokens or body.max_tokens or max(1, self.worker.max_length - len(tokens))
        return self._rows(body, [tokens], [""], most, body.top_logprobs if body.logprobs else None)

    def tokenize(self, body: TokenizeBody) -> list[int]:
        """The ids of a prompt or a chat. A prompt that is the spelling of a special token is that token."""
        tokenizer = self.llm.tokenizer
        if body.messages is not None:
            return self.encode_chat(body.messages, body.tools)
        text = body.prompt or ""
        if text in tokenizer.special_tokens:
            return [tokenizer.special_tokens[text]]
        return tokenizer.encode_prompt(text) if body.add_special_tokens else tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[ChatMessage], tools: Tools) -> list[int]:
        """The ids of a chat up to the start of the answer. Raises ApiError or InputError if the template refuses it."""
        template = self._template
        if tools and template.ignores("tools"):
            raise ApiError(400, f"the chat template of {self.name} reads no tools; leave them out", param="tools")
        with self._lock:  # a template keeps the marks of the chat that it renders
            return template.encode([message.message() for message in messages], tools=tools or None)

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        if self.llm.tokenizer.chat_template is None:  # the error of ChatTemplate names an option of `nextllm chat`
            raise ApiError(400, f"{self.name} has no chat template; use /v1/completions", param="model")
        try:
            return ChatTemplate(self.llm.tokenizer)
        except InputError as error:
            raise ApiError(400, f"{self.name} answers no chats: {error}", param="model") from error

    def _rows(
        self,
        body: GenerationBody,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[str],
        max_new_tokens: int,
        top_logprobs: int | None,
    ) -> list[Row]:
        longest, count = max(map(len, prompts)), len(prompts) * body.n
        if longest + max_new_tokens > self.worker.max_length:
            raise ApiError(
                400,
                f"the prompt has {longest} tokens, and with {max_new_tokens} new ones exceeds the "
                f"{self.worker.max_length} of a slot; shorten it, or lower max_tokens",
                param="messages" if isinstance(body, ChatBody) else "prompt",
                code="context_length_exceeded",
            )
        if count > self.worker.max_rows:
            raise ApiError(
                400, f"n and the prompts give {count} rows; the server takes at most {self.worker.max_rows}", param="n"
            )
        sampling = body.sampling()
        try:
            requests = self.llm.requests(
                [tokens for tokens in prompts for _ in range(body.n)],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                samples=[*range(body.n)] * len(prompts),
                seed=body.seed,
                top_logprobs=top_logprobs,
            )
        except InputError as error:  # all other settings are valid by the types of the body
            raise ApiError(400, str(error), param="response_format") from error
        for request in requests[:: body.n]:
            self.worker.check(request)
        return [Row(index, texts[index // body.n], request) for index, request in enumerate(requests)]
