"""Batch sampling: prompts from a JSON lines file, and an output file that a rerun of the command continues."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from nextllm_jax.checkpoint.manifest import read_manifest
from nextllm_jax.checkpoint.orbax_errors import writing
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.checkpoint.saved_steps import SavedSteps
from nextllm_jax.config import SamplingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.progress import progress_bar
from nextllm_jax.published_models import resolve
from nextllm_jax.storage.disk import Disk, lock_file
from nextllm_jax.storage.downloads import local_copy
from nextllm_jax.storage.open_storage import require_local

if TYPE_CHECKING:
    from nextllm_jax.inference.llm import LLM

SETTINGS_SUFFIX = ".settings.json"

_DEFAULTS = json.loads(json.dumps(dataclasses.asdict(SamplingConfig())))
"""Values of settings that files of earlier versions lack, as JSON has them."""

Row = tuple[int, int]
"""The index of an input line, and the index of a sample of its prompt; both start at 0."""


def read_prompts(path: str) -> dict[int, str]:
    """The prompt of each line of a JSON lines file, by the 0-based index of the line; "-" reads standard input.

    Empty lines are left out. Raises InputError, which names the file and the line, if one is not an object with a text
    "prompt"; its other keys are ignored. Raises InputError if there is no prompt at all.
    """
    name = "standard input" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file of JSON lines") from error
    prompts = {}
    for index, line in enumerate(content.split(b"\n")):
        if not line.strip():
            continue
        where = f"{name} line {index + 1}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{where} is not JSON ({error}); fix or remove the line") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise InputError(f'{where} has no text "prompt"; write {{"prompt": "..."}}')
        # JSON can contain lone surrogates, which cannot be encoded in UTF-8.
        prompts[index] = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not prompts:
        raise InputError(f'{name} holds no prompt; write a line {{"prompt": "..."}} for each')
    return prompts


def weights_of(checkpoint: str, step: str | None) -> tuple[str, str | None]:
    """A hash that identifies the weights of a model, and its step as a number; None if the model has no steps.

    The hash covers the content of a run's checkpoint, and names, sizes and modification times of other files.
    """
    checkpoint = local_copy(resolve(checkpoint))
    run = RunDir(checkpoint)
    if run.checkpoints.is_dir():
        saved = SavedSteps(run.checkpoints)
        number = saved.resolve(step)
        saved.record(number)  # raises InputError if the manifest is damaged
        identity: Any = read_manifest(saved.path(number))["files"]
        step = str(number)
    else:
        path = Path(checkpoint)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        identity = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16], step


class SamplesFile:
    """An output file with one JSON line per sample: `rows` are those that belong in it, `done` those that it holds.

    `settings` is what determines the samples besides the prompts, and includes num_samples. It is stored in a second
    file next to the output, so samples of different settings are not mixed. Use as a context, which holds a lock.

    Entering it drops an incomplete last line, which an interrupted write leaves. It raises InputError if the file
    cannot be written, if another process writes it, or if its samples have other prompts or settings.
    """

    def __init__(self, path: str, prompts: dict[int, str], settings: dict[str, Any]) -> None:
        require_local(path, "--output")
        self.path = epath.Path(path)
        self.rows = [(index, sample) for index in prompts for sample in range(settings["num_samples"])]
        self.done: set[Row] = set()
        self._prompts = prompts
        self._settings = json.loads(json.dumps(settings))
        self._disk = Disk(self.path.resolve().parent)
        self._name = self.path.resolve().name

    def __enter__(self) -> "SamplesFile":
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"--output {self.path} is not a regular file; choose another --output")
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(
                f"--output {self.path} cannot be written ({error.strerror}); choose another --output"
            ) from error
        try:
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def _read(self) -> None:
        """Check what the file holds, set `done`, and write the settings."""
        if not lock_file(self._descriptor):
            raise InputError(f"--output {self.path} is in use by another process; wait for it, or choose another")
        content = self._disk.read(self._name)
        whole = content[: content.rfind(b"\n") + 1]
        if content:
            self._require_same_settings(whole)
        if whole:
            self.done = {self._row(number, line) for number, line in enumerate(whole.split(b"\n")[:-1], 1)}
        with writing(self.path):
            os.truncate(self._descriptor, len(whole))
            self._disk.write(self._name + SETTINGS_SUFFIX, json.dumps(self._settings, indent=1).encode() + b"\n")

    def _require_same_settings(self, samples: bytes) -> None:
        try:
            old = _DEFAULTS | json.loads(self._disk.read(self._name + SETTINGS_SUFFIX))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"--output {self.path} was not written by nextllm sample; choose another --output"
            ) from error
        for name in old | self._settings:
            before, now = old.get(name), self._settings.get(name)
            if samples and before != now:
                option = f"--{name.replace('_', '-')}"
                change = f"with {option} {json.dumps(before)}, not {json.dumps(now)}"
                raise InputError(
                    f"{self.path} was sampled {'from another checkpoint' if name == 'weights' else change}; "
                    "use the old options to continue it, or choose another --output"
                )

    def _row(self, number: int, line: bytes) -> Row:
        try:
            sample = json.loads(line)
            row, prompt = (int(sample["index"]), int(sample.get("sample", 0))), sample["prompt"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.path} line {number} is not a sample; remove the line, or choose another --output"
            ) from error
        if self._prompts.get(row[0]) != prompt:
            raise InputError(
                f"{self.path} line {number} has another prompt than line {row[0] + 1} of the prompts file; "
                "continue it with its own prompts file, or choose another --output"
            )
        return row

    def append(self, row: Row, sample: dict[str, Any]) -> None:
        """Write a sample as a line. Raises RunFailed if that fails, and then nothing is written."""
        which = {"index": row[0], "sample": row[1]} if self._settings["num_samples"] > 1 else {"index": row[0]}
        with writing(self.path):
            self._disk.append(self._name, json.dumps({**which, **sample}).encode() + b"\n")
        self.done.add(row)

    def sort(self) -> None:
        """Sort the lines by the order of the prompts and their samples."""
        lines = self._disk.read(self._name).splitlines(keepends=True)
        ordered = sorted(lines, key=lambda line: ((sample := json.loads(line))["index"], sample.get("sample", 0)))
        if ordered != lines:
            with writing(self.path):
                self._disk.write(self._name, b"".join(ordered))


def sample_missing(
    llm: "LLM",
    file: SamplesFile,
    prompts: dict[int, str],
    *,
    batch_size: int,
    num_samples: int,
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int,
    stop: Sequence[str],
    slide: bool = False,
) -> None:
    """Sample the rows that `file` lacks, and write each when it ends.

    Rows of similar length form a batch. Batches do not depend on what the file holds, so a continued file has the same
    samples, bit for bit, as one that was never interrupted.
    """
    tokens = {index: llm.tokenizer.encode_prompt(prompt) for index, prompt in prompts.items()}
    rows = sorted(file.rows, key=lambda row: (-len(tokens[row[0]]), row))
    with progress_bar(desc="sampling", total=len(rows), initial=len(file.done), unit=" samples") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            if file.done.issuperset(batch):
                continue
            stream = llm.stream_tokens(
                [tokens[index] for index, _ in batch],
                texts=[prompts[index] for index, _ in batch],
                samples=[sample for _, sample in batch],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                stop=stop,
                slide=slide,
            )
            for piece in stream:
                if piece.sample is not None and batch[piece.row] not in file.done:
                    file.append(batch[piece.row], piece.sample.as_dict())
                    bar.update()
