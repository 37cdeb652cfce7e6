"""The bodies of requests, as OpenAI defines them, with this project's own sampling settings."""

import json
import secrets
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nextllm_jax.config import SamplingConfig
from nextllm_jax.config.sampling import MAX_TOP_LOGPROBS, bias_texts
from nextllm_jax.serving.errors import ApiError
from nextllm_jax.tokenizer.chat import Message

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_SAMPLES = 128
DEFAULT_COMPLETION_TOKENS = 16

_PROMPT_FORMS = "must be a text, a list of texts, a list of token ids, or a list of such lists"

B = TypeVar("B", bound="Fields")


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A prompt in each of its forms as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return value
        if _are_ids(value):
            return [value]
        if all(isinstance(each, list) and _are_ids(each) for each in value):
            return value
    raise ValueError(_PROMPT_FORMS)


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(each) is int for each in value)


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class Fields(BaseModel):
    """An object whose unknown fields are errors. A field that is null has its default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class StreamOptions(Fields):
    """How a streamed answer is sent."""

    include_usage: bool = False


class JsonSchema(Fields):
    """The schema of an answer, with a name and a description that nothing depends on."""

    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    name: str | None = None
    description: str | None = None
    strict: bool = True


class ResponseFormat(Fields):
    """What the text of an answer must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @pydantic.model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("the type json_schema needs json_schema, and other types take none")
        return self

    def schema_text(self) -> str | None:
        """The JSON schema of the answer; None: any text."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return '{"type": "object"}' if self.type == "json_object" else None


class GenerationBody(Fields):
    """The fields that completions and chats share. Defaults are OpenAI's."""

    model: str | None = None
    """A served model; None: the only one."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default_factory=lambda: secrets.randbits(32))
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS), BeforeValidator(_stops)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat = ResponseFormat()
    user: str | None = None

    def sampling(self) -> SamplingConfig:
        """The sampling settings. Raises InputError for one that is out of range."""
        return SamplingConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            min_new_tokens=self.min_tokens,
            json_schema=self.response_format.schema_text(),
            logit_bias=bias_texts(self.logit_bias),
        )


class CompletionBody(GenerationBody):
    """The body of /v1/completions. `prompt` is a list of texts or a list of lists of token ids."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] = DEFAULT_COMPLETION_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool = False

    @pydantic.model_validator(mode="after")
    def _generates_or_echoes(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which needs echo")
        return self


class TextPart(Fields):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(Fields):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @pydantic.model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"a message of the role {self.role} needs content")
        return self

    def message(self) -> Message:
        """The message as chat templates read it: a text, and the arguments of calls as objects."""
        parts = self.content
        found: Message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": parts if isinstance(parts, str) else "".join(part.text for part in parts),
        }
        calls = None if self.tool_calls is None else [_with_arguments(call) for call in self.tool_calls]
        extra = {"name": self.name, "tool_call_id": self.tool_call_id, "tool_calls": calls}
        return found | {key: value for key, value in extra.items() if value is not None}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments, a JSON text in OpenAI's form, are an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        # Limits the nesting, which json.loads does not: templates fail on deep objects.
        return {**call, "function": {**function, "arguments": pydantic_core.from_json(function["arguments"])}}
    except ValueError:
        return call


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions. Without a limit on tokens, an answer ends at the end of the slot."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] = "auto"

    @pydantic.model_validator(mode="after")
    def _has_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class TokenizeBody(Fields):
    """The body of /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None

    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None

    @pydantic.model_validator(mode="after")
    def _has_one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Fields):
    """The body of /detokenize."""

    model: str | None = None

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


def parse(kind: type[B], body: bytes) -> B:
    """The body of a request. Raises ApiError, which names the field, if it is not valid."""
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"unknown field {where}; remove it", param=where, code="unknown_field")
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    raise ApiError(400, f"{where}: {message}" if where else message, param=where or None)
