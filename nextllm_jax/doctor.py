"""What would go wrong if `train.py` were started now, in the order in which it would, without starting it.

Each check is the one that training itself makes. Nothing is written but a temporary file beside the run directory, to
see that files can be made there and what time the file system has.
"""

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from nextllm_jax import machine
from nextllm_jax.checkpoint import Checkpoints
from nextllm_jax.config import Config
from nextllm_jax.data.corpora import find_files
from nextllm_jax.data.packing import num_windows
from nextllm_jax.data.prepare import default_data_path, find_prepared, remark
from nextllm_jax.data.shards import Dataset, partial_path
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.machine import Status
from nextllm_jax.model.accounting import parameter_count
from nextllm_jax.sharding import make_mesh
from nextllm_jax.tokenizer.published import KNOWN_ENCODINGS, files_to_fetch, load_tokenizer
from nextllm_jax.tokenizer.tokenizer import Tokenizer
from nextllm_jax.training.checks import check_fits, check_not_beyond, check_platform
from nextllm_jax.training.loop import make_loader
from nextllm_jax.training.program import build_program
from nextllm_jax.training.resume_guard import CONFIG, local_workdir, require_resumable, require_same_data
from nextllm_jax.training.run_directory import require_run_or_empty, require_unlocked
from nextllm_jax.verify import check_steps, find_steps


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    message: str

    def __str__(self) -> str:
        first, *others = self.message.splitlines()
        return "\n".join([f"{self.status:8} {self.name:12} {first}", *(f"{'':22}{line}" for line in others)])


class Report:
    """Findings, each shown as it comes."""

    def __init__(self, show: Callable[[Finding], None]) -> None:
        self.findings: list[Finding] = []
        self._show = show

    def add(self, name: str, message: str, status: Status = "ok") -> None:
        """Take a finding."""
        self.findings.append(Finding(name, status, message))
        self._show(self.findings[-1])

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        """A context in which what training would end with becomes a PROBLEM."""
        try:
            yield
        except (InputError, RunFailed) as error:
            self.add(name, str(error), "PROBLEM")
        except OSError as error:
            self.add(name, f"{error.strerror or error} ({error.filename})", "PROBLEM")


