"""The inputs of a training (data, mesh, program), and named checks of them for `train` and `nextllm doctor`."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.files import workdir_of
from nextllm_jax.config.reporting import parse_texts
from nextllm_jax.data.files import read_text
from nextllm_jax.data.loader import TrainLoader
from nextllm_jax.data.mixture import Source
from nextllm_jax.data.packing import count_windows, describe_windows, has_targets
from nextllm_jax.data.shards import SPLITS
from nextllm_jax.data.sources import tokenizer_of
from nextllm_jax.errors import InputError
from nextllm_jax.inference.score import encode
from nextllm_jax.model.accounting import adapter_count, parameter_count
from nextllm_jax.sharding import make_mesh, num_parts, sharding
from nextllm_jax.tokenizer.tokenizer import Tokenizer
from nextllm_jax.training.program import Program, build_program
from nextllm_jax.training.resume_guard import recorded_data, require_same_data
from nextllm_jax.training.schedule import describe_warmup

if TYPE_CHECKING:
    from nextllm_jax.evaluation.harness import Tasks


class Remark(NamedTuple):
    """A message from a check that passed."""

    text: str
    is_warning: bool = False


@dataclasses.dataclass
class Start:
    """The inputs of a training. Each is created on first use, which may raise InputError."""

    config: Config
    open_sources: Callable[[], tuple[Source, ...]]
    """Opens the sources of the data, which must be prepared by then."""
    overwrite: bool = False
    allow_change: Collection[str] = ()

    @functools.cached_property
    def sources(self) -> tuple[Source, ...]:
        """The sources of the data, which have the same tokenizer."""
        return self.open_sources()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data."""
        return tokenizer_of(self.sources)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The device mesh."""
        check_platform(self.config)
        return make_mesh(self.config.mesh)

    @functools.cached_property
    def program(self) -> Program:
        """The model and its steps, which are not compiled yet."""
        return build_program(self.config, self.mesh)

    @functools.cached_property
    def loader(self) -> TrainLoader:
        """The training batches."""
        return make_loader(self.config, self.sources, self.mesh)

    @functools.cached_property
    def texts(self) -> dict[str, str]:
        """The contents of evaluation.texts by name."""
        texts = parse_texts(self.config.evaluation.texts)
        with _naming("evaluation.texts"):
            return {name: read_text(path, errors="strict") for name, path in texts}

    @functools.cached_property
    def tasks(self) -> "Tasks | None":
        """evaluation.lm_eval_tasks; None if there are none."""
        names = self.config.evaluation.lm_eval_tasks
        if not names:
            return None
        with _naming("evaluation.lm_eval_tasks"):
            from nextllm_jax.evaluation.harness import Tasks  # imports the harness

            return Tasks(names)


@dataclasses.dataclass(frozen=True)
class Check:
    """A named precondition; `run` raises InputError if it fails."""

    name: str
    run: Callable[[Start], Iterable[Remark]]
    needs_data: bool = False
    """Whether the result depends on the data."""


@contextlib.contextmanager
def _naming(field: str) -> Iterator[None]:
    """A context in which the message of an InputError begins with the field."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {error}") from error


def require(checks: Iterable[Check], start: Start) -> list[Remark]:
    """The remarks of all checks. Raises InputError at the first check that fails."""
    return [remark for check in checks for remark in check.run(start)]


def make_loader(config: Config, sources: Sequence[Source], mesh: Mesh) -> TrainLoader:
    """The training batches of a config on a mesh. Raises InputError if data, batch size and mesh do not fit."""
    return TrainLoader(
        sources,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.training.global_batch_size,
        seed=config.seed,
        sharding=sharding(mesh, "batch", "seq"),
    )


def check_platform(config: Config) -> None:
    """Raise InputError if jax finds no device, or another platform than the config requires."""
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise InputError(f"jax found no device ({str(error).splitlines()[0]}); check JAX_PLATFORMS") from error
    if config.platform not in ("auto", found):
        raise InputError(
            f"platform is {config.platform}, but jax found {found}; install jax for it, set JAX_PLATFORMS, or "
            "change --platform"
        )


