"""The command `nextllm plan`."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from nextllm_jax import process
from nextllm_jax.config import Config
from nextllm_jax.config_files import config_of_arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Say what a training takes on TPUs, without them: memory, communication and time of its compiled step."""

    config: str
    """Python file that defines get_config() -> Config, as for train."""
    topology: str
    """TPU generation and shape, such as v5e:4x4, v5p:4x4x4, v6e:16x16 or tpu7x:4x4x4."""
    days: float = 30.0
    """Days for which to say how many steps and tokens they are at most."""
    decode: bool = False
    """Plan sampling instead: prefill, and a decode step with its cache."""
    batch_size: int = 1
    """With --decode: rows that are sampled together."""
    prompt_tokens: int = 512
    """With --decode: length of the prompts."""
    new_tokens: int = 128
    """With --decode: tokens that each row may get."""
    json: bool = False
    """Print one JSON object."""
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def plan_command(argv: list[str]) -> int:
    """Print a plan; the exit code."""
    default: Any = PlanArguments(config=tyro.MISSING, topology=tyro.MISSING, run=config_of_arguments(argv))
    arguments = tyro.cli(PlanArguments, args=argv, prog="nextllm plan", default=default)
    process.use_planning_settings()
    with _Progress() as say:
        values, table = _plan_decoding(arguments, say) if arguments.decode else _plan_training(arguments, say)
    print(json.dumps(values) if arguments.json else table)
    return 0


def _plan_training(arguments: PlanArguments, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    from nextllm_jax.plan.report import training_json, training_table
    from nextllm_jax.plan.topology import chip_of, tpu_devices
    from nextllm_jax.plan.training import plan_training

    devices = tpu_devices(arguments.topology)
    plan = plan_training(arguments.run, devices, chip_of(devices[0]), arguments.topology, say)
    return training_json(plan, arguments.days), training_table(plan, arguments.days)


def _plan_decoding(arguments: PlanArguments, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    from nextllm_jax.plan.decoding import Request, plan_decoding
    from nextllm_jax.plan.report import decoding_json, decoding_table
    from nextllm_jax.plan.topology import chip_of, tpu_devices

    request = Request(
        batch_size=arguments.batch_size, prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens
    )
    devices = tpu_devices(arguments.topology)
    plan = plan_decoding(arguments.run, devices, chip_of(devices[0]), arguments.topology, request, say)
    return decoding_json(plan), decoding_table(plan)


class _Progress:
    """One line on standard error: rewritten on a terminal, elsewhere repeated every half minute."""

    def __init__(self) -> None:
        self._last = time.monotonic() - 30
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Callable[[str], None]:
        return self._say

    def _say(self, text: str) -> None:
        if self._is_terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last >= 30:
            self._last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
