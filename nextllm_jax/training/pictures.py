"""loss.png, layers.png and experts.png: what metrics.jsonl says about a run and its layers, drawn over the steps."""

import contextlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from nextllm_jax.checkpoint.run_dir import EXPERTS, LAYERS, LOSS, METRICS, RunDir
from nextllm_jax.config import ModelConfig
from nextllm_jax.model import layer_norms
from nextllm_jax.training.hooks import Hook, OptionalOutput
from nextllm_jax.training.state import TrainState
from nextllm_jax.training.step import StepMetrics
from nextllm_jax.training.trackers import Tracker

_SECONDS_BETWEEN_DRAWINGS = 30
_MOST_COLUMNS = 400
_MOST_LABELS = 30
_NOT_FINITE, _ZERO = "#e01020", "#c8c8c8"


class Pictures(Hook):
    """Redraws the pictures of a run at evaluations, at most twice a minute, and at the end, also if the run fails.

    With `enabled` False (in all processes except process 0), nothing is drawn.
    """

    def __init__(
        self, run: RunDir, model: ModelConfig, *, enabled: bool = True, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._run, self._places, self._enabled = run, layer_norms.places(model), enabled
        self._trackers, self._step = trackers, 0
        self._is_current, self._drawn_at = True, time.monotonic()
        self._sparse_layers = model.sparse_layers
        self._loss, self._layers, self._experts = (OptionalOutput(name) for name in (LOSS, LAYERS, EXPERTS))

    def after_step(self, step: int, metrics: StepMetrics) -> None:
        """Note that the pictures lack a step."""
        self._is_current, self._step = False, step

    def after_evaluation(self, step: int, state: TrainState) -> None:
        """Redraw the pictures, unless they were drawn within the last 30 seconds."""
        self._is_current, self._step = False, step
        if time.monotonic() - self._drawn_at >= _SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def close(self) -> None:
        """Redraw the pictures if they lack a step or an evaluation."""
        if not self._is_current:
            self._draw()

    def _draw(self) -> None:
        self._is_current, self._drawn_at = True, time.monotonic()
        if self._enabled:
            self._loss.write(lambda: self._write(LOSS, draw_losses(self._records())))
            self._layers.write(lambda: self._write(LAYERS, draw_layers(self._records(), self._places)))
            if self._sparse_layers:
                self._experts.write(lambda: self._write(EXPERTS, draw_experts(self._records(), self._sparse_layers)))

    def _write(self, name: str, png: bytes) -> None:
        self._run.write(name, png)
        for tracker in self._trackers:
            tracker.picture(self._step, name, png)

    def _records(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self._run.read(METRICS).splitlines())


def draw_losses(records: Iterable[dict[str, Any]]) -> bytes:
    """A PNG that plots the losses in these records of metrics.jsonl over the step."""
    curves = {"train": [], "validation": []}
    for record in records:
        if record["loss"] is not None:
            curves[record["split"]].append((record["step"], record["loss"]))
    train, validation = curves["train"], curves["validation"]
    figure = new_figure(8, 5)
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
    return to_png(figure)


def draw_layers(records: Iterable[dict[str, Any]], places: Sequence[str]) -> bytes:
    """A PNG with two heat maps over the step: the root mean square of activations, and the norm of gradients.

    Each row is one of `places`, from the first at the top to the last. Values that are not finite (null in the records)
    and zeros have colors of their own. Records without these values, such as those of earlier versions, are left out.
    """
    from matplotlib.patches import Patch

    train = [record for record in records if record.get("gradient_norms")]
    figure = new_figure(14, min(max(3.5, 1.6 + 0.16 * len(places)), 16))
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"activation_rms": "activations: root mean square", "gradient_norms": "gradients: norm before clipping"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        _draw_heat_map(axes, [record["step"] for record in train], [record[name] for record in train])
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    every = -(-len(places) // _MOST_LABELS)
    panels[0].set_yticks(range(0, len(places), every), places[::every])
    panels[0].set_ylim(len(places) - 0.5, -0.5)
    colors = {"not finite": _NOT_FINITE, "zero": _ZERO}
    handles = [Patch(color=color, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return to_png(figure)


def draw_experts(records: Iterable[dict[str, Any]], layers: Sequence[int]) -> bytes:
    """A PNG with a heat map over the step: the share of each expert in a layer's choices over the mean share.

    The rows are the experts of the first of `layers`, the indices of the sparse layers, then those of the next.
    """
    train = [record for record in records if record.get("expert_share")]
    figure = new_figure(10, min(max(3.5, 1.6 + 0.8 * len(layers)), 16))
    axes = figure.add_subplot()
    num_experts = len(train[0]["expert_share"][0]) if train else 1
    loads = [
        [None if share is None else num_experts * share for layer in record["expert_share"] for share in layer]
        for record in train
    ]
    _draw_heat_map(axes, [record["step"] for record in train], loads)
    axes.set_title("tokens of each expert over the mean")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    every = -(-len(layers) // _MOST_LABELS)
    axes.set_yticks(
        [num_experts * i for i in range(0, len(layers), every)], [f"layer {layer}" for layer in layers[::every]]
    )
    axes.set_ylim(num_experts * len(layers) - 0.5, -0.5)
    return to_png(figure)


def _draw_heat_map(axes: Any, steps: list[int], rows: list[list[float | None]]) -> None:
    """Draw one column for each step, with logarithmic colors; None is a value that is not finite."""
    if not steps:
        return
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    values = np.array(rows, np.float64).T  # None becomes NaN
    starts = np.unique(np.linspace(0, len(steps), min(len(steps), _MOST_COLUMNS), endpoint=False, dtype=int))
    values = np.maximum.reduceat(values, starts, axis=1)  # the largest, or NaN if any is NaN
    edges = np.array([*(steps[start] for start in starts), steps[-1]], np.float64)
    edges[1:-1] -= np.diff(edges)[:-1] / 2
    edges[-1] = max(edges[-1], edges[-2] + 1)
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 10.0)
    colors = colormaps["viridis"].with_extremes(bad=_NOT_FINITE, under=_ZERO)
    norm = LogNorm(low, max(high, 10 * low), clip=False)
    shown = np.where(values == 0, low / 2, values)  # zero has no logarithm; below the lowest it gets its own color
    mesh = axes.pcolormesh(
        edges, np.arange(len(values) + 1) - 0.5, np.ma.masked_invalid(shown), cmap=colors, norm=norm, rasterized=True
    )
    axes.figure.colorbar(mesh, ax=axes)


@contextlib.contextmanager
def _without_environment(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, apart from pyplot and its backend."""
    with _without_environment("MPLBACKEND"):  # for example a notebook's: matplotlib fails on an unknown backend
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def to_png(figure: Any) -> bytes:
    """The figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()
