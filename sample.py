"""Sample from a trained model: `python sample.py --checkpoint runs/tiny --prompt "def "`; `--help` lists all."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nextllm_jax.cli import run_main, use_compilation_cache
from nextllm_jax.config import SamplingConfig

if TYPE_CHECKING:
    from nextllm_jax.inference.stream import TextStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Continue prompts with a trained model; the text streams as it is made."""

    checkpoint: str
    """Run directory that train.py wrote, such as runs/tiny, a Hugging Face directory, or a GGUF file."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be given several times. None: the start of a document."""
    max_new_tokens: int = 128
    """Most tokens to add to a prompt; prompt and new tokens must fit the model's context."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SamplingConfig)
    seed: int = 0
    """Seed of the draws; the same seed, prompt and settings give the same text."""
    num_samples: int = 1
    """Continuations of each prompt, each drawn in its own way."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to stop before; may be given several times. The end of the document always stops."""
    step: str | None = None
    """Checkpoint to take: best (lowest validation loss), latest, or a step number; none: best, or latest while no
    checkpoint has a validation loss."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Type of the matmuls; none: what the run's config says."""
    json: bool = False
    """Print one JSON object a sample (prompt, text, tokens, finish_reason), and the speeds as a last one."""


def sample_command(argv: list[str]) -> int:
    """Load the model and print what it says; the exit code."""
    arguments = tyro.cli(SampleArguments, args=argv, description=SampleArguments.__doc__)

    from nextllm_jax.llm import load  # late, so that --help does not wait for jax

    use_compilation_cache()
    prompts = arguments.prompt or ("",)
    stream = load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype).stream(
        prompts,
        max_new_tokens=arguments.max_new_tokens,
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


if __name__ == "__main__":
    run_main(sample_command)
