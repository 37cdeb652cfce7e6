"""Overhead of sharding a train step: one CPU device compared with eight simulated ones on the same cores.

    python benchmarks/simulated_mesh.py [--rounds 3] [--steps 8]

Both sides do the same work on the same cores, so without overhead they would take the same time. The ratio shows the
cost of eight programs, their collectives and smaller matrix products; it does not include a network. Each measurement
is a new process. Sides alternate within a round, and ratios are taken within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nextllm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig  # noqa: E402
from nextllm_jax.process import TRAINING_ENVIRONMENT  # noqa: E402

VOCAB, BATCH, LENGTH, WARMUP_STEPS = 2048, 16, 256, 2
MESHES = {
    "1 device": {},
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "tensor 4, data 2": {"data": 2, "tensor": 4},
    "sequence 4, fsdp 2": {"data": 1, "fsdp": 2, "sequence": 4},
}


def measure(name: str, steps: int) -> dict[str, float]:
    """Throughput of the train step on this process's devices, and the loss after the last step."""
    import jax
    import jax.numpy as jnp

    from nextllm_jax.model.objective import Batch
    from nextllm_jax.sharding import make_mesh, sharding
    from nextllm_jax.training.program import build_program

    model = ModelConfig(
        vocab_size=VOCAB, num_layers=4, embed_dim=256, mlp_dim=512, num_heads=8, num_kv_heads=4, head_dim=32,
        dtype="float32",
    )  # fmt: skip
    config = Config(
        model=model,
        data=DataConfig(vocab_size=VOCAB, sequence_length=LENGTH),
        training=TrainingConfig(global_batch_size=BATCH),
        mesh=MeshConfig(**MESHES[name]),
    )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build_program(config, mesh)
        state = program.create_state()
        stream = jax.random.randint(jax.random.key(0), (BATCH, LENGTH + 1), 0, VOCAB, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (BATCH, LENGTH))
        batch = Batch(stream[:, :-1], stream[:, 1:], jnp.ones_like(positions), positions, positions >= 0)
        batch = jax.device_put(batch, sharding(mesh, "batch", "seq"))
        loss, times = 0.0, []
        for _ in range(WARMUP_STEPS + steps):
            began = time.perf_counter()
            state, metrics = program.train_step(state, batch)
            loss = float(metrics.nll_sum) / (BATCH * LENGTH)
            times.append(time.perf_counter() - began)
    return {"tokens_per_second": BATCH * LENGTH / statistics.median(times[WARMUP_STEPS:]), "loss": loss}


def measure_in_new_process(name: str, steps: int) -> dict[str, float]:
    """`measure` in a new process with as many simulated devices as the mesh needs."""
    count = 1 if name == "1 device" else 8
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    environment = {**os.environ, **TRAINING_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, "--measure", name, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--measure", choices=MESHES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.steps)))
        return
    rounds = [{name: measure_in_new_process(name, arguments.steps) for name in MESHES} for _ in range(arguments.rounds)]
    alone = rounds[0]["1 device"]["loss"]
    print(f"{'mesh':20} {'tokens/s':>9} {'/ 1 device':>12} {'loss':>9}")
    for name in MESHES:
        speed = statistics.median(found[name]["tokens_per_second"] for found in rounds)
        ratios = [found[name]["tokens_per_second"] / found["1 device"]["tokens_per_second"] for found in rounds]
        loss = rounds[0][name]["loss"]
        assert abs(loss - alone) < 1e-3, f"{name} has loss {loss}, one device has {alone}"
        print(f"{name:20} {speed:9,.0f} {statistics.median(ratios):12.2f} {loss:9.5f}", flush=True)


if __name__ == "__main__":
    main()
