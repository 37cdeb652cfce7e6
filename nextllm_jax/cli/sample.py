"""The commands `nextllm sample` and `nextllm chat`: what a trained model says."""

import dataclasses
import json
import re
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nextllm_jax.cli.text import read_text
from nextllm_jax.config import SamplingConfig
from nextllm_jax.errors import EXIT_FAILED, InputError
from nextllm_jax.process import use_compilation_cache

if TYPE_CHECKING:
    from nextllm_jax.inference.chat import Conversation
    from nextllm_jax.inference.stream import TextStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Continue prompts with a trained model; the text streams as it is made."""

    checkpoint: str
    """Run directory that train.py wrote, such as runs/tiny, a Hugging Face directory, a GGUF file, or the name of a
    published model: smollm2."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be given several times. None: the start of a document."""
    chat: bool = False
    """Answer instead of continuing, in the model's chat format; without --prompt, read one message per line;
    /reset starts over, /exit or the end of the input ends."""
    system: str | None = None
    """System message of a chat; none: the template's own."""
    chat_template: str | None = None
    """File with a Jinja chat template, instead of the model's own."""
    max_new_tokens: int | None = None
    """Most tokens to add to a prompt, which must fit the model's context with it; none: 128, or 512 in a chat, where
    the end of the context ends an answer too."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SamplingConfig)
    seed: int = 0
    """Seed of the draws; the same seed, prompt and settings give the same text."""
    num_samples: int = 1
    """Continuations of each prompt, sampled independently."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to stop before; may be given several times. The end of the document always stops."""
    step: str | None = None
    """Checkpoint to take: best (lowest validation loss), latest, or a step number; none: best, or latest while no
    checkpoint has a validation loss."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Type of the matmuls; none: what the run's config says."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Quantize the matrices as they are read; `nextllm quantize` writes them for good and has more choices."""
    json: bool = False
    """Print one JSON object a sample (prompt, text, tokens, finish_reason), and the speeds as a last one."""


def sample_command(argv: list[str]) -> int:
    """Continue prompts with a trained model, or with --chat answer them.

    Returns the exit code.
    """
    return _run(argv, "nextllm sample", SampleArguments.__doc__)


def chat_command(argv: list[str]) -> int:
    """Hold a conversation with a model that has a chat template, or answer prompts.

    Returns the exit code.
    """
    return _run(["--chat", *argv], "nextllm chat", "Hold a conversation with a trained model, or answer prompts.")


def _run(argv: list[str], prog: str, description: str | None) -> int:
    arguments = tyro.cli(SampleArguments, args=argv, prog=prog, description=description)

    from nextllm_jax.inference.llm import MAX_NEW_TOKENS, load  # late, so that --help does not wait for jax

    if arguments.chat:
        return chat(arguments)
    if arguments.system is not None or arguments.chat_template is not None:
        raise InputError("--system and --chat-template are for a chat; add --chat, or leave them out")
    use_compilation_cache()
    prompts = arguments.prompt or ("",)
    llm = load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype, quantize=arguments.quantize)
    stream = llm.stream(
        prompts,
        max_new_tokens=MAX_NEW_TOKENS if arguments.max_new_tokens is None else arguments.max_new_tokens,
        sampling=arguments.sampling,
        seed=arguments.seed,
        num_samples=arguments.num_samples,
        stop=arguments.stop,
    )
    if arguments.json:
        print_json(stream)
    else:
        print_text(stream, [prompt for prompt in prompts for _ in range(arguments.num_samples)])
    return 0


def chat(arguments: SampleArguments) -> int:
    """Answer each prompt, or hold a conversation; the exit code, 1 if a message of a pipe got no answer."""
    from nextllm_jax.inference.chat import MAX_ANSWER_TOKENS, Conversation
    from nextllm_jax.inference.llm import load

    if arguments.num_samples != 1:
        raise InputError("a chat answers once; leave --num-samples out, and change --seed for another answer")
    template = read_text(arguments.chat_template) if arguments.chat_template is not None else None
    use_compilation_cache()
    conversation = Conversation(
        load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype, quantize=arguments.quantize),
        system=arguments.system,
        template=template,
        max_new_tokens=MAX_ANSWER_TOKENS if arguments.max_new_tokens is None else arguments.max_new_tokens,
        sampling=arguments.sampling,
        seed=arguments.seed,
        stop=arguments.stop,
    )
    for prompt in arguments.prompt:
        conversation.reset()
        print_answer(conversation, prompt, as_json=arguments.json)
    return 0 if arguments.prompt else converse(conversation, as_json=arguments.json)


def converse(conversation: "Conversation", *, as_json: bool) -> int:
    """Answer line after line of the standard input, and print what goes wrong; the exit code."""
    from nextllm_jax.inference.chat import ContextFull

    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  lets `input` edit lines and remember them

        print("/reset starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer", file=sys.stderr)
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
            print(f"{line} is not a command; the commands are /reset and /exit", file=sys.stderr)
        elif line:
            try:
                print_answer(conversation, line, as_json=as_json)
            except ContextFull as error:
                failed = True
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\n(stopped; message and answer are forgotten)", file=sys.stderr)
    return EXIT_FAILED if failed and not interactive else 0


def print_answer(conversation: "Conversation", message: str, *, as_json: bool) -> None:
    """Print the answer as it comes, or as one JSON object once it is there."""
    for text in conversation.say(message):
        if not as_json:
            print(text, end="", flush=True)
    assert conversation.sample is not None
    print(json.dumps(dataclasses.asdict(conversation.sample)) if as_json else "", flush=True)
    if conversation.is_full:
        print("the answer ends here because the model's context is full; /reset starts over", file=sys.stderr)


def print_json(stream: "TextStream") -> None:
    """Print the samples in the order of the prompts, each as soon as it can be, then the speeds."""
    for piece in stream.in_order():
        if piece.sample is not None:
            print(json.dumps(dataclasses.asdict(piece.sample)), flush=True)
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
    """Print each prompt and its text as it comes; several follow each other, with a line above each."""
    row = None
    for piece in stream.in_order():
        if piece.row != row:
            row = piece.row
            heading = f"--- {row + 1} of {len(prompts)} ---\n" if len(prompts) > 1 else ""
            print(heading + prompts[row], end="")
        print(piece.text, end="\n" if piece.sample is not None else "", flush=True)
