"""The command `nextllm plan`."""

import dataclasses
import json
import sys
import time
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
    json: bool = False
    """Print one JSON object."""
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def plan_command(argv: list[str]) -> int:
    """Print a plan; the exit code."""
    default: Any = PlanArguments(config=tyro.MISSING, topology=tyro.MISSING, run=config_of_arguments(argv))
    arguments = tyro.cli(PlanArguments, args=argv, prog="nextllm plan", default=default)
    process.use_planning_settings()

    from nextllm_jax.plan.report import training_json
    from nextllm_jax.plan.topology import chip_of, tpu_devices
    from nextllm_jax.plan.training import plan_training

    devices = tpu_devices(arguments.topology)
    progress = _Progress()
    plan = plan_training(arguments.run, devices, chip_of(devices[0]), arguments.topology, progress.say)
    progress.close()
    print(json.dumps(training_json(plan), indent=None if arguments.json else 2))
    return 0


class _Progress:
    """One line on standard error: rewritten on a terminal, elsewhere repeated every half minute."""

    def __init__(self) -> None:
        self._last = time.monotonic() - 30
        self._is_terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Show what is being done."""
        if self._is_terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last >= 30:
            self._last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave a clean line."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
