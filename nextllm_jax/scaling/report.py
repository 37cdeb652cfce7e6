"""A forecast as text for people, as JSON for programs, and as a picture."""

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from nextllm_jax.config import Config
from nextllm_jax.config.fields import command_line_options
from nextllm_jax.hardware import readable_bytes
from nextllm_jax.plan.report import Budget, training_json
from nextllm_jax.scaling.family import Size
from nextllm_jax.scaling.fit import Interval
from nextllm_jax.scaling.ladder import Rung
from nextllm_jax.scaling.large_run import Forecast, LargeRun
from nextllm_jax.training.pictures import new_figure, to_png

_MEASURED, _CURVE = "#c0392b", "#2c6fbb"


def rungs_table(rungs: Sequence[Rung], forecast: Forecast) -> str:
    """The rungs, the curve through them, and how well it predicts the largest rung from the others."""
    lines = [
        f"{'FLOPs':>9}{'layers':>8}{'width':>7}{'parameters':>13}{'tokens':>10}{'batch':>7}{'learning rate':>15}"
        f"{'bits per byte':>15}"
    ]
    for config, size, loss in rungs:
        model, batch = config.model, config.training.global_batch_size
        lines.append(
            f"{size.flops:>9.2g}{model.num_layers:>8}{model.embed_dim:>7}{size.parameters:>13,}{size.tokens:>10.2g}"
            f"{batch:>7}{config.optimizer.learning_rate:>15g}{loss:>15.4f}"
        )
    fit, others = forecast.fit, len(rungs) - 1
    lines += [
        "",
        "loss = E + A x FLOPs^-alpha, with intervals of 90%",
        _line("E, irreducible", str(fit.irreducible)),
        _line("alpha", str(fit.exponent)),
        _line("noise of a run", f"{np.median(fit.noise):.3f}"),
        _line(f"largest rung from the other {others}", f"{forecast.check}, error {forecast.check_error:+.4f}"),
    ]
    return "\n".join(lines)


def large_run_table(forecast: Forecast, file_name: str, file: Config, shown: Config) -> str:
    """The large run: its loss, its recipe, its plan, and the command that trains it.

    The command has the data and the directory of `shown`.
    """
    config = forecast.run.config if forecast.plan is None else forecast.plan.config
    config = dataclasses.replace(config, data=shown.data, workdir=shown.workdir)
    options = shlex.join(command_line_options(config, file))
    command = f"python train.py --config {shlex.quote(file_name)} {options}"
    return "\n".join([*_run_lines(forecast.run, forecast.loss), *_plan_lines(forecast), "", command])


def _run_lines(run: LargeRun, loss: Interval) -> Iterator[str]:
    model, optimizer, training = run.config.model, run.config.optimizer, run.config.training
    length = run.config.data.sequence_length
    yield f"the large run, {10**run.decades:,.0f} times the compute of the largest rung"
    yield _line("FLOPs", f"{run.size.flops:.3g}")
    yield _line("shape", f"{model.num_layers} layers, {model.embed_dim} wide, {model.mlp_dim} in the MLP")
    yield _line("heads", f"{model.num_heads} of {model.head_dim}, {model.num_kv_heads} of keys and values")
    active = "" if not model.num_experts else f", {run.size.active_parameters:,} for each token"
    yield _line("parameters", f"{run.size.parameters:,}{active}")
    ratio = f"{run.size.tokens_per_parameter:.1f} per parameter, {run.epochs:,.1f} epochs of the data"
    yield _line("tokens", f"{run.size.tokens:.3g}, {ratio}")
    yield _line("batch", f"{training.global_batch_size:,} sequences of {length:,} tokens, {training.steps:,} steps")
    adamw = optimizer.adamw_learning_rate
    rest = "" if adamw is None else f", {adamw:g} for embedding and head"
    yield _line("learning rate", f"{optimizer.learning_rate:g}{rest}, {optimizer.warmup_steps:,} steps of warmup")
    yield _line("weight decay", f"{optimizer.weight_decay:g}")
    yield _line("loss", f"{loss} bits per byte")


