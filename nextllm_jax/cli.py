"""The `nextllm` command: `nextllm train` and `nextllm prepare`.

Nothing here imports jax until a command needs it, so that errors and `--help` come at once, and data is
prepared before devices are touched.
"""

import dataclasses
import difflib
import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from nextllm_jax import process
from nextllm_jax.config import Config, DataConfig, ModelConfig
from nextllm_jax.config_files import load_config_file
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
class ImportArguments:
    """Turn a Hugging Face directory or a GGUF file into a run directory, which sampling and training take."""

    source: tyro.conf.Positional[str]
    """Hugging Face directory (config.json, safetensors, tokenizer.json), or GGUF file."""
    output: str
    """Run directory to write: config.json, tokenizer, and the weights as checkpoint 0."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the parameters are kept."""
    context_length: int | None = None
    """Limit on the positions of the model; none: its own."""


def import_command(argv: list[str]) -> int:
    """Import a model; the exit code."""
    arguments = tyro.cli(ImportArguments, args=argv, prog="nextllm import", description=ImportArguments.__doc__)

    from nextllm_jax.convert import import_model

    import_model(
        arguments.source,
        arguments.output,
        dtype=arguments.dtype,
        context_length=arguments.context_length,
    )
    print(arguments.output)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a model for transformers, vLLM and llama.cpp."""

    checkpoint: str
    """Run directory; a Hugging Face directory or a GGUF file is converted too."""
    output: str
    """Directory (huggingface) or file (gguf) to write."""
    format: Literal["huggingface", "gguf"] = "huggingface"
    """A directory with config.json, safetensors and tokenizer.json, or one GGUF file."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Type of the matrices; float16 and q8_0 in GGUF alone."""
    step: str | None = None
    """Checkpoint to take: best, latest, or a step number; none: best, or latest while none has a validation loss."""
    model_type: str | None = None
    """Family to write, such as llama; none: what the model was imported as, or else the first that fits."""
    shard_gigabytes: float = 5.0
    """Most in one safetensors file."""


def export_command(argv: list[str]) -> int:
    """Export a model; the exit code."""
    arguments = tyro.cli(ExportArguments, args=argv, prog="nextllm export", description=ExportArguments.__doc__)
    if arguments.format == "huggingface" and arguments.dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {arguments.dtype} is for --format gguf; huggingface takes float32 and bfloat16")
    if arguments.shard_gigabytes <= 0:
        raise InputError(f"shard_gigabytes is {arguments.shard_gigabytes}; it must be positive")

    from nextllm_jax.convert import export_model

    export_model(
        arguments.checkpoint,
        arguments.output,
        file_format=arguments.format,
        dtype=arguments.dtype,
        step=arguments.step,
        model_type=arguments.model_type,
        shard_bytes=int(arguments.shard_gigabytes * 1e9),
    )
    print(arguments.output)
    return 0


COMMANDS = {
    "train": train_command,
    "prepare": prepare_command,
    "import": import_command,
    "export": export_command,
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
