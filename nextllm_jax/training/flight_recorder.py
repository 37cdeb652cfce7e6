"""The flight recorder writes a bundle for the first of consecutive skipped steps; `nextllm replay` shows its cause.

A bundle is a directory flight/step-<n> of the run. Step numbers are those of metrics.jsonl, so the batch of step n has
index n - 1. A bundle contains
    bundle.json   the step's metrics, the config, the data, versions, and the checkpoint from which a replay starts
    batch.npz     tokens, targets, segment ids, positions and loss mask of the global batch, and its window numbers
A directory without bundle.json, which is written last, is not a bundle.
Numbers are exact. Values that JSON cannot represent are the strings nan, inf and -inf.
"""

import io
import json
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jaxlib.version
import numpy as np

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.orbax_errors import cause
from nextllm_jax.checkpoint.run_dir import FLIGHT, RunDir
from nextllm_jax.checkpoint.step_files import versions
from nextllm_jax.config import Config
from nextllm_jax.data.loader import TrainLoader
from nextllm_jax.errors import RunFailed
from nextllm_jax.model import layer_norms
from nextllm_jax.training.hooks import Hook
from nextllm_jax.training.step import SKIP_REASONS, StepMetrics

_log = logging.getLogger(__name__)

FORMAT = "nextllm-flight-1"
BUNDLE, BATCH = "bundle.json", "batch.npz"
MAX_BUNDLES = 8
_IDENTITY = ("step", "measured", "data_id", "config")

_WHY = {
    "loss": "its loss is not finite",
    "gradient": "its gradient is not finite",
    "update": "its learning rate or parameters are so large that the update might not be finite",
    "spike": "its loss is a spike",
}


def json_number(value: float) -> float | str:
    """A float as a JSON value that `float` converts back exactly; a string if it is not finite."""
    return float(value) if math.isfinite(value) else str(float(value))


def measured(config: Config, metrics: StepMetrics) -> dict[str, Any]:
    """A step's metrics as JSON; bit-identical steps give equal values. Waits for the step."""
    metrics = jax.device_get(metrics)
    return {
        "reason": _reason(metrics),
        "loss": json_number(_loss(metrics)),
        "num_tokens": int(metrics.num_tokens),
        **{
            name: json_number(float(getattr(metrics, name)))
            for name in ("nll_sum", "grad_norm", "learning_rate", "loss_limit")
        },
        "places": layer_norms.places(config.model),
        "gradient_norms": [json_number(norm) for norm in metrics.gradient_norms.tolist()],
        "activation_rms": [json_number(rms) for rms in metrics.activation_rms.tolist()],
    }


def _reason(metrics: StepMetrics) -> str:
    return SKIP_REASONS[int(metrics.reason)]


def _loss(metrics: StepMetrics) -> float:
    return float(metrics.nll_sum) / max(int(metrics.num_tokens), 1)


def environment(mesh: jax.sharding.Mesh, dtype: np.dtype) -> dict[str, Any]:
    """What the exact values of a step depend on in addition to the config: versions, devices, mesh and dtype."""
    return {
        "versions": {**versions(), "jaxlib": jaxlib.version.__version__},
        "devices": f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "dtype": dtype.name,
    }


