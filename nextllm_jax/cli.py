"""The `nextllm` command and its subcommands, see COMMANDS.

Nothing here imports jax until a command needs it, so that errors and `--help` come at once, and data is
prepared before devices are touched.
"""

import dataclasses
import difflib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from nextllm_jax import process
from nextllm_jax.config import Config, DataConfig, ModelConfig
from nextllm_jax.config_files import load_config_file, read_config
from nextllm_jax.errors import InputError, RunFailed

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 75


def run_main(command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command on the command line's arguments and exit with its code.

    The user's mistakes end in one sentence and exit code 2, failures of the machine (a full disk) in one
    sentence and 1, Ctrl-C in 130; anything else is a bug and keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 must not end a sample
    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        code = _complain(str(error), EXIT_BAD_INPUT)
    except RunFailed as error:
        code = _complain(str(error), EXIT_FAILED)
    except BrokenPipeError:
        # The reader of a pipe has left; say nothing, and keep Python from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        code = _complain(f"{error.strerror or error}{where}", EXIT_FAILED)
    except KeyboardInterrupt:
        code = _complain("interrupted", 130)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a model; the same command continues an interrupted run."""

    config: str
    """Python file that defines get_config() -> Config, such as configs/small.py."""
    overwrite: bool = False
    """Start anew in a run directory that holds a run; its files move to overwritten/ in it."""
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def _default_run(argv: list[str]) -> Config:
    """The Config of the file that --config names, for `tyro` to override; the plain one without --config."""
    files = [value for name, value in itertools.pairwise(argv) if name == "--config"]
    files += [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    if len(files) > 1:
        raise InputError(f"--config is given {len(files)} times; give one file, and change fields by their names")
    return load_config_file(files[0]) if files else Config()


def train_command(argv: list[str]) -> int:
    """Prepare the data if it is not there, then train; the exit code."""
    arguments = tyro.cli(
        TrainArguments,
        args=argv,
        default=TrainArguments(config=tyro.MISSING, run=_default_run(argv)),
        description=f"{TrainArguments.__doc__}\n\n{process.describe()}",
    )
    process.restart_with_settings()

    from nextllm_jax.data.prepare import ensure_prepared

    try:
        ensure_prepared(arguments.run.data)
    except KeyboardInterrupt:
        return _complain("interrupted while preparing data; the same command continues", EXIT_INTERRUPTED)
    use_compilation_cache()

    from nextllm_jax.training.loop import train

    outcome = train(arguments.run, overwrite=arguments.overwrite, sample_text=_sample_text)
    return EXIT_INTERRUPTED if outcome == "interrupted" else 0


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache directory."""
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:
        home = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "nextllm_jax" / "compiled"))


