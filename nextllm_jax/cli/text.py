"""The commands `nextllm tokenize`, `evaluate` and `lm_eval`."""

import dataclasses
import json
import sys
from typing import Literal

import tyro

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.cli.help import parse
from nextllm_jax.errors import InputError
from nextllm_jax.process import use_compilation_cache
from nextllm_jax.storage.downloads import local_copy, tokenizer_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeArguments:
    """Show the token ids and pieces of a text."""

    text: tyro.conf.Positional[str | None] = None
    """Text to tokenize; none: --file, or standard input."""
    tokenizer: str
    """A run directory, prepared data, a Hugging Face directory, a tokenizer.json, a .gguf or .tiktoken file, or gpt2,
    cl100k_base, o200k_base or smollm2."""
    file: str | None = None
    """File to tokenize."""
    special: bool = False
    """Encode special tokens in the text, such as <|endoftext|>, as special tokens instead of ordinary text."""
    json: bool = False
    """Print one JSON object: ids and pieces, where bytes that are not a whole character appear as \\x.. ."""


def tokenize_command(argv: list[str]) -> int:
    """Show the token ids and pieces of a text.

    Returns the exit code.
    """
    from nextllm_jax.tokenizer.published import load_tokenizer
    from nextllm_jax.tokenizer.tokenizer import without_surrogates

    arguments = parse(TokenizeArguments, argv, prog="nextllm tokenize")
    if arguments.text is not None and arguments.file is not None:
        raise InputError("both a text and --file are given; give only one")
    text = arguments.text if arguments.text is not None else read_text(arguments.file)
    tokenizer = load_tokenizer(tokenizer_path(arguments.tokenizer))
    ids = tokenizer.encode(text, recognize="all" if arguments.special else "added")
    pieces = [tokenizer.decode_bytes([token]) for token in ids]
    if arguments.json:
        print(json.dumps({"ids": ids, "pieces": [piece.decode("utf-8", "backslashreplace") for piece in pieces]}))
        return 0
    for token, piece in zip(ids, pieces, strict=True):
        try:
            print(f"{token:>8}  {json.dumps(piece.decode(), ensure_ascii=False)}")
        except UnicodeDecodeError:
            print(f"{token:>8}  {piece}")
    num_bytes = len(without_surrogates(text).encode())
    print(f"{len(ids):,} tokens, {num_bytes:,} bytes, {num_bytes / max(len(ids), 1):.2f} bytes per token")
    return 0


def read_text(path: str | None) -> str:
    """The text of a file, or of standard input if `path` is None. Invalid UTF-8 becomes U+FFFD.

    A file may be compressed, or UTF-16 with a byte order mark. Raises InputError if the file cannot be read, or if
    standard input is a terminal.
    """
    if path is None:
        if sys.stdin.isatty():
            raise InputError("there is no text; give it as an argument, with --file, or through a pipe")
        return sys.stdin.buffer.read().decode(errors="replace")
    from nextllm_jax.data import files

    return files.read_text(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Score a model on a text, or on the validation split of prepared data as training does."""

    checkpoint: str
    """Run directory, Hugging Face directory, GGUF file, or a published model: smollm2."""
    text: str | None = None
    """File to score as one document, in separate windows."""
    data: str | None = None
    """Directory of prepared data, tokenized with the model's tokenizer."""
    step: str | None = None
    """Checkpoint to use: best, latest, or a step number; none: best, or latest while none has a validation loss."""
    window: int | None = None
    """Tokens per window; none: the model's context length for --text, the run's data.sequence_length for --data."""
    batch_size: int = 8
    """Windows per batch; the result does not depend on it."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Dtype of the matmuls; none: model.dtype of the config."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Quantize the matrices while loading. `nextllm quantize` writes a quantized model and has more options."""
    json: bool = False
    """Print one JSON object: tokens, nll, perplexity, bits_per_byte."""


def evaluate_command(argv: list[str]) -> int:
    """Print perplexity and bits per byte on a text or on prepared data.

    Returns the exit code.
    """
    arguments = parse(EvaluateArguments, argv, prog="nextllm evaluate")
    if (arguments.text is None) == (arguments.data is None):
        raise InputError("give either --text FILE or --data DIR")
    text = None if arguments.text is None else read_text(arguments.text)

    from nextllm_jax.evaluation.scoring import score_data
    from nextllm_jax.inference.load import load

    use_compilation_cache()
    llm = load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype, quantize=arguments.quantize)
    if text is not None:
        score = llm.score(text, window=arguments.window, batch_size=arguments.batch_size, progress=True)
    else:
        assert arguments.data is not None
        window = arguments.window or trained_window(arguments.checkpoint) or llm.config.context_length
        score = score_data(
            llm,
            arguments.data,
            window=window,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            progress=True,
        )
    result = {
        "tokens": score.tokens,
        "nll": score.nll,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    line = f"{score.tokens:,} tokens, nll {score.nll:.4f}, perplexity {score.perplexity:.2f}"
    bits = "" if score.bits_per_byte is None else f", {score.bits_per_byte:.4f} bits per byte"
    print(json.dumps(result) if arguments.json else line + bits)
    return 0


def trained_window(checkpoint: str) -> int | None:
    """The sequence length that a run was trained with; None if the checkpoint is not a run directory."""
    run = RunDir(local_copy(checkpoint))
    return run.read_config().data.sequence_length if run.exists() and run.checkpoints.is_dir() else None


def lm_eval_command(argv: list[str]) -> int:
    """Run the lm-evaluation-harness on a model.

    Returns the exit code.
    """
    from nextllm_jax.evaluation.harness import run_harness

    use_compilation_cache()
    run_harness(argv)
    return 0
