"""Validation bits per byte against seconds of training: this code, the same with plain AdamW, transformers, litgpt.

    python benchmarks/time_to_quality.py [--config configs/tiny.py] [--steps 700] [--sides this ...] [--output FILE]

All sides train models of the same shape on the same windows in the same order, on the CPU cores of this process, one
after another, each in a process of its own.

- this: `train.py` with the config as it is.
- AdamW: the same with AdamW, a cosine schedule, and neither QK norm nor zero-initialized outputs.
- transformers: `LlamaForCausalLM` with `Trainer`: its AdamW (betas 0.9 and 0.999, no weight decay), cosine to 0.
- litgpt: the loop, initialization, compilation and schedule of `litgpt.pretrain`, with the AdamW of its configs (betas
  0.9 and 0.95, weight decay 0.1). Its default warmup of 2,000 steps is longer than this training.

The peers take the peak learning rate and the warmup of AdamW, clip at a norm of 1, and have a torch thread per core.
Each is first timed for a few steps in float32 and with bfloat16 autocast, twice, and trains with the faster.

- Seconds are those of the training steps, without compilation, evaluation and saving. The step that compiles counts as
  long as the mean of the steps until the first evaluation. Checkpoints of this code are written in the background, and
  that does count.
- All sides are scored on the same tokens of the validation set. Ours train and are scored with documents that do not
  attend to each other. The peers have plain causal attention over the whole window, as they ship, so they also see what
  precedes a document, and they train on the first token of a document as well.

Results are appended to the output file, and sides that it already has for the same settings are not repeated; use
another file after a change of the config or the code. Needs `pip install 'nextllm_jax[parity]'`, and for litgpt `pip
install --no-deps litgpt lightning lightning-utilities torchmetrics jsonargparse`; a side that is not installed is
skipped.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from recipe import ROOT, adamw_options, metrics_of
from torch_peers import PeerRun, Point

from nextllm_jax.config import Config
from nextllm_jax.config.files import load_config_file

OURS = ("this", "AdamW")
PEERS = {"transformers": ("torch", "transformers", "accelerate"), "litgpt": ("torch", "litgpt", "lightning")}
"""The peers, with the packages that each needs."""
TRIALS = ("float32", "bfloat16", "float32", "bfloat16")
TRIAL_STEPS = 12
"""A peer trains with the type of the fastest of these trials, each of so many steps."""
ROWS = 8
"""Times in the table."""


def train_ours(options: list[str], arguments: argparse.Namespace) -> list[Point]:
    """The points of a run of `train.py`."""
    every = ["--training.log-every-steps", str(arguments.every)]
    lines = metrics_of(arguments.config, [*every, *options], arguments.steps, arguments.every)
    points, seconds, tokens, speed = [], 0.0, 0, 0.0
    for line in lines:
        if line["split"] == "train":
            speed = line["tokens_per_second"] or speed  # None for a single step, which follows an evaluation
            seconds += (line["tokens_seen"] - tokens) / speed
            tokens = line["tokens_seen"]
        else:
            points.append(Point(line["step"], seconds, line["bits_per_byte"]))
    return points


def write_windows(config: Config, steps: int, path: Path) -> None:
    """Write an .npz file with the `Data` of the peers: the batches of `steps` steps, and the validation set."""
    from nextllm_jax.data.packing import count_windows, read_batch
    from nextllm_jax.data.prepare import ensure_prepared
    from nextllm_jax.data.sources import open_sources
    from nextllm_jax.model.objective import Batch
    from nextllm_jax.sharding import make_mesh
    from nextllm_jax.training.start import make_loader
    from nextllm_jax.training.vocabulary import with_vocab_size

    def tokens(batch: Batch) -> np.ndarray:
        return np.concatenate([batch.tokens_BT, batch.targets_BT[:, -1:]], axis=1)

    data, length = ensure_prepared(config.data), config.data.sequence_length
    sources = open_sources(config.data, [data])
    loader = make_loader(config, sources, make_mesh(config.mesh))
    split = sources[0].dataset.split("validation")
    held_out = read_batch(split, np.arange(count_windows(split, length, partial=True)), length)
    np.savez(
        path,
        train=np.stack([tokens(loader.whole_batch(step)[1]) for step in range(steps)]),
        validation=tokens(held_out),
        mask=np.asarray(held_out.loss_mask_BT),
        num_bytes=split.num_bytes,
        vocab_size=with_vocab_size(config, data, overwrite=True).model.vocab_size,
    )


def train_peer(peer: str, arguments: argparse.Namespace, dtype: str, steps: int, every: int) -> list[Point]:
    """The points of a peer, trained in a new process."""
    run = PeerRun(
        peer=peer,
        config=arguments.config,
        windows=str(arguments.windows),
        dtype=dtype,
        steps=steps,
        every=every,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
    )
    command = [sys.executable, str(ROOT / "benchmarks/torch_peers.py"), json.dumps(dataclasses.asdict(run))]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Point(*values) for values in json.loads(result.stdout.splitlines()[-1])]


def run_side(side: str, arguments: argparse.Namespace) -> tuple[str, list[Point]]:
    """The type of the matmuls of a side, and its points."""
    if side in OURS:
        from nextllm_jax.model.transformer import resolve_dtype

        dtype = resolve_dtype(load_config_file(arguments.config).model.dtype, "cpu", training=True)
        plain = adamw_options(arguments.learning_rate, arguments.warmup_steps, arguments.final_fraction)
        return dtype.name, train_ours(plain if side == "AdamW" else [], arguments)
    if not arguments.windows.exists():
        write_windows(load_config_file(arguments.config), max(arguments.steps, TRIAL_STEPS), arguments.windows)
    trials = [(train_peer(side, arguments, dtype, TRIAL_STEPS, TRIAL_STEPS)[-1].seconds, dtype) for dtype in TRIALS]
    _, dtype = min(trials)
    print(f"{side}: {dtype}, since {TRIAL_STEPS} steps take {trials} seconds", file=sys.stderr, flush=True)
    return dtype, train_peer(side, arguments, dtype, arguments.steps, arguments.every)


def report(runs: dict[str, tuple[str, list[Point]]]) -> None:
    """Print the quality at common times, and when each side reaches the final quality of AdamW."""
    curves = {side: np.array(points) for side, (_, points) in runs.items()}
    first, last = max(curve[0, 1] for curve in curves.values()), min(curve[-1, 1] for curve in curves.values())
    print(f"| seconds | {' | '.join(runs)} |\n{'|---' * (len(runs) + 1)}|")
    for seconds in np.linspace(first, last, ROWS):
        values = [f"{np.interp(seconds, curve[:, 1], curve[:, 2]):.3f}" for curve in curves.values()]
        print(f"| {seconds:.0f} | {' | '.join(values)} |")
    before = "AdamW" if "AdamW" in curves else next(iter(curves))
    _, end, target = curves[before][-1]
    print(f"\n| side | matmuls | at the end | when {before} ends | reaches {target:.3f} after |\n|---|---|---|---|---|")
    for side, curve in curves.items():
        reached, then = "never", "not yet" if curve[0, 1] > end else f"{np.interp(end, curve[:, 1], curve[:, 2]):.3f}"
        lowest = np.minimum.accumulate(curve[:, 2])
        if lowest[-1] <= target:
            steps, seconds = (np.interp(-target, -lowest, column) for column in curve.T[:2])
            reached = f"{seconds:.1f} s ({seconds / end:.0%}), {steps / curve[-1, 0]:.0%} of the tokens"
        final = f"{curve[-1, 2]:.4f} after {curve[-1, 1]:.1f} s"
        print(f"| {side} | {runs[side][0]} | {final} | {then} | {reached} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.py", help="relative to the repository")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--every", type=int, help="steps between evaluations; default: steps / 14")
    parser.add_argument("--sides", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--output", type=Path, default=Path("time_to_quality.jsonl"))
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="peak of AdamW, here and in the peers")
    parser.add_argument("--warmup-steps", type=int, default=50, help="of AdamW, here and in the peers")
    parser.add_argument("--final-fraction", type=float, default=0.02, help="of the learning rate of AdamW here")
    arguments = parser.parse_args()
    arguments.every = arguments.every or max(arguments.steps // 14, 2)
    if not 2 <= arguments.every <= arguments.steps:
        parser.error(f"--every {arguments.every} must be at least 2 and at most --steps {arguments.steps}")
    if not (ROOT / arguments.config).is_file():
        parser.error(f"--config {arguments.config} is not a file of the repository; configs/ has some")
    return arguments


def main() -> None:
    """Run what is missing, and print the tables."""
    arguments = parse_arguments()
    arguments.output = arguments.output.resolve()
    os.chdir(ROOT)
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    names = ("config", "steps", "every", "learning_rate", "warmup_steps", "final_fraction")
    settings = {name: getattr(arguments, name) for name in names}
    text = arguments.output.read_text() if arguments.output.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    done = {line["side"]: (line["dtype"], line["points"]) for line in lines if line["settings"] == settings}
    with tempfile.TemporaryDirectory() as directory:
        arguments.windows = Path(directory) / "windows.npz"
        for side in arguments.sides:
            missing = [name for name in PEERS.get(side, ()) if not importlib.util.find_spec(name)]
            if missing and side not in done:
                print(f"skipping {side}: {' and '.join(missing)} is not installed (see --help)", file=sys.stderr)
            elif side not in done:
                dtype, points = done[side] = run_side(side, arguments)
                with open(arguments.output, "a") as output:
                    line = {"side": side, "settings": settings, "dtype": dtype, "points": points}
                    output.write(json.dumps(line) + "\n")
    report({side: done[side] for side in arguments.sides if side in done})


if __name__ == "__main__":
    main()