def _plan_lines(forecast: Forecast) -> Iterable[str]:
    plan = forecast.plan
    if plan is None or forecast.least_days is None:
        return
    peak, how = plan.estimated_peak_bytes, "estimated"
    if plan.memory is not None:
        peak, how = plan.memory.peak_bytes, "compiled"
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "a single device"
    steps = plan.config.training.accumulation_steps
    yield f"on {plan.topology}, {plan.num_devices:,} x {plan.device_kind}"
    yield _line("mesh", f"{axes}; {steps} microbatches, remat {plan.config.model.remat}")
    limit = readable_bytes(plan.limit_bytes or 0)
    yield _line("memory per device", f"{readable_bytes(peak)} of {limit}, {how}")
    yield _line("least time", f"{_duration(forecast.least_days)}, MFU {plan.mfu_bound:.0%}")
    if forecast.least_cost is not None:
        yield _line("least cost", f"{_amount(forecast.least_cost)} at {forecast.price:g} per device and hour")


def _duration(days: float) -> str:
    for unit, of_day in (("days", 1), ("hours", 24), ("minutes", 24 * 60)):
        if days * of_day >= 1:
            return f"{days * of_day:,.1f} {unit}"
    return f"{days * 86_400:,.1f} seconds"


def _amount(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"


def _line(name: str, value: str) -> str:
    return f"  {name:32}{value}"


def forecast_json(rungs: Sequence[Rung], forecast: Forecast) -> dict[str, Any]:
    """The same as JSON values."""
    fit = forecast.fit
    return {
        "rungs": [_size_json(config, size) | {"bits_per_byte": loss} for config, size, loss in rungs],
        "fit": {
            "reference_flops": fit.reference_flops,
            "irreducible": fit.irreducible._asdict(),
            "alpha": fit.exponent._asdict(),
            "noise": float(np.median(fit.noise)),
        },
        "check": {"predicted": forecast.check._asdict(), "error": forecast.check_error},
        "large_run": _large_run_json(forecast),
    }


def _large_run_json(forecast: Forecast) -> dict[str, Any]:
    run, plan = forecast.run, forecast.plan
    return {
        **_size_json(run.config, run.size),
        "bits_per_byte": forecast.loss._asdict(),
        "decades": run.decades,
        "epochs": run.epochs,
        "warnings": forecast.warnings(),
        "plan": plan and training_json(plan, Budget(days=1.0, tokens=None)),
        "least_days": forecast.least_days,
        "least_cost": forecast.least_cost,
    }


def _size_json(config: Config, size: Size) -> dict[str, Any]:
    model, training, optimizer = config.model, config.training, config.optimizer
    return {
        **size._asdict(),
        **{name: getattr(model, name) for name in ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads")},
        "steps": training.steps,
        "global_batch_size": training.global_batch_size,
        **{name: getattr(optimizer, name) for name in ("learning_rate", "adamw_learning_rate", "weight_decay")},
        "warmup_steps": optimizer.warmup_steps,
    }


def draw(rungs: Sequence[Rung], forecast: Forecast) -> bytes:
    """A PNG of the loss over the compute: the rungs, the curve with its band, and the predictions."""
    measured, fit, large = [rung.size.flops for rung in rungs], forecast.fit, forecast.run.size.flops
    compute = np.geomspace(measured[0] / 1.5, large * 1.5, 200)
    curve = np.array([fit.curve(flops) for flops in compute])
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    axes.fill_between(compute, curve[:, 1], curve[:, 2], color=_CURVE, alpha=0.2, linewidth=0, label="90% of the fit")
    axes.plot(compute, curve[:, 0], color=_CURVE, linewidth=1.5, label="E + A x FLOPs^-alpha")
    axes.plot(measured, [rung.loss for rung in rungs], "o", color=_MEASURED, label="rungs")
    _draw_interval(axes, measured[-1], forecast.check, "#7f8c8d", "largest rung, from the others")
    _draw_interval(axes, large, forecast.loss, "#1e8449", "large run")
    axes.set_xscale("log")
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel("validation loss (bits per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    return to_png(figure)


def _draw_interval(axes: Any, flops: float, loss: Interval, color: str, label: str) -> None:
    bars = [[loss.median - loss.low], [loss.high - loss.median]]
    axes.errorbar([flops], [loss.median], bars, fmt="x", color=color, capsize=4, label=f"{label}: {loss.median:.3f}")
