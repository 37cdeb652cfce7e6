"""What each part of a recipe gives: validation bits per byte of `configs/tiny.py` in variants.

    python benchmarks/recipe.py [--seeds 0 1] [--rows muon ...] [--steps 700] [--output recipe.jsonl]

Each run is `train.py` in a process of its own, on the default corpus. A row states the options that differ from AdamW
with a cosine schedule, `BEFORE`. Results are appended to the output file, and runs that it already has are not
repeated, so the same command continues. Seconds are the time of the training steps, without compilation, evaluation
and saving; compare them only between runs on an idle machine. All rows train on the same number of tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def adamw_options(learning_rate: float, warmup_steps: int, final_fraction: float) -> list[str]:
    """The options of `train.py` that replace the recipe of a config with plain AdamW and a cosine schedule."""
    values = {
        "name": "adamw", "adamw-learning-rate": None, "learning-rate": learning_rate, "warmup-steps": warmup_steps,
        "schedule": "cosine", "final-learning-rate-fraction": final_fraction, "b1": 0.9, "b2": 0.95,
        "weight-decay": 0.1, "clip-norm": 1.0,
    }  # fmt: skip
    options = [word for name, value in values.items() for word in (f"--optimizer.{name}", str(value))]
    model = ["--model.no-qk-norm", "--model.no-zero-init-outputs", "--model.logit-soft-cap", "None"]
    return [*options, "--optimizer.no-decay-embeddings", *model, "--training.ema-decay", "0"]


BEFORE = adamw_options(0.005, 50, 0.02)
"""What `configs/tiny.py` was before this ablation; each row changes it."""
MUON = ["--optimizer.name", "muon", "--optimizer.learning-rate", "0.008", "--optimizer.adamw-learning-rate", "0.005"]
QK_NORM, ZERO = ["--model.qk-norm"], ["--model.zero-init-outputs"]
BEST = [*MUON, *QK_NORM, *ZERO]
BATCH = ["--training.global-batch-size"]
LINEAR = ["--optimizer.schedule", "linear", "--optimizer.final-learning-rate-fraction", "0"]
WSD = ["--optimizer.schedule", "wsd", "--optimizer.final-learning-rate-fraction", "0",
       "--optimizer.decay-steps-fraction", "0.5"]  # fmt: skip
TUNED = [*BEST, "--optimizer.learning-rate", "0.004", "--optimizer.adamw-learning-rate", "0.01",
         "--optimizer.weight-decay", "0.3"]  # fmt: skip
ROWS: dict[str, list[str]] = {
    "adamw": [],
    "adamw, learning rate 0.0025": ["--optimizer.learning-rate", "0.0025"],
    "adamw, learning rate 0.01": ["--optimizer.learning-rate", "0.01"],
    "adamw, qk_norm": QK_NORM,
    "adamw, qk_norm, zero_init_outputs": [*QK_NORM, *ZERO],
    "muon": MUON,
    "muon, qk_norm": [*MUON, *QK_NORM],
    "muon, zero_init_outputs": [*MUON, *ZERO],
    "muon, qk_norm, zero_init_outputs": BEST,
    "the same, learning rate 0.004": [*BEST, "--optimizer.learning-rate", "0.004"],
    "the same, learning rate 0.016": [*BEST, "--optimizer.learning-rate", "0.016"],
    "the same, AdamW rate 0.01": [*BEST, "--optimizer.adamw-learning-rate", "0.01"],
    "the same, weight decay 0": [*BEST, "--optimizer.weight-decay", "0"],
    "the same, weight decay 0.3": [*BEST, "--optimizer.weight-decay", "0.3"],
    "the same, linear schedule to 0": [*BEST, *LINEAR],
    "the same, wsd schedule to 0": [*BEST, *WSD],
    "the same, logit soft cap 15": [*BEST, "--model.logit-soft-cap", "15"],
    "the same, ema_decay 0.99": [*BEST, "--training.ema-decay", "0.99"],
    "the same, batch 4, twice the steps": [*BEST, *BATCH, "4"],
    "the same, batch 16, half the steps": [*BEST, *BATCH, "16"],
    "tuned (rates 0.004 and 0.01, decay 0.3)": TUNED,
    "tuned, linear schedule to 0": [*TUNED, *LINEAR],
    "tuned, wsd schedule to 0": [*TUNED, *WSD],
    "tuned, linear schedule to 0, batch 4": [*TUNED, *LINEAR, *BATCH, "4"],
    "tuned, linear schedule to 0, init_std 0.056": [*TUNED, *LINEAR, "--model.init-std", "0.056"],
    "adamw, init_std 0.056": ["--model.init-std", "0.056"],
    "tuned, linear schedule to 0, AdamW alone": [
        *LINEAR, "--model.qk-norm", "--optimizer.weight-decay", "0.3", "--optimizer.learning-rate", "0.0025",
    ],
}  # fmt: skip


def metrics_of(config: str, options: list[str], steps: int, evaluate_every: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run of `train.py` in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        length = ["--training.steps", str(steps), "--training.evaluate-every-steps", str(evaluate_every)]
        command = ["train.py", "--config", config, "--workdir", directory, *length, *options]
        subprocess.run([sys.executable, *command, "--training.sample-tokens", "0"], cwd=ROOT, check=True)
        return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def train(options: list[str], seed: int, steps: int) -> dict[str, float]:
    """The bits per byte at half time and at the end of a run, and its seconds of training."""
    if BATCH[0] in options:
        steps = steps * 8 // int(options[options.index(BATCH[0]) + 1])
    lines = metrics_of("configs/tiny.py", [*BEFORE, "--seed", str(seed), *options], steps, steps // 2)
    validation = [line for line in lines if line["split"] == "validation"]
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    return {
        "half": validation[len(validation) // 2 - 1]["bits_per_byte"],
        "end": validation[-1]["bits_per_byte"],
        "seconds": validation[-1]["tokens_seen"] / statistics.median(speeds),
    }


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help="names in the table")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--output", type=Path, default=Path("recipe.jsonl"))
    arguments = parser.parse_args()
    text = arguments.output.read_text() if arguments.output.exists() else ""
    done = {(line["row"], line["seed"], line["steps"]): line for line in map(json.loads, text.splitlines())}
    for seed in arguments.seeds:
        for row in arguments.rows:
            key = (row, seed, arguments.steps)
            if key not in done:
                done[key] = {"row": row, "seed": seed, "steps": arguments.steps}
                done[key] |= train(ROWS[row], seed, arguments.steps)
                with open(arguments.output, "a") as output:
                    output.write(json.dumps(done[key]) + "\n")
    print("| run | at half time | at the end | seconds |\n|---|---|---|---|")
    for row in arguments.rows:
        runs = [done[row, seed, arguments.steps] for seed in arguments.seeds]
        columns = [", ".join(f"{run[name]:{form}}" for run in runs) for name, form in
                   (("half", ".4f"), ("end", ".4f"), ("seconds", ".0f"))]  # fmt: skip
        print(f"| {row} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
