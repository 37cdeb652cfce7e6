"""The commands `nextllm sample` and `nextllm chat`."""

import dataclasses
import functools
import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nextllm_jax.cli.help import parse
from nextllm_jax.cli.server_chat import ServerConversation, server_settings
from nextllm_jax.cli.text import read_text
from nextllm_jax.config import MeshConfig, SamplingConfig
from nextllm_jax.config.checks import require_integer, require_seed, stop_strings
from nextllm_jax.config.sampling import require_top_logprobs
from nextllm_jax.errors import EXIT_FAILED, InputError
from nextllm_jax.process import use_compilation_cache

if TYPE_CHECKING:
    from nextllm_jax.inference.chat import Conversation
    from nextllm_jax.inference.llm import LLM
    from nextllm_jax.inference.stream import TextStream

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Continue prompts with a trained model. The text is printed as it is generated, or written to a file."""

    checkpoint: str
    """Run directory that train.py wrote, such as runs/tiny, a Hugging Face directory, a GGUF file, or the name of a
    published model: smollm2."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be given several times. "-" reads it from standard input, without a final line break. None:
    standard input, or the start of a document if standard input is a terminal or empty."""
    prompts_file: str | None = None
    """File of JSON lines with {"prompt": TEXT}, or "-" for standard input; other keys are ignored. The samples go to
    --output. The same command continues an interrupted file."""
    output: str | None = None
    """File for the samples of --prompts-file, one JSON object per line: those of --json with `index`, the 0-based line
    of the prompt, and `sample` if --num-samples is not 1. OUTPUT.settings.json records the options."""
    batch_size: int = 16
    """Samples of --prompts-file that are generated together. More are faster, and take more memory."""
    chat: bool = False
    """Answer in the model's chat format, instead of continuing a text. Without --prompt, read one message per line;
    /reset starts over, and /exit or the end of the input ends."""
    system: str | None = None
    """System message of a chat; none: that of the chat template, if it has one."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the model's own."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens; none: 128, or 512 in a chat, or (without --prompts-file) the room in the context if
    that is less. A prompt and its new tokens must fit the context, unless --slide is set."""
    slide: bool = False
    """Continue beyond the model's context: whenever it is full, only its last half is kept."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = dataclasses.field(
        default_factory=SamplingConfig
    )
    seed: int = 0
    """Random seed, from 0 to 2^32 - 1; the same seed, prompt and settings give the same text."""
    num_samples: int = 1
    """Number of independent samples of each prompt."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A sample ends before this text; may be given several times. Backslashes have no meaning in it: a line
    break is $'\\n' in bash and zsh. It is not found within the spelling of a control token. The end of a document
    always ends a sample."""
    step: str | None = None
    """Checkpoint to use: best (lowest validation loss), latest, or a step number; none: best, or latest while no
    checkpoint has a validation loss."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Type of the matmuls; none: that of the model's config."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Quantize the weights while loading. `nextllm quantize` writes quantized weights, and has more options."""
    quantize_cache: bool = False
    """Keep the keys and values of earlier tokens in int8, which halves their memory. The text changes slightly."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Shards the model over all devices. Without any of its options, it is on one device."""
    draft_tokens: int = 0
    """Verify this many guesses of the next tokens in each step (speculative decoding), which is faster where the text
    repeats itself or its prompt. The text stays the same. 0: none, or 4 with --draft."""
    draft: str | None = None
    """Smaller model with the same tokens that the guesses are from; none: the text so far."""
    json: bool = False
    """Print one JSON object per sample (prompt, text, tokens, finish_reason), and finally one with the throughput."""
    top_logprobs: int | None = None
    """With --json: add the log probability of each token, and those of this many most likely tokens, at most 20."""
    verbose: bool = False
    """Print the name of each program that is compiled."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None:
                require_integer(name, value)
        require_integer("draft_tokens", self.draft_tokens, 0)
        require_seed(self.seed)
        require_top_logprobs(self.top_logprobs)
        stop_strings(self.stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatArguments(SampleArguments):
    """Hold a conversation with a trained model, or answer prompts. The model is loaded, or is one of a server."""

    checkpoint: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """As for `nextllm sample`; without it, --server must be given."""
    server: str | None = None
    """URL of a server to chat with, which `nextllm serve` prints. Its key is in the environment variable
    NEXTLLM_API_KEY."""
    model: str | None = None
    """With --server: name of the model; none: the only one."""
    chat: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.checkpoint is None) == (self.server is None):
            raise InputError("give the model of the chat, with either --checkpoint PATH or --server URL")
        if self.model is not None and self.server is None:
            raise InputError("--model is the name of a model of --server; leave it out")


def sample_command(argv: list[str]) -> int:
    """Continue prompts with a trained model, or with --chat answer them.

    Returns the exit code.
    """
    return _run(parse(SampleArguments, argv, prog="nextllm sample"))


def chat_command(argv: list[str]) -> int:
    """Hold a conversation with a model that has a chat template, or answer prompts.

    Returns the exit code.
    """
    arguments = parse(ChatArguments, argv, prog="nextllm chat")
    return _run(arguments) if arguments.server is None else chat_with_server(arguments, arguments.server)


def _run(arguments: SampleArguments) -> int:
    if arguments.verbose:
        logging.getLogger("nextllm_jax").setLevel(logging.DEBUG)
    if any("\\n" in stop for stop in arguments.stop):
        _log.warning("--stop has a backslash and an n, which is no line break; for that, write --stop $'\\n'")
    if arguments.prompts_file is not None or arguments.output is not None:
        return sample_file(arguments)
    if arguments.chat:
        return chat(arguments)
    if arguments.system is not None or arguments.chat_template is not None:
        raise InputError("--system and --chat-template are for a chat; add --chat, or leave them out")
    if arguments.top_logprobs is not None and not arguments.json:
        raise InputError("--top-logprobs needs --json; add it, or leave --top-logprobs out")
    prompts = read_prompt_arguments(arguments)
    llm, max_new_tokens = load_model(arguments, {f"prompt {prompt[:20]!r}": prompt for prompt in prompts})
    stream = llm.stream(
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=arguments.sampling,
        seed=arguments.seed,
        num_samples=arguments.num_samples,
        stop=arguments.stop,
        slide=arguments.slide,
        top_logprobs=arguments.top_logprobs,
    )
    if arguments.json:
        print_json(stream)
    else:
        print_text(stream, [prompt for prompt in prompts for _ in range(arguments.num_samples)])
    return 0


def load_model(arguments: SampleArguments, prompts: Mapping[str, str]) -> tuple["LLM", int]:
    """The model that the options name, and the maximum number of new tokens.

    Raises InputError before the weights are read if one of the `prompts`, by their names in errors, and its new tokens
    exceed the context.
    """
    from nextllm_jax.inference.engine import require_length
    from nextllm_jax.inference.llm import DRAFT_TOKENS, MAX_NEW_TOKENS
    from nextllm_jax.inference.load import load, load_source
    from nextllm_jax.pretrained.open_model import open_model

    use_compilation_cache()
    source = open_model(arguments.checkpoint, step=arguments.step)
    source = dataclasses.replace(source, load_tokenizer=functools.cache(source.load_tokenizer))
    max_new_tokens, context = arguments.max_new_tokens or MAX_NEW_TOKENS, source.config.context_length
    if not arguments.slide and prompts:
        lengths = {name: len(source.load_tokenizer().encode_prompt(prompt)) for name, prompt in prompts.items()}
        if arguments.max_new_tokens is None:
            max_new_tokens = max(1, min(max_new_tokens, context - max(lengths.values())))
        for name, length in lengths.items():
            require_length(name, length, max_new_tokens, context)
    how: Any = {name: getattr(arguments, name) for name in ("dtype", "quantize", "quantize_cache")}
    how["mesh"] = None if arguments.mesh == MeshConfig() else arguments.mesh
    llm = load_source(source, arguments.checkpoint, **how)
    if arguments.draft is not None or arguments.draft_tokens:
        draft = arguments.draft and load(arguments.draft, **how)
        llm = llm.with_drafts(arguments.draft_tokens or DRAFT_TOKENS, draft or None)
    return llm, max_new_tokens


def read_prompt_arguments(arguments: SampleArguments) -> list[str]:
    """The prompts of --prompt, where "-" is standard input. Without any, it is read too if it is not a terminal."""
    prompts = list(arguments.prompt)
    if not prompts and not arguments.chat:
        if sys.stdin.isatty():
            return [""]
        _log.info("reading the prompt from standard input, since there is no --prompt")
        prompts = ["-"]
    if "-" in prompts:
        text = sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n")
        prompts = [text if prompt == "-" else prompt for prompt in prompts]
    return prompts


def sample_file(arguments: SampleArguments) -> int:
    """Write samples of --prompts-file to --output; the exit code."""
    if arguments.prompts_file is None or arguments.output is None:
        raise InputError("--prompts-file and --output go together; give both")
    for option in ("prompt", "chat", "json", "top_logprobs"):
        if getattr(arguments, option) != getattr(SampleArguments, option):
            raise InputError(f"--{option.replace('_', '-')} does not go with --prompts-file; leave it out")

    from nextllm_jax.cli.samples_file import SamplesFile, read_prompts, sample_missing, weights_of
    from nextllm_jax.inference.llm import MAX_NEW_TOKENS

    prompts = read_prompts(arguments.prompts_file)
    weights, step = weights_of(arguments.checkpoint, arguments.step)
    how = {
        "num_samples": arguments.num_samples,
        "max_new_tokens": arguments.max_new_tokens or MAX_NEW_TOKENS,
        "seed": arguments.seed,
        "stop": arguments.stop,
    }
    # Files of versions without these settings lack them.
    how |= {"slide": True} if arguments.slide else {}
    model = {"weights": weights, "dtype": arguments.dtype, "quantize": arguments.quantize}
    model |= {"quantize_cache": True} if arguments.quantize_cache else {}
    with SamplesFile(arguments.output, prompts, model | how | dataclasses.asdict(arguments.sampling)) as file:
        try:
            if len(file.done) < len(file.rows):
                if file.done:
                    _log.info("continuing %s, which has %d of %d samples", file.path, len(file.done), len(file.rows))
                named = {f"line {index + 1} of the prompts file": prompt for index, prompt in prompts.items()}
                counted = dataclasses.replace(arguments, step=step, max_new_tokens=how["max_new_tokens"])
                llm, _ = load_model(counted, named)
                sample_missing(llm, file, prompts, batch_size=arguments.batch_size, sampling=arguments.sampling, **how)
            file.sort()
        except KeyboardInterrupt:
            _log.info("%s has %d of %d samples; the same command continues", file.path, len(file.done), len(file.rows))
            raise
    _log.info("%s is complete", file.path)
    return 0


def chat(arguments: SampleArguments) -> int:
    """Answer each prompt, or hold a conversation; the exit code, 1 if a message from a pipe got no answer."""
    from nextllm_jax.inference.chat import MAX_ANSWER_TOKENS, Conversation

    if arguments.num_samples != 1:
        raise InputError("a chat answers once; leave --num-samples out, and change --seed for another answer")
    if arguments.slide:
        raise InputError("--slide is not for a chat, which ends at the end of the context; leave it out")
    if arguments.top_logprobs is not None:
        raise InputError("--top-logprobs is not for a chat; leave it out")
    template = read_text(arguments.chat_template) if arguments.chat_template is not None else None
    prompts = read_prompt_arguments(arguments)
    llm, _ = load_model(arguments, {})
    conversation = Conversation(
        llm,
        system=arguments.system,
        template=template,
        max_new_tokens=arguments.max_new_tokens or MAX_ANSWER_TOKENS,
        sampling=arguments.sampling,
        seed=arguments.seed,
        stop=arguments.stop,
    )
    for prompt in prompts:
        conversation.reset()
        print_answer(conversation, prompt, as_json=arguments.json)
    return 0 if prompts else converse(conversation, as_json=arguments.json)


def chat_with_server(arguments: ChatArguments, server: str) -> int:
    """Answer each prompt with a model of a server, or hold a conversation; the exit code as for `chat`."""
    used = {"server", "model", "prompt", "system", "max_new_tokens", "sampling", "seed", "stop"}
    defaults = ChatArguments(server=server)
    for field in dataclasses.fields(ChatArguments):
        if field.name not in used and getattr(arguments, field.name) != getattr(defaults, field.name):
            raise InputError(f"--{field.name.replace('_', '-')} does not go with --server; leave it out")
    settings = {
        **server_settings(arguments.sampling),
        "max_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
        "stop": list(arguments.stop),
    }
    conversation = ServerConversation(server, model=arguments.model, system=arguments.system, settings=settings)
    prompts = read_prompt_arguments(arguments)
    for prompt in prompts:
        conversation.reset()
        print_answer(conversation, prompt, as_json=False)
    return 0 if prompts else converse(conversation, as_json=False)


def converse(conversation: "Conversation | ServerConversation", *, as_json: bool) -> int:
    """Answer each line of standard input; the exit code. A message that gets no answer is reported."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  lets `input` edit lines and recall earlier ones

        _log.info("/reset starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer")
    failed = False
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
        elif re.fullmatch(r"/\w+", line):
            _log.warning("%s is not a command; the commands are /reset and /exit", line)
        elif line:
            try:
                print_answer(conversation, line, as_json=as_json)
            except InputError as error:
                failed = True
                _log.error("%s", error)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print()
                _log.info("stopped; the message and its answer are not part of the conversation")
    return EXIT_FAILED if failed and not interactive else 0


