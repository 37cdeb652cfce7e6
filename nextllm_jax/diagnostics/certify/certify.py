"""`certify(path)`: all comparisons of a model, from its token ids to the exports that other programs read."""

import contextlib
import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nextllm_jax.diagnostics.certify import certificate, programs, text
from nextllm_jax.diagnostics.certify.certificate import Certificate, Row, failed, skipped
from nextllm_jax.diagnostics.certify.forward import Weights, compare_layers, relative_difference
from nextllm_jax.diagnostics.certify.probes import KEPT, LONGEST, Probe, make_probes
from nextllm_jax.diagnostics.certify.same_model import fault_of, same_model
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import available_host_memory, readable_bytes
from nextllm_jax.inference.load import load_source
from nextllm_jax.model.accounting import parameter_count
from nextllm_jax.pretrained import model_card
from nextllm_jax.pretrained.convert import export_adapter, export_model
from nextllm_jax.pretrained.open_model import open_model
from nextllm_jax.pretrained.source import Source, open_path
from nextllm_jax.progress import phase
from nextllm_jax.published_models import resolve
from nextllm_jax.storage.downloads import local_copy
from nextllm_jax.storage.open_storage import open_storage
from nextllm_jax.tokenizer.huggingface import save_huggingface
from nextllm_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

Format = Literal["huggingface", "gguf"]
FORMATS: tuple[Format, ...] = ("huggingface", "gguf")
_GGUF_ROUNDS = {"norms": 2e-7, "scales": 2e-3}
"""Rounding of a GGUF file, relative to the greatest value: norms to which it adds 1, and float16 scales."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to certify."""

    step: str | int | None = None
    against: str | None = None
    """The model that this one was made from."""
    python: str | None = None
    """Interpreter with transformers or llama.cpp; None: this one."""
    longest: int = LONGEST
    """Tokens of the longest probe."""
    memory_bytes: int | None = None
    """Memory for the weights; None: half of what is available."""


def certify(path: str, settings: Settings, show: Callable[[Row], None] = lambda _: None) -> Certificate:
    """Compare the model at `path` with other implementations and with its own exports.

    `show` is called for each row as soon as it is known. Raises InputError if there is no model at `path`.
    """
    with tempfile.TemporaryDirectory(prefix="nextllm-certify-") as folder:
        certifying = _Certifying(path, settings, Path(folder), show)
        certifying.run()
    return Certificate(Path(path).name, tuple(certifying.rows), certifying.conversation)


def write_certificate(path: str, found: Certificate) -> Path | None:
    """Write certificate.json into a Hugging Face directory on disk; None for any other model."""
    directory = Path(path)
    if not _is_huggingface(directory):
        return None
    file = directory / certificate.FILE
    values = {**found.to_json(), "files": certificate.hashes(directory)}
    try:
        content = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        open_storage(directory).write(certificate.FILE, content.encode())
    except OSError as error:
        _log.warning("%s cannot be written (%s)", file, error.strerror or error)
        return None
    try:
        _update_card(directory, found)
    except (OSError, UnicodeDecodeError) as error:
        _log.warning("the model card in %s cannot be updated (%s)", directory, error)
    return file


def _update_card(directory: Path, found: Certificate) -> None:
    """Write the result into the model card of an export, if it has one."""
    file = directory / model_card.FILE
    if file.is_file():
        rows = [(row.check, row.status, row.fault or row.detail.splitlines()[0]) for row in found.rows]
        verdict = f"{found.verdict[0].upper()}{found.verdict[1:]}. {certificate.FILE} has the details."
        card = model_card.with_certificate(file.read_text(encoding="utf-8"), verdict, rows)
        if card is not None:
            open_storage(directory).write(model_card.FILE, card.encode())


def _is_huggingface(directory: Path) -> bool:
    return directory.is_dir() and not open_path(str(directory)).is_run


