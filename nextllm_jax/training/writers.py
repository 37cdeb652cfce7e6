"""The outputs of a run: progress on the terminal, metrics.jsonl, TensorBoard, loss.png and samples.txt."""

import contextlib
import datetime
import io
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nextllm_jax.checkpoint import orbax_errors
from nextllm_jax.checkpoint.run_dir import LOSS, METRICS, SAMPLES, RunDir
from nextllm_jax.errors import InputError, RunFailed

# The fields of a line of metrics.jsonl, in order; only validation lines have bits_per_byte.
_FIELDS = ("step", "split", "loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm",
           "tokens_per_second", "mfu", "input_wait_fraction", "tokens_seen", "elapsed_seconds")  # fmt: skip
_SAMPLES_HEADER = re.compile(rb"^===== step (\d+) =====$")
_INDENT = "    "


def _json_value(value: Any) -> Any:
    """A JSON value; None for NaN and infinity, which JSON cannot represent."""
    if value is None or isinstance(value, (int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _truncate_metrics(run: RunDir, last_step: int | None, evaluated: bool) -> list[dict[str, Any]]:
    """Truncate metrics.jsonl after `last_step` (None: remove all records), and return the remaining records.

    The validation record of `last_step` itself is kept only if `evaluated` is true.
    """
    content = run.read(METRICS)
    records, lines = [], []
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            keep = last_step is not None and record["step"] <= last_step and line.endswith(b"\n")
            keep = keep and (evaluated or record["step"] < last_step or record["split"] != "validation")
        except (ValueError, KeyError, TypeError):
            continue  # an incomplete line of a killed process
        if keep:
            records.append(record)
            lines.append(line)
    kept = b"".join(lines)
    if kept != content:
        run.write(METRICS, kept)
    return records


def _truncate_samples(run: RunDir, last_step: int | None) -> int | None:
    """Truncate samples.txt after `last_step` (None: remove all blocks), and return its last step, if any."""
    content, last = run.read(SAMPLES), None
    kept, keep = [], last_step is not None
    for line in content.split(b"\n"):
        header = _SAMPLES_HEADER.match(line)
        if header:
            step = int(header.group(1))
            keep = last_step is not None and step <= last_step
            last = step if keep else last
        if keep:
            kept.append(line)
    if content and len(kept) < content.count(b"\n") + 1:
        run.write(SAMPLES, b"\n".join([*kept, b""]) if kept else b"")
    return last


@contextlib.contextmanager
def _without_environment(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def draw_losses(train: list[tuple[int, float]], validation: list[tuple[int, float]]) -> bytes:
    """A PNG that plots the two losses, given as (step, loss), over the step."""
    with _without_environment("MPLBACKEND"):  # for example a notebook's: matplotlib fails on an unknown backend
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#7aa6d6", linewidth=1.2, label="train")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#c0392b", linewidth=1.8, marker="o", label="validation")
        step, loss = validation[-1]
        axes.annotate(f"{loss:.3f}", (step, loss), xytext=(0, 8), textcoords="offset points", ha="right")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    png = io.BytesIO()
    canvas.print_png(png)
    return png.getvalue()


class _TensorBoard:
    """One event file, which is written synchronously.

    tensorboardX's SummaryWriter writes from a thread with a short queue. If that thread dies because the disk is full,
    training waits for the queue forever. So this uses its RecordWriter directly.
    """

    def __init__(self, directory: os.PathLike[str], initial_step: int | None) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._event, self._summary = Event, Summary
        os.makedirs(directory, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._writer = RecordWriter(os.path.join(directory, name))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # With this event TensorBoard hides earlier events of the run after the step from which it resumes.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=0 if initial_step is None else initial_step + 1, session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(self._event(step=step, wall_time=time.time(), summary=self._summary(value=scalars)))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Writers:
    """Writes all outputs of a run, to its directory and to the terminal.

    `initial_step` is the step from which a run resumes, None for a new run. The files are truncated after it, since
    those steps are written again. The validation record of that step itself is kept only if it was `evaluated`. With
    `enabled` False (in all processes except process 0), nothing is read, written or printed. If metrics.jsonl cannot be
    written, RunFailed is raised. The other outputs are optional: a failure disables only that output, with a warning.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        total_steps: int,
        initial_step: int | None = None,
        evaluated: bool = False,
        enabled: bool = True,
    ) -> None:
        self._run = run
        self._total_steps = total_steps
        self._enabled = enabled
        self._failed: set[str] = set()
        self.last_samples_step: int | None = None
        """The last step in samples.txt; None if it is empty."""
        self._curves: dict[str, list[tuple[int, float]]] = {"train": [], "validation": []}
        self._tensorboard: _TensorBoard | None = None
        self._bar: Any = None
        self._first_progress: tuple[float, int] | None = None
        if enabled:
            for record in _truncate_metrics(run, initial_step, evaluated):
                self._remember(record)
            self.optional(SAMPLES, lambda: self._truncate_samples(initial_step))
            # Not at the first record, since the time of the import would count for a train step.
            self.optional("TensorBoard", lambda: self._open_tensorboard(initial_step))

    def _truncate_samples(self, initial_step: int | None) -> None:
        self.last_samples_step = _truncate_samples(self._run, initial_step)

    def _open_tensorboard(self, initial_step: int | None) -> None:
        self._tensorboard = _TensorBoard(self._run.tensorboard, initial_step)

    def _remember(self, record: dict[str, Any]) -> None:
        if record.get("split") in self._curves and record.get("loss") is not None:
            self._curves[record["split"]].append((record["step"], record["loss"]))

    def optional(self, output: str, write: Callable[[], object]) -> None:
        """Write an optional output. After its first failure, which is reported, the output is disabled."""
        if output in self._failed:
            return
        try:
            write()
        except Exception as error:
            self._failed.add(output)
            kind = "" if isinstance(error, OSError | InputError | RunFailed) else f"{type(error).__name__}: "
            self.message(f"WARNING: {output} is disabled for this training ({kind}{orbax_errors.cause(error)})")

    def train(self, record: dict[str, Any]) -> None:
        """Write a record from `TrainMeter.read`, and show it as progress."""
        self._record("train", record)
        self.progress(record["step"], record["loss"], record.get("tokens_per_second"))

    def validation(self, record: dict[str, Any]) -> None:
        """Write and print the record of an evaluation."""
        self._record("validation", record)
        bits = record["bits_per_byte"]
        self.message(
            f"step {record['step']}: validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}"
            + ("" if bits is None else f", {bits:.4f} bits per byte")
        )

    def picture(self) -> None:
        """Redraw loss.png."""
        if self._enabled:
            self.optional(LOSS, lambda: self._run.write(LOSS, draw_losses(**self._curves)))

    def _record(self, split: str, record: dict[str, Any]) -> None:
        """Append a line with all fields of the split; null for fields that the record lacks."""
        unknown = set(record) - set(_FIELDS)
        if unknown:
            raise ValueError(f"metrics.jsonl has no fields {sorted(unknown)}")
        if not self._enabled:
            return
        fields = [name for name in _FIELDS if split == "validation" or name != "bits_per_byte"]
        line = {name: _json_value((record | {"split": split}).get(name)) for name in fields}
        self._run.append(METRICS, json.dumps(line, allow_nan=False).encode() + b"\n")
        self._remember(line)
        values: dict[str, float] = {
            f"{split}/{name}": value for name, value in line.items() if isinstance(value, (int, float))
        }
        del values[f"{split}/step"]
        if board := self._tensorboard:
            self.optional("TensorBoard", lambda: board.scalars(line["step"], values))

    def samples(self, step: int, texts: Iterable[tuple[str, str]]) -> None:
        """Append a block of (prompt, continuation) pairs to samples.txt, indented."""
        if not self._enabled:
            return
        blocks = [f"===== step {step} =====\n"]
        for prompt, text in texts:
            indented = (prompt + text).replace("\n", "\n" + _INDENT)
            blocks.append(f"prompt: {prompt!r}\n{_INDENT}{indented}\n")
        self._run.append(SAMPLES, ("\n".join(blocks) + "\n").encode(errors="replace"))
        self.last_samples_step = step

    def progress(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Show the progress of the run: a bar on a terminal; otherwise a line for each call with a loss."""
        if not self._enabled:
            return
        if self._first_progress is None:
            self._first_progress = (time.monotonic(), step)
        words = [] if loss is None else [f"loss {loss:.4f}"]
        words += [] if tokens_per_second is None else [f"{tokens_per_second:,.0f} tokens/s"]
        if sys.stderr.isatty():
            self._move_bar(step, words)
        elif loss is not None:
            print(", ".join([f"step {step}/{self._total_steps}", *words, f"ETA {self._eta(step)}"]), flush=True)

    def _move_bar(self, step: int, words: list[str]) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total_steps,
                initial=step,  # so that the estimated time does not include compilation
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {elapsed} ETA {remaining}{postfix}",
            )
        self._bar.update(step - self._bar.n)
        if words:
            self._bar.set_postfix_str(", ".join(words))

    def _eta(self, step: int) -> str:
        """Estimated remaining time, from the pace since the first call of `progress`, which is after compilation."""
        assert self._first_progress is not None
        began, first = self._first_progress
        if step <= first:
            return "?"
        return _duration((time.monotonic() - began) / (step - first) * (self._total_steps - step))

    def message(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self._enabled:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """Close the progress bar and the event file."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._tensorboard is not None:
            self.optional("TensorBoard", self._tensorboard.close)
            self._tensorboard = None
