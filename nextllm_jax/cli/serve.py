"""The command `nextllm serve`."""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nextllm_jax.cli.help import parse
from nextllm_jax.cli.text import read_text
from nextllm_jax.config import MeshConfig
from nextllm_jax.config.checks import require, require_integer
from nextllm_jax.errors import InputError, missing_package
from nextllm_jax.process import use_compilation_cache
from nextllm_jax.serving.hosts import is_loopback

if TYPE_CHECKING:
    from nextllm_jax.serving.metrics import Metrics
    from nextllm_jax.serving.model import ServedModel

KEY_VARIABLE = "NEXTLLM_API_KEY"
_EXIT_SECONDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Serve models over HTTP, for OpenAI's clients and in the browser.

    On SIGTERM or Ctrl-C, the server finishes its requests and exits; on a second one, it exits at once.
    """

    checkpoint: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Model to serve, as for `nextllm sample`, or NAME=PATH; may be given several times. Without NAME, it has the last
    part of its path as its name."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Quantize the weights while loading."""
    quantize_cache: bool = False
    """Keep the keys and values of the slots in int8."""
    draft_tokens: int = 0
    """Verify this many guesses of the next tokens, from the text so far, in each step. The answers stay the same."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Type of the matmuls; none: that of the model's config."""
    num_slots: int = 16
    """Number of rows of a model that run at a time. Each sample of each prompt is a row."""
    max_length: int = 2048
    """Number of tokens of a slot, prompt and new tokens together; at most the model's context."""
    warm_up: bool = False
    """Compile the programs for all batch sizes and lengths before the server listens, so no request waits for them."""
    max_waiting: int = 128
    """Number of rows of a model that may wait for a slot. Others get status 429."""
    max_body_bytes: int = 2**20
    """Limit on the body of a request."""
    request_seconds: int = 600
    """Limit on the time of a request, including its time in the queue."""
    drain_seconds: int = 30
    """Time that requests have to end after SIGTERM."""
    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach needs an API key, or --no-key."""
    port: int = 8000
    """Port to listen on; 0: any free one, which is printed."""
    api_key_file: str | None = None
    """File with API keys, one per line; clients must send one of them. The environment variable NEXTLLM_API_KEY is
    another way to set one."""
    no_key: bool = False
    """Let everyone who reaches --host use the models without a key, with any Host header."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Shards each model over all devices. Without any of its options, a model is on one device."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_length", "max_body_bytes", "request_seconds"):
            require_integer(name, getattr(self, name))
        for name in ("max_waiting", "drain_seconds", "draft_tokens"):
            require_integer(name, getattr(self, name), 0)
        require(0 <= self.port < 2**16, f"--port is {self.port}; it must be between 0 and {2**16 - 1}")


def serve_command(argv: list[str]) -> int:
    """Serve models over HTTP, for OpenAI's clients and in the browser.

    Returns the exit code.
    """
    arguments = parse(ServeArguments, argv, prog="nextllm serve")
    paths = name_models(arguments.checkpoint)
    keys = read_keys(arguments.api_key_file)
    require_private(arguments.host, keys, no_key=arguments.no_key)
    require_one_process()
    try:
        from nextllm_jax.serving.app import Limits, Service
        from nextllm_jax.serving.metrics import Metrics
        from nextllm_jax.serving.server import bind, serve
    except ModuleNotFoundError as error:
        raise missing_package("nextllm serve needs", error, "nextllm_jax[serve]") from error

    use_compilation_cache()
    metrics = Metrics()
    limits = Limits(body_bytes=arguments.max_body_bytes, seconds=arguments.request_seconds)
    with bind(arguments.host, arguments.port) as sock:
        models = {name: load_model(name, path, arguments, metrics) for name, path in paths.items()}
        service = Service(
            models, metrics=metrics, limits=limits, keys=keys, local_only=not keys and not arguments.no_key
        )
        serve(service, sock, drain_seconds=arguments.drain_seconds)
    for model in models.values():
        model.worker.close(_EXIT_SECONDS)
    return 0


def load_model(name: str, path: str, arguments: ServeArguments, metrics: "Metrics") -> "ServedModel":
    """The model of a path with its worker. Raises InputError as `load` does, and if it has no tokenizer."""
    from nextllm_jax.inference.load import load
    from nextllm_jax.serving.model import ServedModel
    from nextllm_jax.serving.worker import Worker

    llm = load(
        path,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        quantize_cache=arguments.quantize_cache,
        mesh=None if arguments.mesh == MeshConfig() else arguments.mesh,
    )
    if arguments.draft_tokens:
        llm = llm.with_drafts(arguments.draft_tokens)
    worker = Worker(
        llm,
        num_slots=arguments.num_slots,
        max_length=arguments.max_length,
        max_waiting=arguments.max_waiting,
        warm_up=arguments.warm_up,
        metrics=metrics.of_model(name),
    )
    return ServedModel(name, llm, worker)


def name_models(checkpoints: tuple[str, ...]) -> dict[str, str]:
    """The paths of the models by name. Raises InputError if two have the same name."""
    require(len(checkpoints) > 0, "there is no model; give --checkpoint PATH")
    paths: dict[str, str] = {}
    for checkpoint in checkpoints:
        name, found, path = checkpoint.partition("=")
        if not found or "/" in name:
            name, path = Path(checkpoint.rstrip("/")).name, checkpoint
        require(bool(name and path), f"--checkpoint is {checkpoint!r}; it must be PATH or NAME=PATH")
        require(name not in paths, f"two models have the name {name!r}; give --checkpoint NAME=PATH")
        paths[name] = path
    return paths


def read_keys(path: str | None) -> list[str]:
    """The API keys of the file and of the environment. Raises InputError if the file has none."""
    keys = [] if path is None else [line.strip() for line in read_text(path).splitlines() if line.strip()]
    require(path is None or bool(keys), f"{path} has no key; write one per line")
    return [*keys, *filter(None, [os.environ.get(KEY_VARIABLE)])]


def require_private(host: str, keys: list[str], *, no_key: bool) -> None:
    """Raise InputError if other machines could reach the server without a key."""
    require(
        is_loopback(host) or bool(keys) or no_key,
        f"other machines can reach --host {host}; give --api-key-file, set {KEY_VARIABLE}, or add --no-key",
    )


def require_one_process() -> None:
    """Raise InputError in a job of several processes: each would serve alone."""
    from nextllm_jax.distributed.rendezvous import DistributedConfig, find_process_info

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info = find_process_info(DistributedConfig())
    if info is not None:
        raise InputError(
            f"nextllm serve runs in one process, and this is one of {info.num_processes}; start it on one machine only"
        )
