"""`TrainLog`: the hook that measures steps, shows the progress, and writes the training lines of metrics.jsonl."""

import datetime
import logging
import math
import sys
import time
from typing import Any

from nextllm_jax.config import Config
from nextllm_jax.progress import progress_bar
from nextllm_jax.training.hooks import Hook, is_due
from nextllm_jax.training.metrics import TrainMeter
from nextllm_jax.training.step import StepMetrics
from nextllm_jax.training.writers import MetricsWriter

_log = logging.getLogger(__name__)

_MESSAGE_SECONDS = 30.0
"""Least time between the messages above a bar."""

_MOST = 0.95
"""Fraction of the tokens in the loss mask from which the others, such as those between documents, are not mentioned."""


class TrainLog(Hook):
    """Adds every step to the meter, and writes and shows what it reads every `training.log_every_steps` steps.

    On a terminal the progress is a bar, with a message at most every 30 seconds that stays above it; otherwise a
    message for each line. With `enabled` False (in all processes except process 0), nothing is shown.
    """

    def __init__(self, config: Config, meter: TrainMeter, writer: MetricsWriter, *, enabled: bool = True) -> None:
        self._config, self._meter, self._writer = config, meter, writer
        self._total_steps = config.training.steps
        self._bar: Any = None
        self._has_bar = enabled and sys.stderr.isatty()
        self._first: tuple[float, int] | None = None
        """Time and step of the first call of `after_step`, which is after compilation."""
        self._written = 0
        self._last_message = -math.inf
        """Time of the last message above the bar."""

    def after_step(self, step: int, metrics: StepMetrics) -> None:
        """Move the bar; if a line is due, wait for the step and write it."""
        self._meter.add(metrics)
        self._meter.resume()
        self._first = self._first or (time.monotonic(), step)
        self._move_bar(step)
        if is_due(self._config, self._config.training.log_every_steps, step):
            self.write_line(step)

    def write_line(self, step: int) -> None:
        """Write and show the line of a step, the last that was dispatched, unless it is written. Waits for the step."""
        if step > self._written:
            self._written = step
            record = self._meter.read(step)
            self._writer.train(record)
            self._show(record)

    def pause(self) -> None:
        """Wait for the last step. The time until the next step does not count for the throughput."""
        self._meter.pause()

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def _move_bar(self, step: int) -> None:
        if self._has_bar and self._bar is None:  # not earlier: the ETA does not include compilation
            self._bar = progress_bar(desc="step", total=self._total_steps, initial=step, unit=" steps")
        elif self._bar is not None:
            self._bar.update(step - self._bar.n)

    def _show(self, record: dict[str, Any]) -> None:
        """Show the loss and the throughput of a record."""
        words = [f"loss {record['loss']:.4f}"]
        if (scored := record["tokens_per_second"]) is not None:
            processed = record["processed_tokens_per_second"]
            in_mask = f" in the loss mask ({processed:,.0f} processed)" if scored < _MOST * processed else ""
            words.append(f"{scored:,.0f} tokens/s{in_mask}")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(words))
        if self._bar is None or time.monotonic() - self._last_message >= _MESSAGE_SECONDS:
            self._last_message = time.monotonic()
            step = record["step"]
            _log.info(", ".join([f"step {step}/{self._total_steps}", *words, f"ETA {self._eta(step)}"]))

    def _eta(self, step: int) -> str:
        """Estimated remaining time."""
        assert self._first is not None
        began, first = self._first
        if step <= first:
            return "?"
        seconds = (time.monotonic() - began) / (step - first) * (self._total_steps - step)
        return str(datetime.timedelta(seconds=round(seconds)))
