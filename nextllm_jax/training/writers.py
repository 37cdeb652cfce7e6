"""`MetricsWriter`: writes the measurements of a run to metrics.jsonl, TensorBoard event files and trackers."""

import io
import json
import math
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from nextllm_jax.checkpoint.run_dir import METRICS, TENSORBOARD, RunDir
from nextllm_jax.config import ModelConfig
from nextllm_jax.model import layer_norms
from nextllm_jax.training.hooks import OptionalOutput
from nextllm_jax.training.metrics import EXPERT_FIELDS
from nextllm_jax.training.trackers import Tracker

_LAYER_FIELDS = ("gradient_norms", "activation_rms")
# The fields of a line of metrics.jsonl, in order.
_FIELDS = ("step", "split", "loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second",
           "processed_tokens_per_second", "mfu", "input_wait_fraction", "tokens_seen", "elapsed_seconds",
           *_LAYER_FIELDS)  # fmt: skip
_NAMED = ("loss", "bits_per_byte", "lm_eval")
"""In a validation record, a slash and the name of a source, text or task may follow, such as in loss/web."""
_ONLY_IN = {"bits_per_byte": "validation"} | dict.fromkeys(_LAYER_FIELDS, "train")


class MetricsWriter:
    """Writes records to metrics.jsonl, to TensorBoard and to the trackers.

    `initial_step` is the step from which a run resumes, None for a new run. metrics.jsonl is truncated after it, since
    those steps are written again. The validation record of that step itself is kept only if it was `evaluated`. With
    `enabled` False (in all processes except process 0), nothing is read or written. If metrics.jsonl cannot be written,
    RunFailed is raised. TensorBoard is an optional output.
    """

    def __init__(
        self,
        run: RunDir,
        model: ModelConfig,
        *,
        initial_step: int | None = None,
        evaluated: bool = False,
        enabled: bool = True,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._run, self._places, self._enabled = run, layer_norms.places(model), enabled
        self._sparse = [f"layer {layer}" for layer in model.sparse_layers]
        self._trackers = trackers
        self._output = OptionalOutput("TensorBoard")
        self._tensorboard: _TensorBoard | None = None
        if enabled:
            _truncate(run, initial_step, evaluated)
            # Not at the first record, since the time of the import would count for a train step.
            self._output.write(lambda: self._open_tensorboard(initial_step))

    def _open_tensorboard(self, initial_step: int | None) -> None:
        self._tensorboard = _TensorBoard(self._run, initial_step)

    def train(self, record: dict[str, Any]) -> None:
        """Write a record from `TrainMeter.read`."""
        self._write("train", record)

    def validation(self, record: dict[str, Any]) -> None:
        """Write the record of an evaluation."""
        self._write("validation", record)

    def _write(self, split: str, record: dict[str, Any]) -> None:
        """Append a line with all fields of the split; null for fields that the record lacks."""
        named = [name for name in record if name.partition("/")[0] in _NAMED and name not in _FIELDS]
        named += [name for name in EXPERT_FIELDS if name in record]
        unknown = set(record) - {*_FIELDS, *named}
        if unknown:
            raise ValueError(f"metrics.jsonl has no fields {sorted(unknown)}")
        if not self._enabled:
            return
        fields = [name for name in _FIELDS if _ONLY_IN.get(name, split) == split] + named
        line = {name: _json_value((record | {"split": split}).get(name)) for name in fields}
        self._run.append(METRICS, json.dumps(line, allow_nan=False).encode() + b"\n")
        step, scalars = line["step"], self._scalars(split, line)
        if board := self._tensorboard:
            self._output.write(lambda: board.scalars(step, scalars))
        for tracker in self._trackers:
            tracker.scalars(step, scalars)

    def _scalars(self, split: str, line: dict[str, Any]) -> dict[str, float]:
        """The numbers of a line by tag, such as train/loss and train/gradient_norms/layer 0 mlp."""
        scalars = {}
        for name, value in line.items():
            if isinstance(value, list):
                places = self._sparse if name in EXPERT_FIELDS else self._places
                scalars |= _by_place(name, places, value)
            elif name != "step":
                scalars[name] = value
        return {f"{split}/{name}": value for name, value in scalars.items() if isinstance(value, (int, float))}

    def close(self) -> None:
        """Stop writing to the event file."""
        self._tensorboard = None


def _by_place(name: str, places: Sequence[str], values: list[Any]) -> dict[str, Any]:
    """The values of a list by tag, such as gradient_norms/layer 0 mlp or, in a list by expert, expert_share/layer 0/3.

    TensorBoard shows the tags up to the last slash as one group.
    """
    scalars = {}
    for place, value in zip(places, values, strict=False):
        parts = {f"/{expert}": each for expert, each in enumerate(value)} if isinstance(value, list) else {"": value}
        scalars |= {f"{name}/{place}{part}": each for part, each in parts.items()}
    return scalars


class _TensorBoard:
    """One event file, to which each event is appended, so a full disk raises an error here."""

    def __init__(self, run: RunDir, initial_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._run, self._file, self._record = run, f"{TENSORBOARD}/{name}", io.BytesIO()
        self._writer = RecordWriter(self._record)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # With this event TensorBoard hides earlier events of the run after the step from which it resumes.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=0 if initial_step is None else initial_step + 1, session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(self._event(step=step, wall_time=time.time(), summary=self._summary(value=scalars)))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._run.append(self._file, self._record.getvalue())
        self._record.seek(0)
        self._record.truncate()


def _json_value(value: Any) -> Any:
    """A JSON value; None for NaN and infinity, which JSON cannot represent. Numbers in lists have 4 digits."""
    if isinstance(value, list):
        return [float(f"{each:.4g}") if isinstance(each, float) else each for each in map(_json_value, value)]
    if value is None or isinstance(value, (int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _truncate(run: RunDir, last_step: int | None, evaluated: bool) -> None:
    """Remove the lines of metrics.jsonl after `last_step` (None: all lines), and incomplete lines.

    The validation line of `last_step` itself is kept only if `evaluated` is true.
    """
    content, kept = run.read(METRICS), []
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            keep = last_step is not None and record["step"] <= last_step and line.endswith(b"\n")
            keep = keep and (evaluated or record["step"] < last_step or record["split"] != "validation")
        except (ValueError, KeyError, TypeError):
            continue  # an incomplete line of a killed process
        if keep:
            kept.append(line)
    if b"".join(kept) != content:
        run.write(METRICS, b"".join(kept))
