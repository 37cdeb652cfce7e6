"""The ladder: small runs of one family, evenly spaced in the logarithm of their compute, that can be resumed.

Its directory has `ladder.json`, which records the settings, a run directory for each rung, and the messages of each
rung's training in a log file.
"""

import dataclasses
import datetime
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config, EvaluationConfig, LoggingConfig, MeshConfig
from nextllm_jax.config.files import config_of_values, workdir_of
from nextllm_jax.errors import InputError
from nextllm_jax.model.accounting import flops_per_token
from nextllm_jax.progress import progress_bar
from nextllm_jax.scaling.family import Size, member, size_of, spread
from nextllm_jax.scaling.processes import Trainer, finished_loss
from nextllm_jax.storage.open_storage import open_storage
from nextllm_jax.training.resume_guard import Change, changes

_log = logging.getLogger(__name__)

FORMAT, FILE, FEWEST_RUNGS = "nextllm_jax ladder 1", "ladder.json", 4
SPACING = 3.0
"""The compute of each rung in relation to that of the one before."""
_FIRST_GUESS_FLOPS = 1e14
_EFFICIENCY, _START_SECONDS = 0.8, 15.0
"""The mean speed of all rungs in relation to that of the largest, and the time in which a rung starts and evaluates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderSettings:
    """What decides the rungs, besides the config."""

    rungs: int
    tokens_per_parameter: float
    ladder_minutes: float
    ladder_flops: float | None
    """Compute of all rungs; None: what the devices do in `ladder_minutes`."""


class Rung(NamedTuple):
    """A small run and, if it has finished, its loss in bits per byte."""

    config: Config
    size: Size
    loss: float | None


class Ladder:
    """The ladder in a directory. `base` states its vocabulary and the directories of its data."""

    def __init__(self, directory: Path, base: Config, settings: LadderSettings, trainer: Trainer) -> None:
        self._directory, self._base, self._settings, self._trainer = directory, base, settings, trainer

    def prepare(self) -> list[Rung]:
        """The rungs. In a new directory, they are decided by the speed of the devices, and recorded.

        Raises InputError if the directory has something else, or a ladder with other settings.
        """
        total = self._read()
        if total is None:
            total, seconds = self._measured()
            self._write(total)
            _log.info(_sentence(self._rungs(total), seconds))
        return self._rungs(total)

    def climb(self, rungs: Sequence[Rung]) -> list[Rung]:
        """Train the rungs that have not finished; returns all of them with their losses.

        Raises Interrupted for a signal, and InputError or RunFailed if a run fails.
        """
        finished, done = [], sum(rung.size.flops for rung in rungs if rung.loss is not None)
        whole = sum(rung.size.flops for rung in rungs)
        with progress_bar(desc="ladder", total=whole, initial=done, unit="FLOP", unit_scale=True) as bar:  # pyright: ignore[reportArgumentType]
            for number, rung in enumerate(rungs, 1):
                if rung.loss is None:
                    bar.set_postfix_str(f"rung {number} of {len(rungs)}")
                    self._train(rung, bar, done)
                    rung = rung._replace(loss=finished_loss(rung.config))
                    done += rung.size.flops
                    _log.info(f"rung {number} of {len(rungs)}: {rung.loss:.4f} bits per byte")
                finished.append(rung)
        return finished

    def _train(self, rung: Rung, bar: Any, done: float) -> None:
        per_step = rung.size.flops / rung.config.training.steps
        self._trainer.train(rung.config, lambda step: bar.update(max(0.0, done + step * per_step - bar.n)))
        bar.update(max(0.0, done + rung.size.flops - bar.n))

    def _rungs(self, total_flops: float) -> list[Rung]:
        found = []
        for number, flops in enumerate(spread(total_flops, self._settings.rungs, SPACING), 1):
            config = _small(self._member(flops), self._directory / f"rung_{number}")
            found.append(Rung(config, size_of(config), finished_loss(config)))
        return found

    def _member(self, flops: float) -> Config:
        return member(self._base, flops, self._settings.tokens_per_parameter)

    def _measured(self) -> tuple[float, float]:
        """(FLOPs of all rungs, seconds that they take), from the speed of the largest rung."""
        settings = self._settings
        total = settings.ladder_flops or _FIRST_GUESS_FLOPS
        overhead = settings.rungs * _START_SECONDS
        while True:
            largest = _small(self._member(spread(total, settings.rungs, SPACING)[-1]), self._directory / "probe")
            training = dataclasses.replace(largest.training, log_every_steps=1)
            _log.info(f"measuring the speed of a rung with {size_of(largest).parameters:,} parameters")
            tokens = self._trainer.measure(dataclasses.replace(largest, training=training))
            speed = _EFFICIENCY * tokens * flops_per_token(largest.model, largest.data.sequence_length)
            if settings.ladder_flops:
                return total, total / speed + overhead
            # The overhead is a part of short ladders only, such as those of tests.
            seconds = max(60 * settings.ladder_minutes - overhead, 30 * settings.ladder_minutes)
            before, total = total, speed * seconds
            if 1 / 2 < total / before < 2:
                return total, total / speed + overhead

    def _read(self) -> float | None:
        """The FLOPs of all rungs that the directory records; None for a new ladder."""
        file = self._directory / FILE
        open_storage(self._directory).require_writable("", is_directory=True)
        if not file.exists():
            others = sorted(path.name for path in self._directory.glob("*") if not path.name.startswith("probe"))
            if others:
                raise InputError(f"{self._directory} is not empty and has no ladder; choose another --workdir")
            return None
        try:
            record = json.loads(file.read_text())
            before = config_of_values(record["config"], str(file))
            old, total = LadderSettings(**record["settings"]), float(record["total_flops"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged ({error!r}); choose another --workdir") from error
        self._require_same(before, old)
        return total

    def _require_same(self, config: Config, settings: LadderSettings) -> None:
        """Raise InputError, with a line for each field, if the ladder has other settings."""
        before, after = dataclasses.asdict(settings), dataclasses.asdict(self._settings)
        found = [Change(name, old, after[name], "", False) for name, old in before.items() if old != after[name]]
        found += changes(config, self._base)
        if found:
            lines = "".join(f"\n  {change.name} {change.old} -> {change.new}" for change in found)
            raise InputError(
                f"{self._directory} holds a ladder with other settings, which was not touched:{lines}\n"
                "restore the old values, or start a new ladder: another --workdir"
            )

    def _write(self, total_flops: float) -> None:
        record = {
            "format": FORMAT,
            "settings": dataclasses.asdict(self._settings),
            "total_flops": total_flops,
            "config": json.loads(self._base.to_json()),
        }
        RunDir(self._directory).write(FILE, (json.dumps(record, indent=2) + "\n").encode())


def _sentence(rungs: Sequence[Rung], seconds: float) -> str:
    smallest, largest = rungs[0].size.flops, rungs[-1].size.flops
    speed = sum(rung.size.flops for rung in rungs) / seconds
    duration = datetime.timedelta(seconds=round(seconds))
    return f"{len(rungs)} rungs of {smallest:.2g} to {largest:.2g} FLOPs take about {duration}, at {speed:.2g} FLOP/s"


def _small(config: Config, workdir: Path) -> Config:
    """The config of a rung: it evaluates once, at the end, and writes nothing that the ladder does not need."""
    steps = config.training.steps
    return dataclasses.replace(
        config,
        workdir=str(workdir),
        model=config.model.without_remat(),
        mesh=MeshConfig(),
        training=dataclasses.replace(
            config.training, log_every_steps=max(1, steps // 100), evaluate_every_steps=steps, sample_tokens=0
        ),
        checkpoint=dataclasses.replace(
            config.checkpoint, every_steps=max(1, steps // 5), keep_last=1, keep_every_steps=0, scratch=None
        ),
        evaluation=EvaluationConfig(),
        logging=LoggingConfig(),
    )


def directory_of(base: Config) -> Path:
    """The directory of a ladder. Raises InputError for one in a bucket."""
    workdir = workdir_of(base)
    if "://" in workdir:
        raise InputError(f"workdir is {workdir}; a ladder needs a directory on a local disk")
    return Path(workdir)