def _sample_text(
    config: ModelConfig, params: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[tuple[str, str]]:
    """What `train` writes to samples.txt: one continuation of each prompt."""
    import jax

    from nextllm_jax.llm import LLM, cast_matrices
    from nextllm_jax.model.transformer import resolve_dtype

    dtype = resolve_dtype(config.dtype, jax.default_backend())
    llm = LLM(config, cast_matrices(params, dtype), tokenizer, dtype)
    return [(sample.prompt, sample.text) for sample in llm.generate(prompts, max_new_tokens=max_new_tokens)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Turn a corpus into tokenized shards that training reads."""

    config: str | None = None
    """Config file whose data settings are the defaults of the options below."""
    output: str | None = None
    """Directory to write; none: data.path, or data/<corpus>-<tokenizer>-<hash>."""
    overwrite: bool = False
    """Replace prepared data that is already there."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=DataConfig)


def prepare_command(argv: list[str]) -> int:
    """Prepare data; the exit code."""
    from nextllm_jax.data.prepare import default_data_path, prepare

    default = PrepareArguments(data=_default_run(argv).data)
    arguments = tyro.cli(PrepareArguments, args=argv, prog="nextllm prepare", default=default)
    path = Path(arguments.output) if arguments.output else default_data_path(arguments.data)
    prepare(arguments.data, path, overwrite=arguments.overwrite)
    print(path)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeArguments:
    """Show the ids and pieces of a text."""

    text: tyro.conf.Positional[str | None] = None
    """Text to tokenize; none: --file, or standard input."""
    tokenizer: str
    """A run directory, prepared data, a Hugging Face directory, a tokenizer.json, a .gguf or .tiktoken file, or gpt2,
    cl100k_base or o200k_base."""
    file: str | None = None
    """File to tokenize."""
    special: bool = False
    """Take special tokens that the text spells out (<|endoftext|>) as special; they are ordinary text otherwise."""
    json: bool = False
    """Print one JSON object: ids, and pieces with \\x.. for bytes that are no whole character."""


def tokenize_command(argv: list[str]) -> int:
    """Print what a tokenizer makes of a text; the exit code."""
    from nextllm_jax.tokenizer.published import load_tokenizer

    arguments = tyro.cli(TokenizeArguments, args=argv, prog="nextllm tokenize", description=TokenizeArguments.__doc__)
    if arguments.text is not None and arguments.file is not None:
        raise InputError("both a text and --file are given; give one of them")
    text = arguments.text if arguments.text is not None else read_text(arguments.file)
    tokenizer = load_tokenizer(arguments.tokenizer)
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
    num_bytes = len(text.encode(errors="replace"))
    print(f"{len(ids):,} tokens, {num_bytes:,} bytes, {num_bytes / max(len(ids), 1):.2f} bytes a token")
    return 0


def read_text(path: str | None) -> str:
    """The text of a file, of standard input for None; invalid UTF-8 becomes U+FFFD."""
    if path is None:
        if sys.stdin.isatty():
            raise InputError("there is no text; give it as an argument, by --file, or through a pipe")
        return sys.stdin.buffer.read().decode(errors="replace")
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a text file") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Score a model on a text, or on the validation split of prepared data as training does."""

    checkpoint: str
    """Run directory that train.py wrote, Hugging Face directory or GGUF file."""
    text: str | None = None
    """File to score as one document, in windows that do not see each other."""
    data: str | None = None
    """Directory of prepared data, made with the model's tokenizer."""
    step: str | None = None
    """Checkpoint to take: best, latest, or a step number; none: best, or latest while none has a validation loss."""
    window: int | None = None
    """Tokens in a window; none: the model's context for a text, the run's data.sequence_length for data."""
    batch_size: int = 8
    """Windows that are scored together; the result does not depend on it."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Type of the matmuls; none: what the run's config says."""
    json: bool = False
    """Print one JSON object: tokens, nll, perplexity, bits_per_byte."""


def evaluate_command(argv: list[str]) -> int:
    """Print a model's score; the exit code."""
    arguments = tyro.cli(EvaluateArguments, args=argv, prog="nextllm evaluate", description=EvaluateArguments.__doc__)
    if (arguments.text is None) == (arguments.data is None):
        raise InputError("there must be one thing to score; give either --text FILE or --data DIR")
    text = None if arguments.text is None else read_text(arguments.text)

    from tqdm import tqdm

    from nextllm_jax.evaluation import score_data
    from nextllm_jax.llm import load

    def progress(batches: Iterable[Any], total: int) -> Iterable[Any]:
        return tqdm(batches, total=total, unit="batch", disable=None, leave=False)

    use_compilation_cache()
    llm = load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype)
    if text is not None:
        score = llm.score(text, window=arguments.window, batch_size=arguments.batch_size, progress=progress)
    else:
        assert arguments.data is not None
        window = arguments.window or trained_window(arguments.checkpoint) or llm.config.context_length
        score = score_data(
            llm,
            arguments.data,
            window=window,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            progress=progress,
        )
    result = {
        "tokens": score.tokens,
        "nll": score.nll,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    line = f"{score.tokens:,} tokens, nll {score.nll:.4f}, perplexity {score.perplexity:.2f}, {score.bits_per_byte:.4f}"
    print(json.dumps(result) if arguments.json else f"{line} bits per byte")
    return 0


def trained_window(checkpoint: str) -> int | None:
    """The length of the windows that a run was trained on, None for what is no run."""
    config = Path(checkpoint) / "config.json"
    is_run = config.exists() and (Path(checkpoint) / "checkpoints").is_dir()
    return read_config(config).data.sequence_length if is_run else None


COMMANDS = {
    "train": train_command,
    "prepare": prepare_command,
    "tokenize": tokenize_command,
    "evaluate": evaluate_command,
}


def nextllm_command(argv: list[str]) -> int:
    """Dispatch to one of COMMANDS by the first argument; the exit code."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print("usage: nextllm COMMAND [OPTIONS]\n")
        for command in COMMANDS:
            print(f"  nextllm {command} --help")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(COMMANDS)}"
        raise InputError(f"nextllm has no command '{name}'{hint}")
    return COMMANDS[name](argv[1:])


def main() -> NoReturn:
    """Run the `nextllm` command."""
    run_main(nextllm_command)


if __name__ == "__main__":
    main()
