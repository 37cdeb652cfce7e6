"""The command `nextllm certify`."""

import dataclasses
import json
import shutil
from typing import Annotated

import tyro

from nextllm_jax.cli.help import parse
from nextllm_jax.errors import EXIT_FAILED, InputError
from nextllm_jax.process import use_compilation_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifyArguments:
    """Compare a model with a numpy model, with transformers and llama.cpp, and with its own exports.

    Exit code 0: no difference. 1: there is one; the last column names its cause. Writes certificate.json into a Hugging
    Face directory.
    """

    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """Run directory, Hugging Face directory, GGUF file, or a published model: smollm2."""
    against: str | None = None
    """Model that this one was made from, such as the run that was exported. Settings, weights and tokenizer are
    compared."""
    python: str | None = None
    """Interpreter of an environment with transformers or llama.cpp (xllamacpp); none: this one."""
    step: str | None = None
    """Checkpoint to use: best, latest, or a step number; none: best, or latest while none has a validation loss."""
    tokens: int = 640
    """Maximum length of the compared sequences. If RoPE is scaled and the original context is longer, positions have
    gaps."""
    memory_gigabytes: float | None = None
    """Memory for the weights, in GB. A larger model is read layer by layer, and is not exported; none: half of the
    available memory."""
    json: bool = False
    """Print the certificate as JSON."""


def certify_command(argv: list[str]) -> int:
    """Compare a model with other implementations and with its own exports.

    Returns the exit code.
    """
    arguments = parse(CertifyArguments, argv, prog="nextllm certify")
    _check(arguments)

    from nextllm_jax.diagnostics.certify.certify import Settings, certify, write_certificate

    use_compilation_cache()
    memory = arguments.memory_gigabytes
    settings = Settings(
        step=arguments.step,
        against=arguments.against,
        python=arguments.python,
        longest=arguments.tokens,
        memory_bytes=None if memory is None else int(memory * 1e9),
    )
    show = (lambda _: None) if arguments.json else (lambda row: print(row, flush=True))
    found = certify(arguments.path, settings, show)
    file = write_certificate(arguments.path, found)
    if arguments.json:
        print(json.dumps(found.to_json()))
    else:
        if found.conversation is not None:
            print(f"\na conversation, with the loss mask in brackets:\n{found.conversation}\n")
        print(found.verdict)
        if file is not None:
            print(file)
    return EXIT_FAILED if found.failed else 0


def _check(arguments: CertifyArguments) -> None:
    if arguments.tokens < 64:
        raise InputError(f"--tokens is {arguments.tokens}; it must be at least 64")
    if arguments.memory_gigabytes is not None and arguments.memory_gigabytes <= 0:
        raise InputError(f"--memory-gigabytes is {arguments.memory_gigabytes}; it must be positive")
    python = arguments.python
    if python is not None and shutil.which(python) is None:
        raise InputError(
            f"--python {python} is not a program; give the path of an interpreter, such as .venv/bin/python"
        )
