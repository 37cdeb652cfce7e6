"""`replay(bundle)` reruns training from the pinned checkpoint to the bad step, and diagnoses that step.

Nothing is written, neither in the run nor elsewhere.
"""

import dataclasses
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from nextllm_jax.checkpoint.run_dir import FLIGHT, RunDir
from nextllm_jax.checkpoint.saved_steps import SavedSteps
from nextllm_jax.config import Config
from nextllm_jax.config.files import config_of_values
from nextllm_jax.config.mixture import parse_mixture
from nextllm_jax.data.loader import TrainLoader
from nextllm_jax.data.mixture import Source, data_id
from nextllm_jax.data.shards import DataPath, data_path
from nextllm_jax.data.sources import open_sources, source_paths
from nextllm_jax.diagnostics.diagnosis import Diagnosis, diagnose
from nextllm_jax.errors import InputError
from nextllm_jax.model.objective import Batch
from nextllm_jax.model.transformer import set_matmul_precision
from nextllm_jax.progress import progress_bar
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.storage.open_storage import as_path
from nextllm_jax.training.flight_recorder import BATCH, BUNDLE, FORMAT, environment, json_number, measured
from nextllm_jax.training.program import Program, build_program
from nextllm_jax.training.resume_guard import recorded_data
from nextllm_jax.training.start import check_platform, make_loader
from nextllm_jax.training.state import TrainState
from nextllm_jax.training.step import StepMetrics

