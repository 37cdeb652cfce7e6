"""The `nextllm` command, with `train`, `prepare`, `verify`, `doctor` and `replay`. Other modules define the rest.

Nothing here imports jax before a command needs it. So `--help` and errors appear immediately, and data is prepared
before devices are initialized.
"""

import contextlib
import dataclasses
import difflib
import errno
import importlib.metadata
import io
import json
import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import tyro

from nextllm_jax import process, standard_streams
from nextllm_jax.cli.certify import certify_command
from nextllm_jax.cli.convert import export_command, import_command
from nextllm_jax.cli.help import parse, parse_with_config
from nextllm_jax.cli.plan import plan_command
from nextllm_jax.cli.quantize import quantize_command
from nextllm_jax.cli.sample import chat_command, sample_command
from nextllm_jax.cli.scale import scale_command
from nextllm_jax.cli.serve import serve_command
from nextllm_jax.cli.text import evaluate_command, lm_eval_command, tokenize_command
from nextllm_jax.config import Config, DataConfig
from nextllm_jax.config.files import config_of_arguments, stated_fields
from nextllm_jax.distributed.rendezvous import DistributedConfig
from nextllm_jax.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, InputError, RunFailed
from nextllm_jax.process import use_compilation_cache
from nextllm_jax.progress import progress_bar, show_messages
from nextllm_jax.training.launch import train

if TYPE_CHECKING:
    from nextllm_jax.pretrained.source import Source

_log = logging.getLogger(__name__)


