"""The command `nextllm scale`."""

import dataclasses
import json
import logging
import os
from typing import TYPE_CHECKING, Annotated

import tyro

from nextllm_jax import process
from nextllm_jax.cli.help import parse_with_config
from nextllm_jax.config import Config
from nextllm_jax.config.files import config_of_arguments
from nextllm_jax.errors import EXIT_INTERRUPTED, InputError
from nextllm_jax.hardware import unknown_chip

if TYPE_CHECKING:
    from nextllm_jax.data.mixture import Source
    from nextllm_jax.plan.topology import Target
    from nextllm_jax.scaling.processes import Trainer

_log = logging.getLogger(__name__)

PICTURE = "scaling.png"
_MOST_RUNGS = 20
_BOUNDS = {
    "budget": (1, 1e30),
    "days": (1e-9, 1e6),
    "price": (1e-9, 1e9),
    "tokens_per_parameter": (1e-3, 1e6),
    "ladder_minutes": (1e-3, 1e6),
    "ladder_flops": (1, 1e30),
}
"""Of the options that are numbers. Far outside, the models would have more layers than can be counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleArguments:
    """Train a ladder of small models, fit their losses, and predict and plan a large run of the same family.

    The same command continues an interrupted ladder. Its directory is --workdir, or runs/<name of the config
    file>_ladder.
    """

    config: str
    """Python file that defines get_config() -> Config, as for train. All runs have its ratios and its recipe."""
    budget: float | None = None
    """FLOPs of the large run, such as 1e18."""
    days: float | None = None
    """Instead of --budget: days that the large run may take on the devices of --topology or --chip."""
    mfu: float | None = None
    """With --days: model FLOPs utilization that the large run is expected to reach; none: 0.4."""
    topology: str | None = None
    """TPU generation and shape of a slice for the large run, such as v5e:4x4; see nextllm plan."""
    chip: str | None = None
    """Instead of --topology: JAX's name of the devices, such as "NVIDIA H100 80GB HBM3". Nothing is compiled."""
    devices: int | None = None
    """With --chip: number of devices; none: 1."""
    price: float | None = None
    """Price of a device and hour, in any currency."""
    tokens_per_parameter: float = 8.0
    """Training tokens per parameter, in all runs. Of experts, only the chosen ones count."""
    rungs: int = 4
    """Number of small runs, at least 4. Each takes three times the compute of the one before."""
    ladder_minutes: float = 25.0
    """Minutes that all small runs together may take on the devices here."""
    ladder_flops: float | None = None
    """FLOPs of all small runs together, instead of --ladder-minutes."""
    search_minutes: float = 10.0
    """Minutes after which no further compilation of a plan starts. 0: estimate instead of compiling."""
    extrapolate: bool = False
    """Accept a large run beyond 100 times the compute of the largest small run, beyond 4 epochs of the data, or with
    small runs that do not follow the curve."""
    json: bool = False
    """Print one JSON object."""
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def scale_command(argv: list[str]) -> int:
    """Predict a large run from small ones.

    Returns the exit code.
    """
    file = config_of_arguments(argv)
    arguments = parse_with_config(argv, ScaleArguments(config=tyro.MISSING, run=file), prog="nextllm scale")
    _check(arguments)
    environment = dict(os.environ)
    process.use_planning_settings()

    from nextllm_jax.scaling.processes import Interrupted, Trainer, interruptible

    try:
        with interruptible():
            return _scale(arguments, file, Trainer(arguments.config, file, environment))
    except Interrupted:
        _log.info("interrupted; the same command continues")
        return EXIT_INTERRUPTED


def _check(arguments: ScaleArguments) -> None:
    has_devices = arguments.topology is not None or arguments.chip is not None
    if (arguments.budget is None) == (arguments.days is None):
        raise InputError("the size of the large run is not given once; give either --budget, or --days with --topology")
    if arguments.topology is not None and arguments.chip is not None:
        raise InputError("there must be one target; give either --topology or --chip")
    for option in ("days", "price"):
        if getattr(arguments, option) is not None and not has_devices:
            raise InputError(f"--{option} needs the devices of the large run; add --topology or --chip")
    if arguments.devices is not None and arguments.chip is None:
        raise InputError("--devices is for --chip; a topology has a fixed number of devices")
    if not 4 <= arguments.rungs <= _MOST_RUNGS:
        raise InputError(
            f"--rungs is {arguments.rungs}; it must be at least 4, for a fit with an error band, and at most "
            f"{_MOST_RUNGS}"
        )
    for name, (least, most) in _BOUNDS.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be from {least:g} to {most:g}")
    if not arguments.search_minutes >= 0:
        raise InputError(f"--search-minutes is {arguments.search_minutes}; it must be at least 0")
    if arguments.mfu is not None and arguments.days is None:
        raise InputError("--mfu is for --days; --budget is given in FLOPs")
    if arguments.mfu is not None and not 0 < arguments.mfu <= 1:
        raise InputError(f"--mfu is {arguments.mfu}; it must be a fraction above 0 and up to 1")
    if arguments.run.init_from is not None:
        raise InputError(
            f"init_from is {arguments.run.init_from}, but all runs start from new weights; leave out init_from and lora"
        )


