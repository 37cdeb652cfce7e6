"""Training metrics: token-weighted loss, throughput and MFU."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from nextllm_jax.model.moe import RouterSums
from nextllm_jax.model.objective import Batch, perplexity
from nextllm_jax.training.step import StepMetrics

EXPERT_FIELDS = ("expert_share", "expert_load", "router_entropy", "dropped_share")
"""The fields of `expert_record`, which a training record has after the others."""


def expert_record(sums: RouterSums) -> dict[str, Any]:
    """The fields of `metrics.jsonl` about experts: a list with a value, or a list by expert, for each sparse layer.

    `expert_share`: share of an expert in the choices of all tokens. `expert_load`: that of the most loaded expert over
    the mean. `router_entropy`: mean entropy of the router's probabilities in nats. `dropped_share`: share of the
    choices that model.capacity_factor drops.
    """
    choices_S = np.maximum(np.sum(sums.tokens_E, axis=1), 1)
    share_SE = sums.tokens_E / choices_S[:, None]
    values = (
        share_SE,
        np.max(share_SE, axis=1) * share_SE.shape[1],
        sums.entropy / np.maximum(sums.counted, 1),
        sums.dropped / choices_S,
    )
    return {name: value.tolist() for name, value in zip(EXPERT_FIELDS, values, strict=True)}


class TrainMeter:
    """Sums of metrics over train steps. The values stay on the device until they are read.

    The clock starts paused. A step that is added while it is paused, such as the one that compiles, counts for
    everything except the throughput. The time between `pause` and `resume`, such as for evaluation or saving, does not
    count for the throughput.

    `flops_per_token` is for the forward and backward pass of one token in the loss mask. `peak_flops` is the sum over
    all devices, or None for an unknown chip, which has no MFU. `tokens_per_step` counts all tokens of a batch, also
    those outside the loss mask. `record` is the `state` of an earlier part of the same run, if there is one.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        peak_flops: float | None,
        tokens_per_step: int,
        record: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._tokens_per_step = tokens_per_step
        self._clock = clock
        record = record or {}
        self._began = clock() - record.get("elapsed_seconds", 0.0)
        self._running_since: float | None = None
        self._pending: list[tuple[StepMetrics, bool]] = []
        self._tokens_seen = record.get("tokens_seen", 0)
        self._start_window()
        self._nll_sum, self._num_tokens = record.get("unread", (0.0, 0))

    def _start_window(self) -> None:
        self._nll_sum = 0.0
        self._num_tokens = 0
        self._timed_tokens = 0
        self._timed_steps = 0
        self._timed_seconds = 0.0
        self._waited_seconds = 0.0
        self._last: StepMetrics | None = None
        self._shown: StepMetrics | None = None
        """The step whose norms are shown: the last that was skipped, or else the last."""

    def state(self) -> dict[str, Any]:
        """The state to store in a checkpoint, as JSON: the totals, and the sums since the last `read`."""
        return {**self.totals(), "unread": [self._nll_sum, self._num_tokens]}

    def totals(self) -> dict[str, Any]:
        """The totals of the run so far. Waits for the last step.

        `tokens_seen`: tokens in the loss mask of all steps, including skipped ones. `elapsed_seconds`: wall time,
        including pauses.
        """
        self._drain()
        return {"tokens_seen": self._tokens_seen, "elapsed_seconds": self._clock() - self._began}

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. The time that this takes counts for input_wait_fraction while the clock runs."""
        began = self._clock()
        batch = next(batches)
        if self._running_since is not None:
            self._waited_seconds += self._clock() - began
        return batch

    def add(self, metrics: StepMetrics) -> None:
        """Add the metrics of a step, without waiting for it."""
        self._pending.append((metrics, self._running_since is not None))

    def resume(self) -> None:
        """Wait for the added steps and start the clock. Does nothing if the clock is already running."""
        if self._running_since is None:
            self._drain()
            self._running_since = self._clock()

    def pause(self) -> None:
        """Wait for the added steps and stop the clock, if it is running."""
        self._drain()
        if self._running_since is not None:
            self._timed_seconds += self._clock() - self._running_since
            self._running_since = None

    def _drain(self) -> None:
        """Wait for the pending steps and add them up on the host, in float64 and exact integers."""
        steps = jax.device_get([metrics for metrics, _ in self._pending])
        for metrics, (_, timed) in zip(steps, self._pending, strict=True):
            num_tokens = int(metrics.num_tokens)
            self._tokens_seen += num_tokens
            self._timed_tokens += num_tokens if timed else 0
            self._timed_steps += timed
            self._last = metrics
            if metrics.skipped or self._shown is None or not self._shown.skipped:
                self._shown = metrics
            if not metrics.skipped:
                self._nll_sum += float(metrics.nll_sum)
                self._num_tokens += num_tokens
        self._pending = []

    def read(self, step: int) -> dict[str, Any]:
        """The record of the steps since the last read, with the names of `metrics.jsonl`. Waits for the last step.

        `loss` is the mean over the tokens in the loss mask of steps that were not skipped, or NaN if all were.
        `learning_rate` and `grad_norm` are those of the last step. `gradient_norms` and `activation_rms` are lists, see
        `StepMetrics`, of the last step that was skipped, or else of the last step, as are the fields of
        `expert_record`, if the model has experts. `input_wait_fraction` is the
        fraction of the timed seconds in which the host waited for data. `tokens_per_second` counts the tokens in the
        loss mask, and `processed_tokens_per_second` all tokens. These three are None if no step was timed.
        """
        self._drain()
        if self._running_since is not None:
            now = self._clock()
            self._timed_seconds += now - self._running_since
            self._running_since = now
        loss = self._nll_sum / self._num_tokens if self._num_tokens else math.nan
        timed = self._timed_tokens > 0 and self._timed_seconds > 0
        tokens_per_second = self._timed_tokens / self._timed_seconds if timed else None
        mfu = None
        if tokens_per_second is not None and self._peak_flops is not None:
            mfu = tokens_per_second * self._flops_per_token / self._peak_flops
        last, shown = self._last, self._shown
        record = {
            "step": step,
            "loss": loss,
            "perplexity": perplexity(loss),
            "learning_rate": float(last.learning_rate) if last else None,
            "grad_norm": float(last.grad_norm) if last else None,
            "gradient_norms": shown.gradient_norms.tolist() if shown else None,
            "activation_rms": shown.activation_rms.tolist() if shown else None,
            "tokens_per_second": tokens_per_second,
            "processed_tokens_per_second": (
                self._timed_steps * self._tokens_per_step / self._timed_seconds if timed else None
            ),
            "mfu": mfu,
            "input_wait_fraction": self._waited_seconds / self._timed_seconds if timed else None,
            **self.totals(),
            **(expert_record(shown.routing) if shown and shown.routing else {}),
        }
        self._start_window()
        return record