_FIELDS = {
    "step": int,
    "measured": dict,
    "data_id": str,
    "data_path": str | list,
    "versions": dict,
    "devices": str,
    "mesh": dict,
    "dtype": str,
    "config": dict,
    "windows": list,
    "checkpoint": int | None,
}
_WORST_WINDOWS = 3


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle as the flight recorder wrote it."""

    path: epath.Path
    content: dict[str, Any]
    config: Config
    windows: np.ndarray
    batch: Batch

    @classmethod
    def read(cls, path: epath.Path) -> "Bundle":
        """The bundle in a directory. Raises InputError, which names the file, if it is not a bundle or is damaged."""
        if not (path / BUNDLE).exists():
            inside = sorted(RunDir(path).flight.glob("step-*"))
            example = inside[0] if inside else "runs/NAME/flight/step-N"
            raise InputError(f"{path} is not a bundle of the flight recorder: it has no {BUNDLE}; try {example}")
        try:
            content = json.loads((path / BUNDLE).read_text())
            with np.load(io.BytesIO((path / BATCH).read_bytes())) as arrays:
                windows, batch = arrays["windows"], Batch(*(arrays[name] for name in Batch._fields))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as a bundle ({error}); restore an intact copy") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path / BUNDLE} does not have the format {FORMAT}; use the version that wrote it")
        for name, kind in _FIELDS.items():
            if not isinstance(content.get(name), kind):
                raise InputError(f"{path / BUNDLE} is damaged: '{name}' has the wrong type; restore an intact copy")
        if (content["checkpoint"] or 0) >= content["step"]:
            raise InputError(f"{path / BUNDLE} is damaged: 'checkpoint' is not before 'step'; restore an intact copy")
        return cls(path, content, config_of_values(content["config"], str(path / BUNDLE)), windows, batch)


@dataclasses.dataclass(frozen=True)
class Replay:
    """The result of a replay."""

    bundle: Bundle
    measured: dict[str, Any]
    """The metrics of the replayed step, as in the bundle."""
    differences: tuple[str, ...]
    """How this machine differs from the one that wrote the bundle."""
    diagnosis: Diagnosis | None
    """None if the replayed step was not skipped."""

    @property
    def reproduced(self) -> bool:
        """Whether the replayed step was skipped for the same reason."""
        return self.measured["reason"] == self.bundle.content["measured"]["reason"]

    @property
    def bit_for_bit(self) -> bool:
        """Whether loss, gradient norm and the norms of all layers are bit-identical."""
        return self.measured == self.bundle.content["measured"]

    def worst_windows(self) -> list[tuple[int | list[int], float]]:
        """(window, mean loss) of each window, highest loss first, after those that are not finite.

        A window is its number, or in a mixture [number of the source from 0, number in the source].
        """
        losses = self.diagnosis.window_losses if self.diagnosis else ()
        pairs = zip(self.bundle.windows.tolist(), losses, strict=False)
        return sorted(pairs, key=lambda pair: (math.isfinite(pair[1]), -pair[1] if math.isfinite(pair[1]) else 0))

    def _name_of(self, window: int | list[int]) -> str:
        if isinstance(window, int):
            return str(window)
        source, number = window
        return f"{number} of {parse_mixture(self.bundle.config.data.mixture)[source].name}"

    def rows(self) -> list[tuple[str, float | str | None, float | str]]:
        """(module, root mean square of the residual stream after it, gradient norm), in forward order."""
        rms = [*self.measured["activation_rms"], None, None]
        places, norms = self.measured["places"], self.measured["gradient_norms"]
        return list(zip(places, rms, norms, strict=False))

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values; numbers that are not finite are strings."""
        diagnosis = self.diagnosis
        return {
            "bundle": str(self.bundle.path),
            "step": self.bundle.content["step"],
            "reproduced": self.reproduced,
            "bit_for_bit": self.bit_for_bit,
            "recorded": self.bundle.content["measured"],
            "replayed": self.measured,
            "differences": list(self.differences),
            "first": diagnosis
            and {
                "pass": diagnosis.direction,
                "place": diagnosis.place,
                "layer": diagnosis.layer,
                "words": str(diagnosis),
            },
            "windows": [{"window": window, "loss": json_number(loss)} for window, loss in self.worst_windows()],
        }

    def __str__(self) -> str:
        """A report: the verdict, the diagnosis, the windows with the highest loss, and a table of the layers."""
        step, recorded = self.bundle.content["step"], self.bundle.content["measured"]
        was = f"{recorded['reason']}, loss {recorded['loss']}, gradient norm {recorded['grad_norm']}"
        now = f"{self.measured['reason']}, loss {self.measured['loss']}, gradient norm {self.measured['grad_norm']}"
        exact = "bit for bit" if self.bit_for_bit else f"but not bit for bit: now {now}"
        lines = [f"step {step} is reproduced ({was}), {exact}"]
        if not self.reproduced:
            lines = [f"step {step} is NOT reproduced: recorded {was}; now {now}"]
        lines += [f"this machine differs from the recorded one: {difference}" for difference in self.differences]
        if self.diagnosis:
            lines.append(str(self.diagnosis))
            worst = self.worst_windows()[:_WORST_WINDOWS]
            shown = ", ".join(f"{self._name_of(window)} ({loss:.4g})" for window, loss in worst)
            lines.append(f"windows with the highest loss: {shown}")
        lines.append(f"{'module':<24}{'activation rms after it':>26}{'gradient norm':>16}")
        for module, rms, norm in self.rows():
            after = "" if rms is None else f"{float(rms):.4g}"
            lines.append(f"{module:<24}{after:>26}{float(norm):>16.4g}")
        return "\n".join(lines)


def replay(path: str | os.PathLike[str], *, data: Sequence[str] = ()) -> Replay:
    """Replay the bundle in `path`, with progress on standard error.

    `data` has the directory of each source of its data, if they were moved.

    Raises InputError if the bundle, the data or the checkpoint cannot be used, or if they do not belong together.
    """
    bundle = Bundle.read(as_path(path))
    config = bundle.config
    check_platform(config)
    if jax.process_count() > 1:
        raise InputError("a replay runs in one process; start one process with as many devices as the run had")
    mesh = make_mesh(config.mesh)
    sources = _open_data(bundle, data)
    program = build_program(config, mesh)
    set_matmul_precision(program.model.dtype)
    loader = make_loader(config, sources, mesh)
    with jax.set_mesh(mesh):
        checkpoints = _find_checkpoint(bundle, loader)
        _check_batch(bundle, loader)
        start = bundle.content["checkpoint"]
        if checkpoints is None and config.init_from is not None:
            raise InputError(
                f"{path} starts from the weights of init_from, which the run had not saved yet; train again"
            )
        state = program.restore_state(checkpoints, start)[0] if checkpoints else program.create_state()
        state, metrics = _run(bundle, program, loader, state)
        found = measured(config, metrics)
        diagnosis = None
        if found["reason"] != "none":  # the step was skipped, so `state` still has its parameters
            before = dataclasses.replace(state, step=state.step - 1)
            diagnosis = diagnose(
                config, program.model, before, bundle.batch, sharding(mesh, "batch", "seq"), program.objective
            )
    here = environment(mesh, program.model.dtype)
    return Replay(bundle, found, _differences(bundle.content, here), diagnosis)


