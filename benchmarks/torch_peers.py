"""Trains a torch model with transformers' Trainer or with the loop of litgpt's pretraining, and measures its quality.

`time_to_quality.py` runs this file in a new process for each training, with a `PeerRun` as JSON. The last line of its
output is the JSON of a list of `Point`.
"""

import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from train_throughput import make_litgpt_model, make_transformers_model

from nextllm_jax.config import ModelConfig
from nextllm_jax.config.files import load_config_file

Data = Mapping[str, np.ndarray]
"""train [S, B, T + 1] and validation [W, T + 1] hold tokens. mask [W, T] says which targets are scored, and num_bytes
is the size of their text. vocab_size is the number of rows of the embedding."""


class Point(NamedTuple):
    """The quality after some steps."""

    step: int
    seconds: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerRun:
    """One training of a peer."""

    peer: str
    """A name in TRAIN."""
    config: str
    """File of the config whose model has the shape of the peer's."""
    windows: str
    """The .npz file with the `Data`. Its first `steps` batches are used."""
    dtype: str
    """float32, or bfloat16 for autocast."""
    steps: int
    every: int
    """Steps between evaluations."""
    learning_rate: float
    warmup_steps: int


class Meter:
    """Measures the steps of a torch model, and scores it every so many steps and at the end."""

    def __init__(self, logits_of: Any, data: Data, run: PeerRun) -> None:
        self.points: list[Point] = []
        self._logits_of, self._data, self._run = logits_of, data, run
        self._step, self._seconds, self._since = 0, 0.0, 0.0

    def after_step(self, step: int) -> None:
        """Called after every step, from 1 on. Scoring does not count for the seconds."""
        if step == 1:  # has compiled
            self._since = time.perf_counter()
        elif step % self._run.every == 0 or step == self._run.steps:
            timed = step - max(self._step, 1)
            self._seconds += (time.perf_counter() - self._since) * (step - self._step) / timed
            self._step = step
            self.points.append(Point(step, self._seconds, self._score()))
            print(f"{self._run.peer}: {self.points[-1]}", file=sys.stderr, flush=True)
            self._since = time.perf_counter()

    def _score(self) -> float:
        """Bits per byte of the validation set."""
        import torch

        nll, size = 0.0, self._data["train"].shape[1]
        for start in range(0, len(self._data["mask"]), size):
            tokens = torch.from_numpy(self._data["validation"][start : start + size]).long()
            is_scored = torch.from_numpy(self._data["mask"][start : start + size])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self._run.dtype == "bfloat16"):
                logits = self._logits_of(tokens[:, :-1])
            logits = logits[is_scored].float()
            nll += torch.nn.functional.cross_entropy(logits, tokens[:, 1:][is_scored], reduction="sum").item()
        return nll / math.log(2) / int(self._data["num_bytes"])


def train_transformers(shape: ModelConfig, data: Data, run: PeerRun) -> list[Point]:
    """The points of transformers' Trainer."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    set_seed(0)
    model = make_transformers_model(shape)
    meter = Meter(lambda tokens: model(input_ids=tokens).logits, data, run)

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.after_step(state.global_step)

    windows = torch.from_numpy(data["train"]).long()
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            output_dir=directory,
            max_steps=len(windows),
            per_device_train_batch_size=windows.shape[1],
            learning_rate=run.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=run.warmup_steps,
            use_cpu=True,
            dataloader_pin_memory=False,
            bf16=run.dtype == "bfloat16",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows: Any = [
            {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in windows.flatten(0, 1)
        ]
        Trainer(model, settings, train_dataset=rows, callbacks=[Measure()]).train()
    return meter.points


def train_litgpt(shape: ModelConfig, data: Data, run: PeerRun) -> list[Point]:
    """The points of the loop of litgpt's pretraining."""
    import torch
    from lightning.fabric import Fabric  # pyright: ignore[reportMissingImports]
    from litgpt import pretrain  # pyright: ignore[reportMissingImports]
    from litgpt.args import EvalArgs, TrainArgs  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    windows = torch.from_numpy(data["train"])
    steps, batch_size, length = windows.shape[0], windows.shape[1], windows.shape[2] - 1
    model = make_litgpt_model(shape, length)
    meter = Meter(model, data, run)

    class Measure:
        """A logger, which the loop calls after each step, counted from 0."""

        def log_metrics(self, metrics: Any, step: int) -> None:
            meter.after_step(step + 1)

    precision = "bf16-mixed" if run.dtype == "bfloat16" else "32-true"
    measure: Any = Measure()
    fabric: Any = Fabric(accelerator="cpu", devices=1, precision=precision, loggers=[measure])
    fabric.seed_everything(0)
    pretrain.initialize_weights(fabric, model, n_layer=shape.num_layers, n_embd=shape.embed_dim)
    compiled = fabric.setup(torch.compile(model))
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    rows: Any = windows.flatten(0, 1)
    loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=batch_size))
    state = {"model": compiled, "optimizer": fabric.setup_optimizers(optimizer), "iter_num": 0, "step_count": 0}
    train = TrainArgs(
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        max_tokens=steps * batch_size * length,
        max_norm=1.0,
        min_lr=4e-5,
        lr_warmup_steps=run.warmup_steps,
        save_interval=None,
    )
    evaluation = EvalArgs(interval=steps + 1, final_validation=False)
    pretrain.fit(fabric, 1, state, loader, loader, Path(), None, train, evaluation)
    return meter.points


TRAIN = {"transformers": train_transformers, "litgpt": train_litgpt}


def main() -> None:
    import torch

    run = PeerRun(**json.loads(sys.argv[1]))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data = dict(np.load(run.windows))
    data["train"] = data["train"][: run.steps]
    shape = dataclasses.replace(load_config_file(run.config).model, vocab_size=int(data["vocab_size"]))
    print(json.dumps(TRAIN[run.peer](shape, data, run)))


if __name__ == "__main__":
    main()
