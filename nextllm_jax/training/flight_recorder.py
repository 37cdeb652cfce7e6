"""The flight recorder: what is kept of the first bad step of a stretch, so that `nextllm replay` can show its cause.

A bundle is a directory flight/step-<n> of the run, where n counts the step itself, as in metrics.jsonl: its batch is
the one with index n - 1. It holds
    bundle.json   what the step measured, the config, the data, versions, and the checkpoint to start a replay from
    batch.npz     tokens, targets, segment ids, positions and mask of the whole global batch, and its window numbers
Without bundle.json, which is written last, it is no bundle.
Numbers are exact; those that JSON does not have are the words nan, inf and -inf.
"""

import io
import json
import math
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
from nextllm_jax.training.step import SKIP_REASONS, StepMetrics
from nextllm_jax.training.writers import Writers

FORMAT = "nextllm-flight-1"
BUNDLE, BATCH = "bundle.json", "batch.npz"
MAX_BUNDLES = 8
_IDENTITY = ("step", "measured", "data_id", "config")

_WHY = {
    "loss": "its loss is not finite",
    "gradient": "its gradient is not finite",
    "update": "its update would make parameters that are not finite",
    "spike": "its loss is a spike",
}


def json_number(value: float) -> float | str:
    """A float as JSON that `float` reads back exactly: a word for what is not finite."""
    return float(value) if math.isfinite(value) else str(float(value))


def measured(config: Config, metrics: StepMetrics) -> dict[str, Any]:
    """What a step's metrics say, as JSON; equal for equal steps. Waits for the step."""
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
    """What the bits of a step depend on beside the config: a replay elsewhere may round differently."""
    return {
        "versions": {**versions(), "jaxlib": jaxlib.version.__version__},
        "devices": f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "dtype": dtype.name,
    }


class FlightRecorder:
    """Looks at each step of a run once, reports a skipped one, and writes bundles to `run`/flight.

    All processes make the same calls; process 0 writes. `about` is `environment`'s. At most MAX_BUNDLES lie in a run.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        loader: TrainLoader,
        checkpoints: Checkpoints,
        writers: Writers,
        about: dict[str, Any],
    ) -> None:
        self._run = run
        self._config, self._loader, self._checkpoints, self._writers = config, loader, checkpoints, writers
        self._about = about
        names = sorted(name for name in run.names(FLIGHT) if name.startswith("step-"))
        self._bundles = {name: _identity(run, f"{FLIGHT}/{name}/{BUNDLE}") for name in names}
        self._seen = 0
        self._bad = False

    def look(self, step: int, metrics: StepMetrics) -> None:
        """Report step `step` if it was skipped, with a bundle if the step before was not. Waits for the step.

        A step that was looked at already is left alone. Raises RunFailed after too many skipped steps in a row.
        """
        if step <= self._seen:
            return
        self._seen = step
        if not metrics.skipped:
            self._bad = False
            return
        reason, in_a_row = _reason(metrics), int(metrics.skipped_in_a_row)
        why = _WHY[reason]
        if reason == "spike":
            why += f" (loss {_loss(metrics):.4f}, limit {float(metrics.loss_limit):.4f})"
        recorded = "" if self._bad else self._record(step, metrics)
        self._bad = True
        self._writers.message(f"step {step}: {why}; it is skipped ({in_a_row} in a row){recorded}")
        if in_a_row >= self._config.training.max_skipped_steps:
            self._give_up(step, in_a_row)

    def _give_up(self, step: int, in_a_row: int) -> None:
        latest = self._checkpoints.latest_step()
        stands = f"the checkpoint of step {latest} stands" if latest is not None else "there is no checkpoint yet"
        raise RunFailed(
            f"{in_a_row} steps in a row were skipped (training.max_skipped_steps), the last one step {step}; {stands}; "
            f"see nextllm replay and {self._run.flight}, lower optimizer.learning_rate, or look at the data"
        )

    def _record(self, step: int, metrics: StepMetrics) -> str:
        """Write the bundle of a step; the end of the sentence that reports it.

        All processes decide alike, by what they found at the start and have recorded since.
        """
        content = {
            "format": FORMAT,
            "step": step,
            "measured": measured(self._config, metrics),
            "seed": self._config.seed,
            "data_id": self._loader.position(step)["data_id"],
            "data_path": str(self._loader.directory.absolute()),
            **self._about,
            "config": json.loads(self._config.to_json()),
        }
        identity = [content[name] for name in _IDENTITY]
        name = next((name for name, known in self._bundles.items() if known == identity), None)
        if name is None:
            if len(self._bundles) >= MAX_BUNDLES:
                return f"; {self._run.flight} has {len(self._bundles)} bundles and takes no more"
            name, number = f"step-{step}", 2
            while name in self._bundles:  # of this step with other settings
                name, number = f"step-{step}-{number}", number + 1
            self._bundles[name] = identity
            content["checkpoint"] = self._pin(step)
            if jax.process_index() == 0:
                try:
                    self._write(f"{FLIGHT}/{name}", content)
                except (OSError, RunFailed) as error:  # the run can go on without it
                    return f"; its bundle {self._run.flight / name} cannot be written ({cause(error)})"
        return f"; to see where it went wrong: nextllm replay {self._run.flight / name}"

    def _pin(self, step: int) -> int | None:
        """Keep the last checkpoint before a step for its replay; None: there is none, a replay starts at step 0.

        Every process finds the same one, since none is being saved then.
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
    """What two bundles of the same step have in common, though a continued run wrote the second; None if unreadable."""
    try:
        content = json.loads(run.read(bundle))
        return [content[name] for name in _IDENTITY]
    except (OSError, ValueError, KeyError, TypeError):
        return None