def _differences(recorded: dict[str, Any], here: dict[str, Any]) -> tuple[str, ...]:
    """The differences that may affect the exact values of a result, one string each."""
    names = ("devices", "mesh", "dtype")
    pairs = [(name, recorded[name], here[name]) for name in names]
    pairs += [(name, recorded["versions"].get(name), version) for name, version in here["versions"].items()]
    return tuple(f"{name} {before} -> {after}" for name, before, after in pairs if before != after)


def _open_data(bundle: Bundle, data: Sequence[str]) -> tuple[Source, ...]:
    """The sources of a bundle: in `data`, in the recorded directories, or in the default ones of its config."""
    config, paths = bundle.config.data, bundle.content["data_path"]
    recorded = [data_path(path) for path in ([paths] if isinstance(paths, str) else paths)]
    found = [data_path(path) for path in data] if data else recorded
    sources = open_sources(config, found if data or all(path.exists() for path in recorded) else source_paths(config))
    if data_id(sources) != bundle.content["data_id"]:
        raise InputError(
            f"{_places(source.dataset.path for source in sources)} holds other data ({data_id(sources)}) than the "
            f"bundle's run used ({bundle.content['data_id']}); name the directory of that data with --data"
        )
    return sources


def _places(directories: Iterable[DataPath]) -> str:
    return ", ".join(map(str, directories))


def _find_checkpoint(bundle: Bundle, loader: TrainLoader) -> SavedSteps | None:
    """The checkpoints of the bundle's run, including the one to start from; None: start at step 0.

    The loader resumes at the data position of that checkpoint. Raises InputError if the checkpoint is missing.
    """
    step = bundle.content["checkpoint"]
    if step is None:
        return None
    checkpoints = SavedSteps(RunDir(bundle.path.absolute().parent.parent).checkpoints)
    if step not in checkpoints.steps():
        raise InputError(
            f"checkpoint {step}, which {bundle.path} starts from, is not in {checkpoints.directory}; keep the bundle "
            f"in its run's {FLIGHT}/ and the checkpoint in the run"
        )
    loader.resume(recorded_data(checkpoints.record(step)))
    return checkpoints


def _check_batch(bundle: Bundle, loader: TrainLoader) -> None:
    """Raise InputError if the loader does not give the recorded batch, or if the bundle's two files disagree."""
    windows, batch = loader.whole_batch(bundle.content["step"] - 1)
    same = all(np.array_equal(ours, theirs) for ours, theirs in zip(batch, bundle.batch, strict=True))
    if not same or not np.array_equal(windows, bundle.windows) or windows.tolist() != bundle.content["windows"]:
        raise InputError(
            f"{_places(loader.directories)} gives another batch than {bundle.path / BATCH} holds; the bundle is "
            "damaged, or another version of the loader wrote it: use that version"
        )


def _run(bundle: Bundle, program: Program, loader: TrainLoader, state: TrainState) -> tuple[TrainState, StepMetrics]:
    """The state and the metrics after the bad step."""
    first, last = int(state.step), bundle.content["step"]
    batches = loader.batches(first)
    metrics: StepMetrics | None = None
    for _ in progress_bar(range(first, last), desc=f"replaying steps {first + 1} to {last}", unit=" steps"):
        if metrics is not None:
            jax.block_until_ready(metrics)  # the bar shows finished steps, with only one in progress
        state, metrics = program.train_step(state, next(batches))
    assert metrics is not None
    return jax.block_until_ready((state, metrics))
