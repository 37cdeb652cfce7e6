"""Checks what would go wrong if `train.py` were started now, in the order in which it would, without starting it.

The checks are the same as in training. Only temporary files are written: files in or next to the run directory, to
test what is permitted there and to compare clocks; and, if the data is not prepared yet, a small part of the prepared
data.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.checkpoint.verify import check_steps, find_steps
from nextllm_jax.config import Config, DataConfig
from nextllm_jax.config.files import workdir_of
from nextllm_jax.data import mixture
from nextllm_jax.data.files import find_files, has_files
from nextllm_jax.data.prepare import prepare_sample
from nextllm_jax.data.settings import CONTENT_FIELDS, check_unchanged, find_data
from nextllm_jax.data.shards import DataPath, partial_path
from nextllm_jax.data.sources import open_sources, source_paths
from nextllm_jax.diagnostics import bucket, machine
from nextllm_jax.diagnostics.machine import Status
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.pretrained.init_from import require_tokenizer
from nextllm_jax.pretrained.source import Source
from nextllm_jax.storage.open_storage import is_address
from nextllm_jax.tokenizer.published import KNOWN_ENCODINGS, files_to_fetch
from nextllm_jax.training.open_run import require_startable
from nextllm_jax.training.resume_guard import allowed_fields, with_recorded_data
from nextllm_jax.training.start import CHECKS, Check, Start, resume_data
from nextllm_jax.training.vocabulary import with_vocab_size

SAMPLE_CHARACTERS = 1_000_000
"""Number of characters that are read and tokenized of a corpus that is not prepared yet."""


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
    """A list of findings. Each is shown as soon as it is added."""

    def __init__(self, show: Callable[[Finding], None]) -> None:
        self.findings: list[Finding] = []
        self._show = show

    def add(self, name: str, message: str, status: Status = "ok") -> None:
        """Add a finding, unless one with the same message was added before."""
        if message not in (finding.message for finding in self.findings):
            self.findings.append(Finding(name, status, message))
            self._show(self.findings[-1])

    def add_all(self, name: str, findings: Iterable[tuple[str, Status]]) -> None:
        """Add each finding, a message and its status."""
        for message, status in findings:
            self.add(name, message, status)

    @contextlib.contextmanager
    def check(self, name: str, status: Status = "PROBLEM") -> Iterator[None]:
        """A context in which an error that would end training becomes a finding."""
        try:
            yield
        except (InputError, RunFailed) as error:
            self.add(name, str(error), status)
        except OSError as error:
            self.add(name, f"{error.strerror or error} ({error.filename})", status)

    def make(self, check: Check, start: Start, failure: Status = "PROBLEM") -> None:
        """Run one of the checks of training."""
        with self.check(check.name, failure):
            for text, is_warning in check.run(start):
                self.add(check.name, text, "warning" if is_warning else "ok")

    def passed(self, name: str) -> bool:
        """Whether no finding of this name is a problem."""
        return not any(found.status == "PROBLEM" for found in self.findings if found.name == name)


def diagnose(
    config: Config,
    *,
    source: Source | None = None,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
    show: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """The findings for a start of `train.py` with this config and these options. `show` is called with each.

    `source` is the opened model of init_from; None for a run that exists already, which does not need it.
    """
    report, clocks = Report(show), (time.time(), time.monotonic())
    report.add("versions", *machine.versions())
    with tempfile.TemporaryDirectory(prefix="nextllm-doctor-") as temporary:
        data = _Data(config, Path(temporary), report)
        with report.check("run"):
            if not RunDir(workdir_of(config)).is_local:
                report.add_all("bucket", bucket.check_run(workdir_of(config)))
            if report.passed("bucket"):
                for change in require_startable(config, overwrite=overwrite, allow_change=allow_change):
                    report.add("run", f"changed: {change}", "warning")
        with report.check("scratch"):
            if config.checkpoint.scratch and is_address(config.checkpoint.scratch):
                report.add_all("scratch", bucket.check_run(config.checkpoint.scratch))
        has_run = report.passed("run") and report.passed("bucket")
        with report.check("data"):
            if config.data.path and is_address(config.data.path):
                report.add_all("data", bucket.check_data(config.data.path))
            data.find(RunDir(workdir_of(config)), overwrite or not report.passed("bucket"), allow_change)
        with report.check("data"):
            first = data.paths[0] if data.paths and not data.is_part else None
            config = with_vocab_size(config, first, overwrite=overwrite or not has_run)
        start = Start(config, data.open, overwrite, allow_change)
        for check in CHECKS:
            if data.paths or not check.needs_data:
                # A failure on part of the corpus is a warning, since the complete corpus may pass.
                report.make(check, start, "warning" if check.needs_data and data.is_part else "PROBLEM")
        if data.is_prepared and source is not None:
            with report.check("tokenizer"):
                require_tokenizer(config, source, data.paths[0])
        if report.passed("devices") and config.model.vocab_size:
            report.add("memory", *machine.memory(config, start.mesh))
            report.add("save", *machine.save_time(config, start.mesh))
        if has_run:
            with report.check("run"):
                _check_run(report, start, with_data=data.is_prepared)
            with report.check("disk"):
                report.add("disk", *machine.disk(config, data_bytes=data.bytes_to_write))
                report.add("clock", *machine.clock(workdir_of(config), clocks))
    return report.findings


class _NeedsNetwork(Exception):
    """A corpus or a tokenizer must be downloaded first."""


class _Data:
    """The data of a config. What is not prepared yet is the beginning of its corpus, prepared in `temporary`."""

    def __init__(self, config: Config, temporary: Path, report: Report) -> None:
        self._config = config.data
        self._whole, self._temporary, self._report = config, temporary, report
        self.paths: list[DataPath] = []
        """The prepared data of each source, or the beginning of its corpus; empty if one has neither."""
        self.is_prepared = self.is_part = False
        self.bytes_to_write = 0
        """Approximate disk space that preparing needs; 0 if the size of a corpus is unknown."""

    def open(self) -> tuple[mixture.Source, ...]:
        """The sources of the data."""
        assert self.paths
        return open_sources(self._config, self.paths)

    def find(self, run: RunDir, overwrite: bool, allow_change: Collection[str]) -> None:
        """Find the prepared data, or prepare a part of it, and report which. Raises InputError as `prepare` does."""
        accepted = allowed_fields(allow_change)
        if not overwrite and run.exists():
            self._config = with_recorded_data(self._whole, run).data
            accepted = frozenset(CONTENT_FIELDS)
        with contextlib.suppress(_NeedsNetwork):
            self.paths = source_paths(self._config, functools.partial(self._find_source, accepted=accepted))
            self.is_prepared = not any(Path(path).is_relative_to(self._temporary) for path in self.paths)

    def _find_source(self, config: DataConfig, accepted: Collection[str]) -> DataPath:
        path, is_ready = find_data(config)
        if is_ready:
            self._report.add("data", str(path))
            if config.path and (difference := check_unchanged(config, path, accepted)):
                self._report.add("data", difference, "warning")
            return path
        is_started = partial_path(Path(path)).is_dir()
        state = "an interrupted preparation would continue" if is_started else "would be prepared"
        # The name follows from the tokenizer, of which there is only a sample if the first source is not prepared.
        name = "its directory" if Path(config.tokenizer).is_relative_to(self._temporary) else path
        self._report.add("data", f"{name}: {state} from {config.corpus}")
        if missing := _to_fetch(config):
            self._report.add("data", f"the network is needed for {', '.join(missing)}", "warning")
            raise _NeedsNetwork
        sample = Path(tempfile.mkdtemp(dir=self._temporary))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            is_part = not prepare_sample(config, sample, SAMPLE_CHARACTERS)
        if is_part:
            self.is_part = True
            self._report.add(
                "data", f"the checks below use only the first {SAMPLE_CHARACTERS:,} characters of the corpus"
            )
        if has_files(config):
            # A token takes 2 bytes, is at least 3 bytes of text, and is written twice: in a part and in a shard.
            self.bytes_to_write += find_files(config).num_bytes * 4 // 3
        return sample


def _to_fetch(config: DataConfig) -> list[str]:
    """What preparing would download. Raises InputError if the package for that is missing."""
    missing = files_to_fetch(config.tokenizer) if config.tokenizer in KNOWN_ENCODINGS else []
    name = config.corpus.removeprefix("hf:")
    if name != config.corpus:
        if importlib.util.find_spec("datasets") is None:
            raise InputError(f"data.corpus {config.corpus} needs an extra package: pip install 'nextllm_jax[hf]'")
        missing += [] if Path(name).is_dir() else [config.corpus]
    return missing


def _check_run(report: Report, start: Start, *, with_data: bool) -> None:
    """Report how the run directory would be used. Raises InputError if its data does not fit or does not suffice."""
    record = _check_steps(report, start)
    if with_data and report.passed("devices") and report.passed("batches"):
        for text, _ in resume_data(start, record):
            report.add("batches", text)


def _check_steps(report: Report, start: Start) -> dict[str, Any]:
    """Report the state of the run directory. Returns the record of the latest checkpoint; empty if there is none."""
    config, run = start.config, RunDir(workdir_of(start.config))
    if not run.exists():
        report.add("run", f"{run.path} is free for a new run")
        return {}
    if start.overwrite:
        report.add("run", f"the run in {run.path} would be moved into its overwritten/", "warning")
        return {}
    found = list(check_steps(find_steps(run.path)))
    whole = [int(step.path.name) for step in found if step.state == "ok" and step.path.parent != run.base]
    latest = max(whole, default=None)
    for step in found:
        if not step.failed:
            continue
        newer = latest is None or int(step.path.name) > latest
        if step.path.parent == run.base or latest is None or (newer and step.state == "unreadable"):
            report.add("run", f"{step}; training needs it", "PROBLEM")
        elif newer:
            report.add("run", f"{step}; it would be set aside", "PROBLEM" if config.checkpoint.strict else "warning")
        else:
            report.add("run", f"{step}; training would continue from a later one", "warning")
    if latest is None:
        report.add("run", f"{run.path} has no complete checkpoint; training would start at step 0")
        return {}
    state = "is finished at" if latest == config.training.steps else "would continue from"
    report.add("run", f"{run.path} {state} step {latest} of {config.training.steps}")
    return Checkpoints(run.checkpoints).record(latest)