def diagnose(
    config: Config,
    *,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
    show: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """The findings for a start of `train.py` with this config and these options. `show` gets each as it comes."""
    report, clocks = Report(show), (time.time(), time.monotonic())
    report.add("versions", *machine.versions())
    workdir, resumable = None, False
    with report.check("run"):
        workdir = Path(local_workdir(config))
        for change in [] if overwrite else require_resumable(workdir, config, allow_change):
            report.add("run", f"changed: {change}", "warning")
        resumable = True
    prepared, tokenizer, data_bytes = None, None, 0
    with report.check("data"):
        prepared = find_prepared(config.data)
        _report_preparation(report, config, prepared)
        data_bytes = _data_bytes(config) if prepared is None else 0
    if prepared is None and config.data.path is None:
        with report.check("tokenizer"):
            tokenizer = _tokenizer_to_be(report, config)
    mesh = None
    with report.check("devices"):
        check_platform(config)
        mesh = make_mesh(config.mesh)
        _report_devices(report, mesh)
    dataset = None
    if prepared is not None:
        with report.check("data"):
            dataset = Dataset.open(prepared, verify=config.data.verify)
            tokenizer = dataset.tokenizer()
            _report_data(report, config, dataset, tokenizer)
    if mesh is not None:
        _check_program(report, config, mesh, dataset, tokenizer)
    if resumable:
        with report.check("run"):
            step = _check_run(report, config, overwrite)
            if step is not None and dataset is not None and mesh is not None:
                _check_same_data(config, step, dataset, mesh, allow_change)
    if mesh is not None:
        report.add("memory", *machine.memory(config, mesh))
    if workdir is not None:
        with report.check("disk"):
            report.add("disk", *machine.disk(config, data_bytes=data_bytes))
            report.add("clock", *machine.clock(workdir, clocks))
    return report.findings


def _check_program(
    report: Report, config: Config, mesh: Mesh, dataset: Dataset | None, tokenizer: Tokenizer | None
) -> None:
    """Check what data, model and mesh ask of each other, as far as they are there."""
    if tokenizer is not None:
        with report.check("fit"):
            check_fits(config, tokenizer, mesh)
            report.add("fit", "vocabulary, batch, sequences and sample prompts suit the model and the mesh")
    with report.check("model"):
        build_program(config, mesh)
        report.add("model", f"{parameter_count(config.model):,} parameters, which the mesh divides")
    if dataset is not None:
        with report.check("batches"):
            _check_batches(report, config, dataset, mesh)


def _report_preparation(report: Report, config: Config, prepared: Path | None) -> None:
    """Say what data is there, or would be made; raise InputError for a corpus that cannot be found."""
    corpus = config.data.corpus
    if prepared is not None:
        said = remark(config.data, prepared)
        if said:
            report.add("data", said.removeprefix("warning: "), "warning")
        return
    if corpus.startswith("hf:"):
        if importlib.util.find_spec("datasets") is None:
            raise InputError(f"data.corpus {corpus} needs an extra package: pip install 'nextllm_jax[hf]'")
    elif corpus != "stdlib":
        find_files(corpus)
    path = default_data_path(config.data)
    state = "an interrupted preparation would continue" if partial_path(path).is_dir() else "would be prepared first"
    report.add("data", f"{path}: {state}, from {corpus}")


def _data_bytes(config: Config) -> int:
    """About the disk that preparing takes, parts and shards together; 0 where the size of the corpus is not known."""
    corpus = config.data.corpus
    if corpus == "stdlib" or corpus.startswith("hf:"):
        return 0
    # Tokens of two bytes, three bytes of text each or more, twice.
    return sum(path.stat().st_size for _, path in find_files(corpus)) * 4 // 3


def _tokenizer_to_be(report: Report, config: Config) -> Tokenizer | None:
    """The tokenizer that preparing would use, if it is on this machine. Raises InputError if it cannot be read."""
    spec = config.data.tokenizer
    if spec == "train":
        report.add("tokenizer", f"a byte-level BPE of {config.data.vocab_size:,} tokens would be trained on the corpus")
        return None
    missing = files_to_fetch(spec) if spec in KNOWN_ENCODINGS else []
    if missing:
        report.add("tokenizer", f"{spec} is not cached; the network is needed for {', '.join(missing)}", "warning")
        return None
    tokenizer = load_tokenizer(spec)
    report.add("tokenizer", f"{spec} is on this machine, {tokenizer.vocab_size:,} tokens")
    return tokenizer


def _report_devices(report: Report, mesh: Mesh) -> None:
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    report.add("devices", f"{mesh.devices.size} x {kind} ({jax.default_backend()}); mesh {axes}")


def _report_data(report: Report, config: Config, dataset: Dataset, tokenizer: Tokenizer) -> None:
    counts = ", ".join(f"{dataset.split(name).num_tokens:,} {name}" for name in ("train", "validation"))
    report.add(
        "data", f"{dataset.path}: {counts} tokens, id {dataset.data_id}, undamaged (verify {config.data.verify})"
    )
    report.add("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens, the one that made the data")


def _check_batches(report: Report, config: Config, dataset: Dataset, mesh: Mesh) -> None:
    """Raise InputError, as training would, if the data does not fill a window or the mesh does not divide a batch."""
    make_loader(config, dataset, mesh)
    length, batch = config.data.sequence_length, config.training.global_batch_size
    windows = num_windows(dataset.split("train").num_tokens, length, partial=False)
    epochs = config.training.steps * batch / windows
    said = (
        f"{windows:,} windows of {length} tokens; {config.training.steps:,} steps of {batch} are {epochs:,.2f} epochs"
    )
    if batch > windows:
        report.add("batches", f"{said}; each step repeats windows: more data, or a smaller batch", "warning")
    else:
        report.add("batches", said)


def _check_run(report: Report, config: Config, overwrite: bool) -> int | None:
    """Say what the run directory would be used for, and give the step that a run would continue from, if any.

    Raises InputError if the directory could not be used.
    """
    workdir = Path(local_workdir(config))
    require_run_or_empty(workdir)
    require_unlocked(workdir)
    if not (workdir / CONFIG).exists():
        report.add("run", f"{workdir} is free for a new run")
        return None
    if overwrite:
        report.add("run", f"the run in {workdir} would move into overwritten/ there", "warning")
        return None
    whole, damaged = [], {}
    for found in check_steps(find_steps(workdir)):
        if found.state == "ok":
            whole.append(int(found.path.name))
        elif found.state == "damaged":
            damaged[int(found.path.name)] = found
    latest = max(whole, default=0)
    for step, found in damaged.items():
        fate = "it would be set aside" if step > latest else "it is not the one to continue from"
        fatal = config.checkpoint.strict and step > latest
        report.add("run", f"{found}; {fate}", "PROBLEM" if fatal else "warning")
    check_not_beyond(config, latest)
    state = "is finished at" if latest == config.training.steps else "would continue from"
    report.add("run", f"{workdir} {state} step {latest} of {config.training.steps}")
    return latest or None


def _check_same_data(config: Config, step: int, dataset: Dataset, mesh: Mesh, allow_change: Collection[str]) -> None:
    """Raise InputError if the data is not that of the checkpoint that a run would continue from."""
    record = Checkpoints(Path(local_workdir(config)) / "checkpoints").record(step)
    position = make_loader(config, dataset, mesh).position(0)
    require_same_data(record["data"], position, dataset.path, allow_change)
