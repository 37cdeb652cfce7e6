"""The ladder: small runs of one family, evenly spaced in the logarithm of their compute, that can be resumed.

Its directory has `ladder.json`, which records the settings, a run directory for each rung, and the messages of each
rung's training in a log file.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
from collections.abc import Iterator, Sequence
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

FORMAT, FILE = "nextllm_jax ladder 1", "ladder.json"
_LOCK, _PROBE = ".lock", ".speed_probe"
SPACING = 3.0
"""The compute of each rung in relation to that of the one before."""
_FIRST_GUESS_FLOPS, _MOST_MEASUREMENTS = 1e14, 5
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


class _Devices(NamedTuple):
    """What a new ladder finds out about the devices, and records."""

    count: int
    """The batch of each rung is a multiple of it."""
    total_flops: float
    """Compute of all rungs."""

    def are_valid(self) -> bool:
        return type(self.count) is int and self.count > 0 and 0 < self.total_flops < math.inf


class Rung(NamedTuple):
    """A small run and, if it has finished, its loss in bits per byte."""

    config: Config
    size: Size
    loss: float | None


class Ladder:
    """The ladder in a directory. `base` states its vocabulary and the directories of its data."""

    def __init__(self, directory: Path, base: Config, settings: LadderSettings, trainer: Trainer) -> None:
        self._directory, self._base, self._settings, self._trainer = directory, base, settings, trainer

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """A context in which no other process uses the directory.

        Entering it raises InputError if another one does, or if the directory has something else.
        """
        storage = open_storage(self._directory)
        storage.require_writable("", is_directory=True)
        if not storage.exists(FILE) and set(storage.names()) - {_LOCK, _PROBE, f"{_PROBE}.log"}:
            raise InputError(f"{self._directory} is not empty and has no ladder; choose another --workdir")
        storage.require_writable(FILE, is_directory=False)
        with storage.lock(_LOCK):
            yield

    def prepare(self) -> list[Rung]:
        """The rungs. In a new directory, they are decided by the speed of the devices, and recorded.

        Raises InputError if the directory has a ladder with other settings.
        """
        devices = self._read()
        if devices is None:
            devices, seconds = self._measured()
            self._write(devices)
            _log.info(_sentence(self._rungs(devices), seconds))
        return self._rungs(devices)

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
                    if rung.loss is None:
                        run = workdir_of(rung.config)
                        raise InputError(
                            f"{run} has finished, but its metrics have no validation loss of its last step; delete "
                            f"{run} to train it again"
                        )
                    done += rung.size.flops
                    _log.info(f"rung {number} of {len(rungs)}: {rung.loss:.4f} bits per byte")
                finished.append(rung)
        return finished

    def _train(self, rung: Rung, bar: Any, done: float) -> None:
        per_step = rung.size.flops / rung.config.training.steps
        self._trainer.train(rung.config, lambda step: bar.update(max(0.0, done + step * per_step - bar.n)))
        bar.update(max(0.0, done + rung.size.flops - bar.n))

    def _rungs(self, devices: _Devices) -> list[Rung]:
        found = []
        for number, flops in enumerate(spread(devices.total_flops, self._settings.rungs, SPACING), 1):
            config = self._small(flops, devices.count, f"rung_{number}")
            found.append(Rung(config, size_of(config), finished_loss(config)))
        return found

    def _small(self, flops: float, num_devices: int, name: str) -> Config:
        """A small run of the family: it evaluates once, at the end, and writes only what the ladder needs."""
        ratio = self._settings.tokens_per_parameter
        config = member(self._base, flops, ratio, batch_multiple=num_devices)
        steps = config.training.steps
        return dataclasses.replace(
            config,
            workdir=str(self._directory / name),
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

    def _measured(self) -> tuple[_Devices, float]:
        """What to record about the devices, and the seconds that all rungs take, from the speed of the largest one."""
        settings, count = self._settings, self._trainer.num_devices()
        total = settings.ladder_flops or _FIRST_GUESS_FLOPS
        overhead = settings.rungs * _START_SECONDS
        seconds = 0.0
        for _ in range(_MOST_MEASUREMENTS):
            largest = self._small(spread(total, settings.rungs, SPACING)[-1], count, _PROBE)
            training = dataclasses.replace(largest.training, log_every_steps=1)
            _log.info(f"measuring the speed of a rung with {size_of(largest).parameters:,} parameters")
            tokens = self._trainer.measure(dataclasses.replace(largest, training=training))
            speed = _EFFICIENCY * tokens * flops_per_token(largest.model, largest.data.sequence_length)
            if settings.ladder_flops is None:
                # Of a short ladder, the overhead may take at most half of the time.
                seconds = max(60 * settings.ladder_minutes - overhead, 30 * settings.ladder_minutes)
                before, total = total, speed * seconds
            else:
                before, seconds = total, total / speed
            if 1 / 2 < total / before < 2:  # the measured rung was about as large as the final one
                break
        return _Devices(count, total), seconds + overhead

    def _read(self) -> _Devices | None:
        """What the directory records about the devices; None for a new ladder."""
        file = self._directory / FILE
        if not file.exists():
            return None
        try:
            record = json.loads(file.read_text())
            if record["format"] != FORMAT:
                raise InputError(f"{file} has format '{record['format']}'; use the version that wrote it")
            before = config_of_values(record["config"], str(file))
            old, devices = LadderSettings(**record["settings"]), _Devices(**record["devices"])
            if not devices.are_valid():
                raise ValueError(record["devices"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged ({error!r}); choose another --workdir") from error
        self._require_same(before, old)
        return devices

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

    def _write(self, devices: _Devices) -> None:
        record = {
            "format": FORMAT,
            "settings": dataclasses.asdict(self._settings),
            "devices": devices._asdict(),
            "config": json.loads(self._base.to_json()),
        }
        RunDir(self._directory).write(FILE, (json.dumps(record, indent=2) + "\n").encode())


def _sentence(rungs: Sequence[Rung], seconds: float) -> str:
    smallest, largest = rungs[0].size.flops, rungs[-1].size.flops
    speed = sum(rung.size.flops for rung in rungs) / seconds
    duration = datetime.timedelta(seconds=round(seconds))
    return f"{len(rungs)} rungs of {smallest:.2g} to {largest:.2g} FLOPs take about {duration}, at {speed:.2g} FLOP/s"


def directory_of(base: Config) -> Path:
    """The directory of a ladder. Raises InputError for one in a bucket."""
    workdir = workdir_of(base)
    if "://" in workdir:
        raise InputError(f"workdir is {workdir}; a ladder needs a directory on a local disk")
    return Path(workdir)