class FlightRecorder(Hook):
    """Checks each step of a run, reports skipped steps, and writes bundles to `run`/flight.

    All processes make the same calls; process 0 writes. `about` is the result of `environment`. A run has at most
    MAX_BUNDLES bundles. Before the recorder fails the run, it calls `before_failure` with the last step.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        loader: TrainLoader,
        checkpoints: Checkpoints,
        about: dict[str, Any],
        before_failure: Callable[[int], None],
    ) -> None:
        self._run = run
        self._config, self._loader, self._checkpoints = config, loader, checkpoints
        self._about, self._before_failure = about, before_failure
        names = sorted(name for name in run.names(FLIGHT) if name.startswith("step-"))
        self._bundles = {name: _identity(run, f"{FLIGHT}/{name}/{BUNDLE}") for name in names}
        self._last: tuple[int, StepMetrics] | None = None
        """A step that is not checked yet, since it may be running."""
        self._bad = False

    def after_step(self, step: int, metrics: StepMetrics) -> None:
        """Check the step before this one. Raises RunFailed after too many consecutive skipped steps."""
        self.pause()
        self._last = step, metrics

    def pause(self) -> None:
        """Check the last step, before a save can delete the checkpoint from which its replay starts."""
        if self._last is not None:
            last, self._last = self._last, None
            self._check(*last)

    def _check(self, step: int, metrics: StepMetrics) -> None:
        """Report a step if it was skipped, with a bundle if the step before it was not. Waits for the step."""
        if not metrics.skipped:
            self._bad = False
            return
        reason, consecutive = _reason(metrics), int(metrics.skipped_in_a_row)
        why = _WHY[reason]
        if reason == "spike":
            why += f" (loss {_loss(metrics):.4f}, limit {float(metrics.loss_limit):.4f})"
        recorded = "" if self._bad else self._record(step, metrics)
        self._bad = True
        _log.warning(f"step {step}: {why}; skipped ({consecutive} consecutive){recorded}")
        if consecutive >= self._config.training.max_skipped_steps:
            self._before_failure(step)
            self._give_up(step, consecutive)

    def _give_up(self, step: int, consecutive: int) -> None:
        latest = self._checkpoints.latest_step()
        state = f"the last checkpoint is step {latest}" if latest is not None else "there is no checkpoint yet"
        raise RunFailed(
            f"{consecutive} consecutive steps up to step {step} were skipped (training.max_skipped_steps); {state}; "
            f"run nextllm replay on a bundle in {self._run.flight}, lower optimizer.learning_rate, or check the data"
        )

    def _record(self, step: int, metrics: StepMetrics) -> str:
        """Write the bundle of a step; returns the end of the message about the step.

        Deterministic across processes: it depends on the bundles found at startup and on those recorded since.
        """
        paths = [str(directory.absolute()) for directory in self._loader.directories]
        content = {
            "format": FORMAT,
            "step": step,
            "measured": measured(self._config, metrics),
            "seed": self._config.seed,
            "data_id": self._loader.position(step)["data_id"],
            "data_path": paths[0] if len(paths) == 1 else paths,
            **self._about,
            "config": json.loads(self._config.to_json()),
        }
        identity = [content[name] for name in _IDENTITY]
        name = next((name for name, known in self._bundles.items() if known == identity), None)
        if name is None:
            if len(self._bundles) >= MAX_BUNDLES:
                return f"; no bundle is written, since {self._run.flight} already has {len(self._bundles)}"
            name, number = f"step-{step}", 2
            while name in self._bundles:  # a bundle of this step with other settings
                name, number = f"step-{step}-{number}", number + 1
            self._bundles[name] = identity
            content["checkpoint"] = self._pin(step)
            if jax.process_index() == 0:
                try:
                    self._write(f"{FLIGHT}/{name}", content)
                except (OSError, RunFailed) as error:  # the run can continue without it
                    return f"; its bundle {self._run.flight / name} cannot be written ({cause(error)})"
        return f"; to find the cause: nextllm replay {self._run.flight / name}"

    def _pin(self, step: int) -> int | None:
        """Pin the last checkpoint before a step for its replay, and return its step.

        Returns None if there is none; a replay then starts at step 0. Every process finds the same checkpoint, since
        this first waits for the current save.
        """
        self._checkpoints.wait()
        before = [saved for saved in self._checkpoints.steps() if saved < step]
        if not before:
            return None
        self._checkpoints.pin(before[-1])
        return before[-1]

    def _write(self, bundle: str, content: dict[str, Any]) -> None:
        windows, batch = self._loader.whole_batch(content["step"] - 1)
        arrays = io.BytesIO()
        np.savez_compressed(arrays, windows=windows, **batch._asdict())
        self._run.write(f"{bundle}/{BATCH}", arrays.getvalue())
        text = json.dumps(content | {"windows": windows.tolist()}, indent=2) + "\n"
        self._run.write(f"{bundle}/{BUNDLE}", text.encode())


def _identity(run: RunDir, bundle: str) -> list[Any] | None:
    """The values by which two bundles of the same step are recognized, also in a resumed run; None if unreadable."""
    try:
        content = json.loads(run.read(bundle))
        return [content[name] for name in _IDENTITY]
    except (OSError, ValueError, KeyError, TypeError):
        return None