def print_answer(conversation: "Conversation | ServerConversation", message: str, *, as_json: bool) -> None:
    """Print the answer as it is generated, or as one JSON object when it is complete."""
    for text in conversation.say(message):
        if not as_json:
            print(text, end="", flush=True)
    print(json.dumps(conversation.sample.as_dict()) if as_json and conversation.sample else "", flush=True)
    if conversation.is_full:
        _log.warning("the answer ends here because the model's context is full; /reset starts over")


def print_json(stream: "TextStream") -> None:
    """Print each sample as soon as it and those before it are complete, and finally the throughput."""
    for piece in stream.in_order():
        if piece.sample is not None:
            print(json.dumps(piece.sample.as_dict()), flush=True)
    speeds = stream.speeds
    print(
        json.dumps(
            {
                "prefill_tokens_per_second": round(speeds.prefill_tokens_per_second, 1),
                "decode_tokens_per_second": round(speeds.decode_tokens_per_second, 1),
            }
        )
    )


def print_text(stream: "TextStream", prompts: list[str]) -> None:
    """Print each prompt and its text as it is generated, one sample after another; several have a line above each."""
    row = None
    for piece in stream.in_order():
        if piece.row != row:
            row = piece.row
            heading = f"--- {row + 1} of {len(prompts)} ---\n" if len(prompts) > 1 else ""
            print(heading + prompts[row], end="")
        print(piece.text, end="\n" if piece.sample is not None else "", flush=True)
