"""The best learning rate over widths and depths: `configs/tiny.py` at other shapes, with and without completep.

    python benchmarks/transfer.py [--widths 64 128 256] [--depths 4] [--rates 0.5 1 2 4 8] [--steps 150]

A rate is a factor on both learning rates of the config, whose shape is the base of completep: there, both
parametrizations are the same, and are trained once. All runs are on the default corpus. Results are appended to the
output file, and runs that it already has are not repeated, so the same command continues. At the end, it prints a table
and draws a picture of all runs in the file that have these rates and steps.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nextllm_jax.config import Config  # noqa: E402
from nextllm_jax.config.files import load_config_file  # noqa: E402
from nextllm_jax.process import restart_with_settings  # noqa: E402

BASE = load_config_file(str(ROOT / "configs/tiny.py"))
PARAMETRIZATIONS = ("standard", "completep")


class Run(NamedTuple):
    """What decides a run."""

    parametrization: str
    depth: int
    width: int
    steps: int
    seed: int
    rate: float


def is_base(run: Run) -> bool:
    """Whether it has the shape at which both parametrizations are the same."""
    return (run.width, run.depth) == (BASE.model.embed_dim, BASE.model.num_layers)


def config_of(run: Run) -> Config:
    """The config of a run, without its factor on the learning rates."""
    base, width = BASE.model, run.width / BASE.model.embed_dim
    model = dataclasses.replace(
        base,
        num_layers=run.depth,
        embed_dim=run.width,
        mlp_dim=round(width * base.mlp_dim),
        num_heads=round(width * base.num_heads),
        num_kv_heads=round(width * base.num_kv_heads),
    )
    if run.parametrization == "completep":
        shape = {"base_width": base.embed_dim, "base_depth": base.num_layers}
        model = dataclasses.replace(model, parametrization="completep", **shape)
    training = dataclasses.replace(BASE.training, steps=run.steps)
    warmup = round(BASE.optimizer.warmup_steps * run.steps / BASE.training.steps)
    optimizer = dataclasses.replace(BASE.optimizer, warmup_steps=warmup)
    return dataclasses.replace(BASE, model=model, training=training, optimizer=optimizer, seed=run.seed)


@functools.lru_cache(maxsize=1)
def trainer(run: Run) -> Callable[[float], float]:
    """A function that trains with a factor on both learning rates, and returns the validation loss in bits per byte.

    The factor is part of the optimizer's state, so one compiled program serves all rates.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from nextllm_jax.data.loader import TrainLoader, validation_batches
    from nextllm_jax.data.prepare import ensure_prepared
    from nextllm_jax.data.sources import open_sources, source_paths
    from nextllm_jax.evaluation.evaluate import evaluate
    from nextllm_jax.model.attention_kernel import choose_kernel
    from nextllm_jax.model.objective import make_eval_step, next_token
    from nextllm_jax.model.transformer import Transformer, resolve_dtype
    from nextllm_jax.sharding import make_mesh, sharding
    from nextllm_jax.training.optimizers import make_optimizer
    from nextllm_jax.training.schedule import schedule
    from nextllm_jax.training.state import create_state, shardings_of
    from nextllm_jax.training.step import make_train_step
    from nextllm_jax.training.vocabulary import with_vocab_size

    config = config_of(run)
    paths = source_paths(config.data, ensure_prepared)
    sources = open_sources(config.data, paths)
    config = with_vocab_size(config, paths[0], overwrite=True)
    mesh = make_mesh(config.mesh)
    jax.set_mesh(mesh)
    dtype = resolve_dtype(config.model.dtype, jax.default_backend(), training=True)
    model = Transformer(config.model, dtype, kernel=choose_kernel(config, mesh, dtype))

    def scaled(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u: state * u, updates), state

    scale = optax.GradientTransformation(lambda params: jnp.ones(()), scaled)
    optimizer = optax.chain(make_optimizer(config.optimizer, config.model), scale)
    length, batch, rows = config.data.sequence_length, config.training.global_batch_size, sharding(mesh, "batch", "seq")
    loader = TrainLoader(sources, sequence_length=length, global_batch_size=batch, seed=config.seed, sharding=rows)
    state = create_state(model, optimizer, mesh, config.seed)
    rates = schedule(config.optimizer, run.steps)
    step = make_train_step(next_token, model, optimizer, rates, shardings_of(state))
    score = make_eval_step(next_token, model)

    def train(rate: float) -> float:
        state = create_state(model, optimizer, mesh, config.seed)
        factor = jax.device_put(jnp.float32(rate), state.opt_state[1].sharding)
        state = dataclasses.replace(state, opt_state=(state.opt_state[0], factor))
        for _, batch in zip(range(run.steps), loader.batches(0), strict=False):
            state, _ = step(state, batch)
        held_out = sources[0].dataset.split("validation")
        batches = validation_batches(held_out, sequence_length=length, batch_size=32, sharding=rows)
        found = evaluate(score, state.params, batches, held_out.num_bytes).bits_per_byte
        assert found is not None
        return found

    return train


