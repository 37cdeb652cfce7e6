"""The best learning rate over widths and depths: `configs/tiny.py` at other shapes, with and without completep.

    python benchmarks/transfer.py [--widths 64 128 256] [--depths 4] [--rates 0.25 0.5 1 2 4] [--steps 150]

A rate is a factor on both learning rates of the config, whose shape is the base of completep: there, both
parametrizations are the same, and are trained once. Each run is `train.py` in a process of its own, on the default
corpus. Results are appended to the output file, and runs that it already has are not repeated, so the same command
continues. It prints a table and draws the picture at the end.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from recipe import ROOT, metrics_of

sys.path.insert(0, str(ROOT))  # to draw the picture

BASE_WIDTH, BASE_DEPTH, STEPS = 128, 4, 700
"""Of `configs/tiny.py`."""
PARAMETRIZATIONS = ("standard", "completep")


class Run(NamedTuple):
    """What decides a run, in the order of the table."""

    parametrization: str
    depth: int
    width: int
    rate: float
    seed: int
    steps: int


def bits_per_byte(run: Run) -> float:
    """The validation loss at the end of a run."""
    values: dict[str, Any] = {
        "model.num-layers": run.depth,
        "model.embed-dim": run.width,
        "model.mlp-dim": 3 * run.width,
        "model.num-heads": run.width // 32,
        "model.num-kv-heads": run.width // 64,
        "optimizer.learning-rate": run.rate * 0.004,
        "optimizer.adamw-learning-rate": run.rate * 0.01,
        "optimizer.warmup-steps": 50 * run.steps // STEPS,
        "seed": run.seed,
    }
    if run.parametrization == "completep":
        values |= {"model.parametrization": "completep", "model.base-width": BASE_WIDTH, "model.base-depth": BASE_DEPTH}
    options = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return metrics_of("configs/tiny.py", options, run.steps, run.steps)[-1]["bits_per_byte"]


def table(done: dict[Run, float], rates: list[float]) -> str:
    """A row of losses for each parametrization and shape; the best rate of a row is bold."""
    lines = [
        f"| parametrization | layers | width | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---" * (3 + len(rates)) + "|",
    ]
    for (name, depth, width), runs in curves(done).items():
        best = min(runs.values())
        cells = [f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for loss in map(runs.__getitem__, rates)]
        lines.append(f"| {name} | {depth} | {width} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(done: dict[Run, float]) -> dict[tuple[str, int, int], dict[float, float]]:
    """The loss by rate, for each parametrization, depth and width; the mean over seeds."""
    found: dict[tuple[str, int, int], dict[float, list[float]]] = {}
    for run, loss in done.items():
        found.setdefault(run[:3], {}).setdefault(run.rate, []).append(loss)
    return {
        key: {rate: sum(losses) / len(losses) for rate, losses in sorted(runs.items())} for key, runs in found.items()
    }


def draw(done: dict[Run, float]) -> bytes:
    """A PNG with a panel for each parametrization and a curve for each shape."""
    from nextllm_jax.training.pictures import new_figure, to_png

    figure = new_figure(9, 4.5)
    panels = figure.subplots(1, len(PARAMETRIZATIONS), sharey=True)
    for (name, depth, width), runs in curves(done).items():
        axes = panels[PARAMETRIZATIONS.index(name)]
        axes.plot(runs.keys(), runs.values(), "o-", label=f"{depth} layers, {width} wide")
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
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="multiples of 64")
    parser.add_argument("--depths", type=int, nargs="+", default=[BASE_DEPTH])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("transfer.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("transfer.png"))
    arguments = parser.parse_args()
    text = arguments.output.read_text() if arguments.output.exists() else ""
    lines = list(map(json.loads, text.splitlines()))
    found = {Run(**{name: line[name] for name in Run._fields}): line["bits_per_byte"] for line in lines}
    done: dict[Run, float] = {}
    seeds, depths, widths, rates = arguments.seeds, arguments.depths, arguments.widths, sorted(arguments.rates)
    for seed, name, depth, width, rate in itertools.product(seeds, PARAMETRIZATIONS, depths, widths, rates):
        run = Run(name, depth, width, rate, seed, arguments.steps)
        trained = run._replace(parametrization="standard") if (width, depth) == (BASE_WIDTH, BASE_DEPTH) else run
        if trained not in found:
            found[trained] = bits_per_byte(trained)
            with open(arguments.output, "a") as output:
                output.write(json.dumps({**trained._asdict(), "bits_per_byte": found[trained]}) + "\n")
        done[run] = found[trained]
    print(table(done, rates))
    arguments.picture.write_bytes(draw(done))


if __name__ == "__main__":
    main()