def check_divides(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raise InputError if the mesh cannot shard the microbatches and sequences of a step evenly."""
    rows = config.training.global_batch_size // config.training.accumulation_steps
    parts = num_parts(mesh, "batch")
    if rows % parts:
        raise InputError(
            f"training.global_batch_size / accumulation_steps is {rows}; it must be divisible by "
            f"mesh.data x mesh.fsdp x mesh.expert = {parts}"
        )
    length, parts = config.data.sequence_length, mesh.shape["sequence"]
    if length % parts:
        raise InputError(f"data.sequence_length is {length}; it must be divisible by mesh.sequence {parts}")


def _check_devices(start: Start) -> Iterator[Remark]:
    axes = ", ".join(f"{name} {size}" for name, size in start.mesh.shape.items() if size > 1)
    kind = start.mesh.devices.flat[0].device_kind
    yield Remark(f"{start.mesh.devices.size} x {kind}{f' ({axes})' if axes else ''}")


def _check_model(start: Start) -> Iterator[Remark]:
    config = start.config
    check_divides(config, start.mesh)
    model = start.program.model
    trained = adapter_count(config.model, config.lora)
    yield Remark(
        f"{parameter_count(config.model):,} parameters{f' and {trained:,} in adapters' if trained else ''}, "
        f"{np.dtype(model.dtype).name} matmuls, {model.kernel.name} attention ({model.kernel.reason})"
    )
    if said := describe_warmup(config.optimizer, config.training.steps):
        yield Remark(said)


def _check_data(start: Start) -> Iterator[Remark]:
    verify = start.config.data.verify
    for dataset, name, *_ in start.sources:
        counts = ", ".join(f"{dataset.split(split).num_tokens:,} {split}" for split in SPLITS)
        later = dataset.verifies_reads and verify == "sampled"
        checked = "each block is verified when it is read" if later else f"undamaged (data.verify {verify})"
        yield Remark(f"{_prefix(name)}{counts} tokens of {start.tokenizer.name}, {checked}")


def _prefix(source_name: str) -> str:
    """The beginning of a message about a source; empty if it is the only one."""
    return f"{source_name}: " if source_name else ""


def _check_fit(start: Start) -> Iterator[Remark]:
    config, tokenizer = start.config, start.tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"the data's tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size is "
            f"{config.model.vocab_size}; leave it out, or set --model.vocab-size {tokenizer.vocab_size} or more"
        )
    training = config.training
    for prompt in (training.sample_prompts or ()) if training.sample_tokens else ():
        needed = 1 + len(tokenizer.encode(prompt)) + training.sample_tokens
        if needed > config.model.context_length:
            raise InputError(
                f"the prompt {prompt[:20]!r}... in training.sample_prompts needs {needed} tokens with "
                f"training.sample_tokens; it must fit model.context_length {config.model.context_length}"
            )
    rows, tokens = config.model.vocab_size, tokenizer.vocab_size
    padding = f" ({rows - tokens:,} of them padding)" if rows > tokens else ""
    yield Remark(f"{tokens:,} tokens in the vocabulary, {rows:,} rows in the embedding{padding}")


def _check_batches(start: Start) -> Iterator[Remark]:
    for source in start.sources:
        for split in map(source.dataset.split, SPLITS):
            if not has_targets(split):
                raise InputError(
                    f"the {split.name} split of {source.dataset.path} has no token in its loss mask (in conversations, "
                    "only assistant text is in it); use other data, or check data.chat_template"
                )
    config, total = start.config, sum(source.weight for source in start.sources)
    is_limited = any(source.epochs for source in start.sources)
    if is_limited and (start.overwrite or not RunDir(workdir_of(config)).exists()):
        start.loader.exhausted(config.training.steps)  # a run that exists checks this at its position
    length, batch, steps = config.data.sequence_length, config.training.global_batch_size, config.training.steps
    for source, epochs in zip(start.sources, start.loader.epochs(steps), strict=True):
        windows = count_windows(source.dataset.split("train"), length, partial=False)
        share = "" if total == 1 else f" with weight {source.weight / total:.3g}"
        said = (
            f"{_prefix(source.name)}{windows:,} windows of {length} tokens; {steps:,} steps of {batch}{share} are "
            f"{epochs:,.2f} epochs"
        )
        if repeats := batch * source.weight > windows * total:
            said += "; each step repeats windows: use more data or a smaller batch"
        yield Remark(said, repeats)
        for split in map(source.dataset.split, SPLITS):
            if said := describe_windows(split, length):
                yield Remark(f"{_prefix(source.name)}{said}")


def _check_evaluation(start: Start) -> Iterator[Remark]:
    config, parts = start.config, start.mesh.shape["sequence"]
    if not (start.texts or start.tasks):
        return
    if 16 % parts or config.model.context_length % parts:  # the lengths of windows
        raise InputError(
            f"evaluation.texts and lm_eval_tasks need a mesh.sequence that divides 16 and model.context_length "
            f"{config.model.context_length}, but it is {parts}; leave them out"
        )
    if start.tasks and jax.process_count() > 1:
        raise InputError(
            f"evaluation.lm_eval_tasks cannot run in {jax.process_count()} processes; leave it out, and run nextllm "
            "lm_eval on a checkpoint"
        )
    for name, text in start.texts.items():
        with _naming(f"evaluation.texts {name}"):
            encode(start.tokenizer, text, "")
    named = ", ".join([*start.texts, *config.evaluation.lm_eval_tasks])
    yield Remark(f"also evaluates {named}, every {config.steps_between_evaluations:,} steps and at the end")


def resume_data(start: Start, record: dict[str, Any]) -> list[Remark]:
    """Continue the data at the position in a checkpoint's record, unless it is empty, and say which sources will end.

    Raises InputError if the record belongs to other data, or if all sources are exhausted before training.steps.
    """
    if record:
        position = recorded_data(record)
        require_same_data(position, start.loader.position(0), start.loader.directories, start.allow_change)
        start.loader.resume(position)
    return [Remark(message) for message in start.loader.exhausted(start.config.training.steps)]


CHECKS = (
    Check("devices", _check_devices),
    Check("model", _check_model),
    Check("data", _check_data, needs_data=True),
    Check("fit", _check_fit, needs_data=True),
    Check("batches", _check_batches, needs_data=True),
    Check("evaluation", _check_evaluation, needs_data=True),
)
"""The loop runs these in all processes once the data is prepared. `open_run` checks the run directory."""