def run_main(command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command with the arguments of the command line, and exit with its exit code.

    - Bad input, such as a path that is too long, gives a one-line error and exit code 2.
    - A failure of the machine, such as a full disk or a bucket that cannot be reached, gives a one-line error and exit
      code 1.
    - Ctrl-C gives exit code 130.
    - Any other exception is a bug and keeps its traceback.
    """
    standard_streams.open_missing()
    show_messages()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal cannot show are replaced
    message = ""
    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        message, code = str(error), error.exit_code
    except RunFailed as error:
        message, code = str(error), EXIT_BAD_INPUT if _is_bad_path(error.__cause__) else EXIT_FAILED
    except BrokenPipeError:
        code = EXIT_FAILED  # the reader of the pipe has exited
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        message, code = f"{error.strerror or error}{where}", EXIT_BAD_INPUT if _is_bad_path(error) else EXIT_FAILED
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    finally:
        standard_streams.drop_unwritten()
    if message:  # printed here, since progress bars disappear when the exception is deleted
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
        standard_streams.drop_unwritten()
    sys.exit(code)


def _is_bad_path(error: BaseException | None) -> bool:
    """Whether an operation failed because of the name that it was given, whatever the state of the machine."""
    return isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a model. The same command continues an interrupted run."""

    config: str
    """Python file that defines get_config() -> Config, such as configs/small.py."""
    overwrite: bool = False
    """Start over in an existing run directory. The old files are moved into its overwritten/."""
    allow_change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Config field that may change when a run is continued, such as optimizer.learning_rate. May be repeated. The new
    value becomes the run's: later commands need neither this option nor the changed one."""
    profile: int = 0
    """Number of steps to trace, after two warmup steps, into the run's profile/ for XProf and Perfetto; 0: none."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    def __post_init__(self) -> None:
        if self.profile < 0:
            raise InputError(f"--profile is {self.profile}; give a number of steps, or 0 for none")


def parse_train(argv: list[str], file: Config) -> TrainArguments:
    """The arguments of `train`; their defaults are in `file`. Exits for --help and unknown options."""
    default = TrainArguments(config=tyro.MISSING, run=file)
    description = f"{TrainArguments.__doc__}\n\n{process.describe()}"
    script = Path(sys.argv[0]).name
    prog = script if script == "train.py" else "nextllm train"
    return parse_with_config(argv, default, prog=prog, description=description)


def train_command(argv: list[str]) -> int:
    """Train a model, or continue an interrupted run.

    Returns the exit code.
    """
    file = config_of_arguments(argv)
    arguments = parse_train(argv, file)
    process.restart_with_settings()

    outcome = train(
        arguments.run,
        overwrite=arguments.overwrite,
        allow_change=arguments.allow_change,
        profile_steps=arguments.profile,
        distributed=arguments.distributed,
        file=file,
        stated=stated_fields(argv),
        may_exit=True,
    )
    return EXIT_INTERRUPTED if outcome == "interrupted" else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Turn a corpus into tokenized shards for training."""

    config: str | None = None
    """Config file; its data settings become the defaults of the options below."""
    output: str | None = None
    """Output directory, also gs://BUCKET/DIRECTORY or s3://BUCKET/DIRECTORY; none: data.path, or
    data/<corpus>-<tokenizer>-<hash>."""
    overwrite: bool = False
    """Replace prepared data in the output directory."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=DataConfig)


def prepare_command(argv: list[str]) -> int:
    """Turn a corpus into tokenized shards.

    Returns the exit code.
    """
    from nextllm_jax.data.prepare import prepare
    from nextllm_jax.data.settings import default_data_path
    from nextllm_jax.data.shards import DataPath, data_path
    from nextllm_jax.data.sources import source_paths

    default = PrepareArguments(data=config_of_arguments(argv).data)
    arguments = parse(PrepareArguments, argv, default=default, prog="nextllm prepare")
    if arguments.output and arguments.data.mixture:
        raise InputError("--output is one directory, but --mixture has several sources; leave one of them out")

    def prepare_source(config: DataConfig) -> DataPath:
        path = data_path(arguments.output) if arguments.output else default_data_path(config)
        # Prepared directories that a mixture names are used as they are.
        if not (arguments.data.mixture and config.path):
            prepare(config, path, overwrite=arguments.overwrite)
        return path

    print(*source_paths(arguments.data, prepare_source), sep="\n")
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Check every byte of a run's checkpoints.

    Exit code 0: all are intact. 1: one is damaged, or there is none. 2: PATH is not a run.
    """

    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """Run directory, its checkpoints/, or the directory of one step."""
    json: bool = False
    """Print one JSON object per checkpoint."""


def verify_command(argv: list[str]) -> int:
    """Check every byte of a run's checkpoints.

    Returns the exit code.
    """
    arguments = parse(VerifyArguments, argv, prog="nextllm verify")

    from nextllm_jax.checkpoint import verify

    steps = verify.find_steps(arguments.path)
    if not steps:
        raise RunFailed(f"{arguments.path} holds no checkpoint")
    failed = False
    with progress_bar(total=verify.count_bytes(steps), desc="checking", unit="B", unit_scale=True) as bar:
        for report in verify.check_steps(steps, bar.update):
            with bar.external_write_mode():
                print(json.dumps(report.to_json()) if arguments.json else report, flush=True)
            failed |= report.failed
    if not arguments.json and (sentence := verify.describe_retention(arguments.path)):
        _log.info(sentence)
    return EXIT_FAILED if failed else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Run the checks of `train` without training. Exit code 0: no problems. 1: training would fail."""

    config: str
    """Python file that defines get_config() -> Config, as for train; with --resume-proof: configs/tiny.py."""
    overwrite: bool = False
    """As for train."""
    allow_change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """As for train."""
    resume_proof: bool = False
    """Instead, prove exact resuming: train a few steps twice in a temporary directory, once with kill -9 in the middle,
    and compare the final states bit for bit. Exit code 0: they are equal; 1: they differ. On a GPU, set
    XLA_FLAGS=--xla_gpu_deterministic_ops=true."""
    steps: int = 40
    """With --resume-proof: number of steps."""
    json: bool = False
    """Print one JSON object."""
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def doctor_command(argv: list[str]) -> int:
    """Run the checks of `train` without training, or prove exact resuming.

    Returns the exit code.
    """
    config_given = any(argument.partition("=")[0] == "--config" for argument in argv)
    if "--resume-proof" in argv and not config_given:
        argv = ["--config", "configs/tiny.py", *argv]
    file = config_of_arguments(argv)
    default = DoctorArguments(config=tyro.MISSING, run=file)
    arguments = parse_with_config(argv, default, prog="nextllm doctor")

    from nextllm_jax.pretrained.init_from import with_source
    from nextllm_jax.training.accepted_changes import with_accepted_changes

    config = arguments.run if arguments.overwrite else with_accepted_changes(arguments.run, stated_fields(argv))
    config, source = with_source(config, file, overwrite=arguments.overwrite)
    arguments = dataclasses.replace(arguments, run=config)
    return _prove_resuming(arguments) if arguments.resume_proof else _diagnose(arguments, source)


def _diagnose(arguments: DoctorArguments, source: "Source | None") -> int:
    from nextllm_jax.diagnostics.doctor import diagnose
    from nextllm_jax.training.resume_guard import allowed_fields

    show = (lambda _: None) if arguments.json else (lambda finding: print(finding, flush=True))
    allowed = allowed_fields(arguments.allow_change)
    findings = diagnose(arguments.run, source=source, overwrite=arguments.overwrite, allow_change=allowed, show=show)
    problems = sum(finding.status == "PROBLEM" for finding in findings)
    if arguments.json:
        print(json.dumps({"problems": problems, "checks": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        print(f"{problems} problem{'s' if problems > 1 else ''}: train would fail" if problems else "no problems found")
    return EXIT_FAILED if problems else 0


def _prove_resuming(arguments: DoctorArguments) -> int:
    from nextllm_jax.diagnostics.resume_proof import prove

    comparisons = prove(arguments.run, steps=arguments.steps)
    equal = all(comparison.equal for comparison in comparisons)
    if arguments.json:
        rows = [{**dataclasses.asdict(row), "equal": row.equal} for row in comparisons]
        print(json.dumps({"equal": equal, "comparisons": rows}))
    else:
        print(f"{'':18} {'uninterrupted':18} {'interrupted':18}", *comparisons, sep="\n")
        print(
            "equal: the interrupted training gives the same result as the uninterrupted one" if equal else "NOT EQUAL"
        )
    return 0 if equal else EXIT_FAILED


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayArguments:
    """Repeat a bad step that the flight recorder saved, and name the first layer that is not finite.

    Exit code 0: the step is bad again. 1: it is not. Writes no files.
    """

    bundle: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """Directory of the recorded step, such as runs/small/flight/step-120."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Directory of the run's prepared data, if it was moved. Repeat it for each source of a mixture, in its order."""
    json: bool = False
    """Print one JSON object."""


def replay_command(argv: list[str]) -> int:
    """Repeat a recorded bad step and name the first layer that is not finite.

    Returns the exit code.
    """
    arguments = parse(ReplayArguments, argv, prog="nextllm replay")
    process.restart_with_settings()
    use_compilation_cache()

    from nextllm_jax.diagnostics.replay import replay

    found = replay(arguments.bundle, data=arguments.data)
    print(json.dumps(found.to_json()) if arguments.json else found)
    return 0 if found.reproduced else EXIT_FAILED


COMMANDS = {
    "train": train_command,
    "sample": sample_command,
    "chat": chat_command,
    "serve": serve_command,
    "prepare": prepare_command,
    "verify": verify_command,
    "doctor": doctor_command,
    "replay": replay_command,
    "plan": plan_command,
    "scale": scale_command,
    "import": import_command,
    "export": export_command,
    "quantize": quantize_command,
    "certify": certify_command,
    "tokenize": tokenize_command,
    "evaluate": evaluate_command,
    "lm_eval": lm_eval_command,
}


def _versions() -> list[str]:
    """The versions of this package, of Python and of the libraries that a bug report needs."""
    packages = ("nextllm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return [versions[0], f"Python {platform.python_version()} on {platform.platform()}", *versions[1:]]


def nextllm_command(argv: list[str]) -> int:
    """Run the command that the first argument names; returns its exit code."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print("usage: nextllm COMMAND [OPTIONS]\n")
        for command, run in COMMANDS.items():
            print(f"  {command:10}{(run.__doc__ or '').splitlines()[0]}")
        print("\nnextllm COMMAND --help lists its options; nextllm --version prints what a bug report needs")
        return 0
    if name == "--version":
        print("\n".join(_versions()))
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; the commands are {', '.join(COMMANDS)}"
        raise InputError(f"nextllm has no command '{name}'{hint}")
    return COMMANDS[name](argv[1:])


def main() -> NoReturn:
    """Run the `nextllm` command."""
    run_main(nextllm_command)