class _Certifying:
    """The state of one `certify`: the rows so far, and what they compare."""

    def __init__(self, path: str, settings: Settings, folder: Path, show: Callable[[Row], None]) -> None:
        self.path, self._settings, self._folder, self._show = path, settings, folder, show
        self.rows: list[Row] = []
        self.conversation: str | None = None
        self._source: Source = open_model(path, step=settings.step)
        self._file = Path(local_copy(resolve(path)))
        if self._format == "gguf":
            from nextllm_jax.interop.gguf import files_of

            self._file = files_of(self._file)[0]  # the part with the metadata
        self._weights = Weights(self._source)
        self._tokenizer: Tokenizer | None = None

    def run(self) -> None:
        """Add all rows."""
        self._check_files()
        self._check_text()
        if self._settings.against is not None:
            self._compare_with(self._settings.against)
        try:
            if self._tokenizer is not None:
                self._add([text.check_end_rows(self._tokenizer, self._weights)])
            if self._format is not None and self._source.config.num_experts:
                from nextllm_jax.diagnostics.certify import files

                self._add([files.check_experts(self._file, self._weights)])
            exports = {each: self._export(each) for each in FORMATS}
            self._check_logits(exports)
        except InputError as error:
            self._add([failed("weights", str(error), fault_of(error))])

    def _add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.rows.append(row)
            self._show(row)

    @property
    def _format(self) -> Format | None:
        """The format of the files; None for a run."""
        if self._source.is_run:
            return None
        return "huggingface" if self._file.is_dir() else "gguf"

    @property
    def _num_rows(self) -> int:
        """Rows of the embedding in an export."""
        size = self._source.config.vocab_size
        return self._source.vocab_size or min(self._tokenizer.vocab_size if self._tokenizer else size, size)

    def _fits(self) -> bool:
        """Whether a copy of the weights in float32 fits the memory, and two fit the disk."""
        size = 4 * parameter_count(self._source.config)
        memory = self._settings.memory_bytes or (available_host_memory() or 0) // 2
        return size <= memory and 2 * size < shutil.disk_usage(self._folder).free

    def _check_files(self) -> None:
        """Facts that the files state."""
        if self._format is not None:
            from nextllm_jax.diagnostics.certify import files  # needs the packages that open_model has imported

            check = files.check_huggingface if self._format == "huggingface" else files.check_gguf
            self._add([check(self._file, self._source.config)])

    def _check_text(self) -> None:
        """Token ids, special tokens and the loss mask."""
        try:
            tokenizer = self._tokenizer = self._source.load_tokenizer()
        except InputError as error:
            self._add([skipped("token ids", str(error))])
            return
        file = self._file / "tokenizer.json"
        if self._format != "huggingface" or not file.is_file():
            save_huggingface(tokenizer, self._folder / "tokenizer")
            file = self._folder / "tokenizer" / "tokenizer.json"
        directory = self._file if self._format == "huggingface" else None
        self._add([text.check_ids("token ids: tokenizers", tokenizer, file)])
        self._add([text.check_special(tokenizer, self._source.config.vocab_size, directory)])
        rows, self.conversation = text.check_conversation(tokenizer)
        self._add(rows)
        self._add([text.check_spelled_tokens(tokenizer)])

    def _compare_with(self, path: str) -> None:
        """Compare with the model that this one was made from."""
        other = open_model(path)
        tolerance = _GGUF_ROUNDS["norms"] if self._format == "gguf" else 0.0
        self._add(same_model(f"as {Path(path).name}", other, Weights(other), self._source, tolerance=tolerance))

    def _export(self, file_format: Format) -> Path | None:
        """The model in a format: its own directory, or an export that was compared with it; None if there is none."""
        name = {"huggingface": "Hugging Face", "gguf": "GGUF"}[file_format]
        own = self._file if self._format == file_format == "huggingface" else None
        if not self._fits():
            size = readable_bytes(4 * parameter_count(self._source.config))
            self._add([skipped(f"export to {name}", f"{size} of weights exceed the memory or the disk")])
            return own
        output = self._folder / ("hf" if file_format == "huggingface" else "model.gguf")
        try:
            with _quiet():
                export_model(self.path, str(output), file_format=file_format, dtype="float32", step=self._settings.step)
        except InputError as error:
            self._add([skipped(f"export to {name}", str(error))])
            return own
        tolerance = 0.0
        if file_format == "gguf":
            is_quantized = self._source.quantization is not None
            tolerance = _GGUF_ROUNDS["scales" if is_quantized else "norms"]
            tolerance = tolerance if is_quantized or self._source.config.norm_scale_offset else 0.0
        again = open_path(str(output))
        self._add(same_model(f"export to {name}", self._source, self._weights, again, tolerance=tolerance))
        return own or output

    def _check_logits(self, exports: dict[str, Path | None]) -> None:
        """Logits of this package, transformers and llama.cpp against those of the numpy model."""
        probes, python = make_probes(self._source.config, self._num_rows, self._settings.longest), self._settings.python
        file, tokenizer, config = exports["gguf"], self._tokenizer, self._source.config
        llama_cpp = None
        if file is not None and tokenizer is not None:
            llama_cpp = programs.ask_llama_cpp(file, config, probes, tokenizer, python=python)
            probes = programs.with_continuations(probes, llama_cpp)
        with phase("comparing layer by layer"):
            compared = compare_layers(self._weights, probes, programs.LOGITS)
        remark = f"; it begins at {compared.first}"
        for probe, difference in zip(probes, compared.differences, strict=True):
            self._add([programs.logits_row(f"numpy, {probe}", difference, remark=remark)])
        if compared.margins:
            self._add([programs.margins_row(compared.margins)])
        self._check_loaded(probes, compared.logits)
        if exports["huggingface"] is not None:
            self._check_transformers(exports["huggingface"], probes, compared.logits)
        self._check_adapters(probes, compared.logits)
        if llama_cpp is not None and tokenizer is not None:
            self._add(
                programs.compare_llama_cpp(
                    _versioned("llama.cpp", llama_cpp),
                    llama_cpp,
                    self._weights,
                    probes,
                    compared.logits,
                    rows_in_file=self._num_rows,
                    quantized=self._source.quantization is not None,
                )
            )
            if llama_cpp.values:
                ids = llama_cpp.values["ids"]
                self._add([text.compare_ids("token ids: llama.cpp", tokenizer, text.PLAIN_TEXTS, ids, "llama.cpp")])
            self._check_own_gguf(probes, compared.logits, tokenizer)

    def _check_loaded(self, probes: list[Probe], logits: list[np.ndarray]) -> None:
        """The logits of `nextllm_jax.load`, as a user gets them."""
        if not self._fits():
            self._add([skipped("nextllm_jax.load", "the weights exceed the memory")])
        elif self._source.quantization is not None:
            self._add(
                [skipped("nextllm_jax.load", "on a CPU, quantized weights are rounded once more when they are loaded")]
            )
        else:
            llm = load_source(self._source, self.path, dtype="float32")
            for probe, expected in zip(probes, logits, strict=True):
                if probe.is_plain:
                    found = np.asarray(llm.logits([probe.tokens]))[0, -KEPT:, : expected.shape[-1]]
                    self._add([programs.logits_row(f"nextllm_jax.load, {probe}", relative_difference(found, expected))])

    def _check_transformers(self, directory: Path, probes: list[Probe], logits: list[np.ndarray]) -> None:
        memory = None if self._fits() else self._settings.memory_bytes or (available_host_memory() or 0) // 2
        answer = programs.ask_transformers(
            directory, probes, self._tokenizer, python=self._settings.python, memory_bytes=memory
        )
        name = _versioned("transformers", answer)
        self._add(programs.compare_transformers(name, answer, self._weights, probes, logits))
        if self._tokenizer is not None:
            self._add(programs.compare_transformers_text(answer, self._tokenizer, self._source.config.vocab_size))

    def _check_adapters(self, probes: list[Probe], logits: list[np.ndarray]) -> None:
        """The adapters of a run, written for PEFT, on the base model in transformers."""
        adapters = self._source.adapters
        if adapters is None:
            return
        if adapters.config.frozen != "unquantized":
            self._add([skipped("peft", f"the base weights are quantized ({adapters.config.frozen})")])
            return
        directory, written = self._folder / "base", self._folder / "adapter"
        try:
            with _quiet():
                export_model(adapters.base, str(directory), file_format="huggingface", dtype="float32")
                export_adapter(self.path, str(written), step=self._settings.step)
        except InputError as error:
            self._add([skipped("peft", str(error))])
            return
        answer = programs.ask_transformers(directory, probes, None, python=self._settings.python, adapter=written)
        self._add(programs.compare_transformers("peft", answer, self._weights, probes, logits))

    def _check_own_gguf(self, probes: list[Probe], logits: list[np.ndarray], tokenizer: Tokenizer) -> None:
        """The user's own GGUF file, which may be quantized, in llama.cpp."""
        if self._format != "gguf":
            return
        answer = programs.ask_llama_cpp(
            self._file, self._source.config, probes, tokenizer, python=self._settings.python
        )
        name = "the file itself in llama.cpp"
        rows = programs.compare_llama_cpp(
            name, answer, self._weights, probes, logits, rows_in_file=self._num_rows, quantized=True
        )
        self._add(rows)


def _versioned(program: str, answer: Any) -> str:
    version = answer.values.get("version")
    return f"{program} {version}" if version else program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context without the messages of an export."""
    logger = logging.getLogger("nextllm_jax")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
