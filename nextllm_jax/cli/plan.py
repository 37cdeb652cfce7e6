"""The command `nextllm plan`."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nextllm_jax import process
from nextllm_jax.cli.help import parse_with_config
from nextllm_jax.config import Config, LoraConfig
from nextllm_jax.config.files import config_of_arguments
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import unknown_chip

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Estimate the memory, communication and time of a train step on devices that you do not have."""

    config: str
    """Python file that defines get_config() -> Config, as for train."""
    topology: str | None = None
    """TPU generation and shape of a slice, such as v5e:4x4, v5p:4x4x4, v6e:16x16 or tpu7x:4x4x4. With --mesh.slices: of
    each slice."""
    fast: bool = False
    """Estimate by formula within a second, without compiling."""
    chip: str | None = None
    """With --fast, instead of --topology: JAX's name of the devices, such as "NVIDIA H100 80GB HBM3". For an unknown
    name, the plan has memory and traffic, but no speed, and a warning lists the known names."""
    devices: int | None = None
    """With --chip: number of devices; none: 1."""
    search: bool = False
    """Rank the meshes, remat policies and accumulation steps that fit, and compile the best ones."""
    search_minutes: float = 10.0
    """Minutes after which --search starts no further compilation."""
    days: float = 30.0
    """Report how many steps and tokens are possible in this many days."""
    tokens: float | None = None
    """Report how many days this many tokens take; none: the tokens of training.steps."""
    decode: bool = False
    """Plan sampling instead of training: prefill, and a decode step with its KV cache."""
    batch_size: int = 1
    """With --decode: number of rows in a batch."""
    prompt_tokens: int = 512
    """With --decode: tokens per prompt."""
    new_tokens: int = 128
    """With --decode: maximum number of new tokens per row."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """With --decode: quantize the matrices, as `sample --quantize` does."""
    quantize_cache: bool = False
    """With --decode: keep keys and values in int8, as `sample --quantize-cache` does."""
    hlo: str | None = None
    """New file for the text of the compiled train step (XLA HLO)."""
    json: bool = False
    """Print one JSON object."""
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def plan_command(argv: list[str]) -> int:
    """Estimate memory and time on devices that you do not have.

    Returns the exit code.
    """
    file = config_of_arguments(argv)
    default = PlanArguments(config=tyro.MISSING, run=file)
    arguments = parse_with_config(argv, default, prog="nextllm plan")
    _check(arguments)
    process.use_planning_settings()
    if arguments.run.init_from is not None:
        from nextllm_jax.pretrained.init_from import with_source

        # Sampling merges adapters into the weights.
        config, _ = with_source(arguments.run, file, overwrite=True)
        config = dataclasses.replace(config, init_from=None, lora=LoraConfig())
        arguments = dataclasses.replace(arguments, run=config)
    values, table = _plan(arguments)
    print(json.dumps(values) if arguments.json else table)
    return 0


def _check(arguments: PlanArguments) -> None:
    if (arguments.topology is None) == (arguments.chip is None):
        raise InputError("there must be one target; give either --topology, or --fast and --chip")
    if arguments.chip is not None and not arguments.fast:
        raise InputError("--chip can only be estimated; add --fast")
    if arguments.topology is not None and arguments.devices is not None:
        raise InputError("--devices is for --chip; a topology has a fixed number of devices")
    if arguments.decode and (arguments.fast or arguments.search):
        raise InputError("--decode always compiles; leave out --fast and --search")
    for option, given in (("--quantize", arguments.quantize != "none"), ("--quantize-cache", arguments.quantize_cache)):
        if given and not arguments.decode:
            raise InputError(f"{option} is for sampling; add --decode")
    if arguments.hlo is not None and (arguments.fast or arguments.search or arguments.decode):
        raise InputError("--hlo needs a single compiled train step; leave out --fast, --search and --decode")
    if arguments.hlo is not None and Path(arguments.hlo).exists():
        raise InputError(f"{arguments.hlo} exists already; give --hlo a new file")
    if arguments.hlo is not None and not os.access(Path(arguments.hlo).parent, os.W_OK):
        raise InputError(
            f"--hlo {arguments.hlo} cannot be written; name a file in a directory that exists and is writable"
        )
    if arguments.run.init_from is not None and not arguments.decode:
        raise InputError(
            f"init_from is {arguments.run.init_from}, but plan does not support training from other models; give a "
            "config that states the model, without init_from"
        )
    for name in ("days", "tokens", "search_minutes", "batch_size", "prompt_tokens", "new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise InputError(f"{name} is {value}; it must be positive")


def _plan(arguments: PlanArguments) -> tuple[dict[str, Any], str]:
    """The plan that the arguments ask for, as JSON values and as a table."""
    from nextllm_jax.data.sources import first_prepared
    from nextllm_jax.plan import report, topology
    from nextllm_jax.plan.decoding import Request, plan_decoding
    from nextllm_jax.plan.search import search
    from nextllm_jax.plan.training import estimate_training, plan_training
    from nextllm_jax.training.vocabulary import with_vocab_size

    config, budget = arguments.run, report.Budget(arguments.days, arguments.tokens)
    config = with_vocab_size(config, first_prepared(config.data), overwrite=True)
    if arguments.chip is not None:
        target = topology.devices_of_kind(arguments.chip, 1 if arguments.devices is None else arguments.devices)
        if target.chip is None and not arguments.search:
            _log.warning(f"{unknown_chip(arguments.chip)}. The plan has memory without speed")
    else:
        target = topology.tpu_slices(arguments.topology or "", config.mesh.slices)
    if arguments.decode:
        request = Request(
            batch_size=arguments.batch_size,
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.new_tokens,
            quantize_cache=arguments.quantize_cache,
        )
        quantization = None if arguments.quantize == "none" else Quantization(scheme=arguments.quantize)
        decoding = plan_decoding(config, target, request, quantization)
        return report.decoding_json(decoding), report.decoding_table(decoding)
    if arguments.search:
        minutes = 0.0 if arguments.fast else arguments.search_minutes
        plans = search(config, target, minutes)
        return report.search_json(plans, budget), report.search_table(plans, budget)
    plan = estimate_training(config, target) if arguments.fast else plan_training(config, target)
    if arguments.hlo is not None:
        Path(arguments.hlo).write_text(plan.hlo)
    return report.training_json(plan, budget), report.training_table(plan, budget)