def _scale(arguments: ScaleArguments, file: Config, trainer: "Trainer") -> int:
    from nextllm_jax.checkpoint.run_dir import RunDir
    from nextllm_jax.scaling import report
    from nextllm_jax.scaling.ladder import Ladder, LadderSettings, directory_of
    from nextllm_jax.scaling.large_run import forecast, large_run, planned

    base, sources = _with_data(arguments.run, file)
    directory, target = directory_of(base), _target(arguments)
    settings = LadderSettings(**{name: getattr(arguments, name) for name in LadderSettings.__dataclass_fields__})
    ladder = Ladder(directory, base, settings, trainer)
    with ladder.lock():
        rungs = ladder.prepare()
        flops = _large_flops(arguments, target)
        run = large_run(base, flops, arguments.tokens_per_parameter, rungs[-1].size.flops, sources)
        for warning in run.warnings():
            _log.warning(warning)
        rungs = ladder.climb(rungs)
    found = forecast(rungs, run, arguments.price)
    RunDir(directory).write(PICTURE, report.draw(rungs, found))
    warnings = found.warnings()
    for warning in warnings:
        if warning not in run.warnings():
            _log.warning(warning)
    problem = ""
    if warnings and not arguments.extrapolate:
        problem = f"{'; '.join(warnings)}; to accept that, and to plan the large run, add --extrapolate"
    elif target is not None:
        try:
            found = found._replace(plan=planned(run, target, arguments.search_minutes))
        except InputError as error:  # raised after the forecast was printed
            problem = str(error)
    if arguments.days is not None and found.least_days is not None and found.least_days > arguments.days:
        _log.warning(
            f"the plan takes at least {found.least_days:.3g} days, more than --days {arguments.days:g}; give an --mfu "
            f"below {_mfu(arguments):g}"
        )
    if arguments.json:
        print(json.dumps(report.forecast_json(rungs, found)))
    else:
        # The command trains on the data that the config names, in a directory of its own.
        shown = dataclasses.replace(arguments.run, workdir=f"{file.workdir}_large")
        print(report.rungs_table(rungs, found))
        print(f"\n{report.large_run_table(found, arguments.config, file, shown)}")
        print(f"\n{directory / PICTURE} shows the curve")
    if problem:
        raise InputError(problem)
    return 0


def _with_data(config: Config, file: Config) -> "tuple[Config, tuple[Source, ...]]":
    """The config with its prepared data, its vocabulary and the ladder's directory; and the sources of the data."""
    from nextllm_jax.data.prepare import ensure_prepared
    from nextllm_jax.data.sources import open_sources, source_paths, with_source_paths
    from nextllm_jax.training.vocabulary import with_vocab_size

    if config.workdir == file.workdir:
        config = dataclasses.replace(config, workdir=f"{file.workdir}_ladder")
    paths = source_paths(config.data, ensure_prepared)
    config = dataclasses.replace(config, data=with_source_paths(config.data, [str(path) for path in paths]))
    return with_vocab_size(config, paths[0], overwrite=True), open_sources(config.data, paths)


def _target(arguments: ScaleArguments) -> "Target | None":
    """The devices of the large run, if the arguments name them."""
    from nextllm_jax.plan.topology import devices_of_kind, tpu_slices

    if arguments.topology is not None:
        return tpu_slices(arguments.topology, arguments.run.mesh.slices)
    if arguments.chip is None:
        return None
    target = devices_of_kind(arguments.chip, 1 if arguments.devices is None else arguments.devices)
    if target.chip is None:
        raise InputError(unknown_chip(arguments.chip))
    return target


def _large_flops(arguments: ScaleArguments, target: "Target | None") -> float:
    """The compute of the large run: the budget, or what the devices do in the given days."""
    if arguments.budget is not None:
        return arguments.budget
    assert arguments.days is not None  # see _check
    assert target is not None
    assert target.chip is not None
    return arguments.days * 86_400 * target.num_devices * target.chip.peak_flops_bf16 * _mfu(arguments)


def _mfu(arguments: ScaleArguments) -> float:
    return 0.4 if arguments.mfu is None else arguments.mfu