Curves = dict[tuple[str, int, int], dict[float, float]]
"""The loss by rate, for each parametrization, depth and width; the mean over seeds."""


def curves(found: dict[Run, float], steps: int, rates: list[float]) -> Curves:
    """The curves of all runs with these rates and that many steps."""
    losses: dict[tuple[str, int, int], dict[float, list[float]]] = {}
    for run, loss in sorted(found.items()):
        names = PARAMETRIZATIONS if is_base(run) else (run.parametrization,)
        for name in names if run.steps == steps and run.rate in rates else ():
            losses.setdefault((name, run.depth, run.width), {}).setdefault(run.rate, []).append(loss)
    return {
        key: {rate: statistics.mean(runs[rate]) for rate in sorted(runs)}
        for key, runs in sorted(losses.items(), key=lambda item: (PARAMETRIZATIONS.index(item[0][0]), item[0]))
    }


def best_rate(runs: dict[float, float]) -> float:
    """The lowest point of the parabola through the best run and its neighbors; that run's rate if it has only one."""
    rates = list(runs)
    best = rates.index(min(runs, key=runs.__getitem__))
    if not 0 < best < len(rates) - 1:
        return rates[best]
    around = rates[best - 1 : best + 2]
    a, b, _ = np.polyfit(np.log2(around), [runs[rate] for rate in around], 2)
    return float(2 ** (-b / (2 * a)))


def table(found: Curves) -> str:
    """A row of losses for each parametrization and shape."""
    rates = sorted({rate for runs in found.values() for rate in runs})
    lines = [
        f"| | layers | width | {' | '.join(f'{rate:g}' for rate in rates)} | best |",
        "|---" * (4 + len(rates)) + "|",
    ]
    for (name, depth, width), runs in found.items():
        cells = [f"{runs[rate]:.3f}" if rate in runs else "" for rate in rates]
        lines.append(f"| {name} | {depth} | {width} | {' | '.join(cells)} | {best_rate(runs):.1f} |")
    return "\n".join(lines)


def draw(found: Curves) -> bytes:
    """A PNG with a panel for each parametrization and a curve for each shape."""
    from nextllm_jax.training.pictures import new_figure, to_png

    figure = new_figure(9, 4.5)
    panels = figure.subplots(1, len(PARAMETRIZATIONS), sharey=True)
    for (name, depth, width), runs in found.items():
        axes = panels[PARAMETRIZATIONS.index(name)]
        (line,) = axes.plot(runs.keys(), runs.values(), "o-", label=f"{depth} layers, {width} wide")
        axes.axvline(best_rate(runs), color=line.get_color(), linestyle=":")
    for axes, name in zip(panels, PARAMETRIZATIONS, strict=True):
        axes.set_title(name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("learning rates, as a factor on the recipe's")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("validation loss (bits per byte)")
    return to_png(figure)


def main() -> None:
    """Train what is missing, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--depths", type=int, nargs="+", default=[BASE.model.num_layers])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("transfer.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("transfer.png"))
    arguments = parser.parse_args()
    text = arguments.output.read_text() if arguments.output.exists() else ""
    lines = list(map(json.loads, text.splitlines()))
    found = {Run(**{name: line[name] for name in Run._fields}): line["bits_per_byte"] for line in lines}
    seeds, depths, widths, rates = arguments.seeds, arguments.depths, arguments.widths, arguments.rates
    for seed, name, depth, width, rate in itertools.product(seeds, PARAMETRIZATIONS, depths, widths, rates):
        run = Run(name, depth, width, arguments.steps, seed, rate)
        run = run._replace(parametrization="standard") if is_base(run) else run
        if run not in found:
            found[run] = trainer(run._replace(rate=1.0))(rate)
            with open(arguments.output, "a") as output:
                output.write(json.dumps({**run._asdict(), "bits_per_byte": found[run]}) + "\n")
    measured = curves(found, arguments.steps, rates)
    print(table(measured))
    arguments.picture.write_bytes(draw(measured))


if __name__ == "__main__":
    restart_with_settings()
    main()
