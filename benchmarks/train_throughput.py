"""Training throughput of our train step, compared with the Llamas of transformers and litgpt in torch, on CPU or GPU.

    python benchmarks/train_throughput.py [--rounds 5] [--steps 5]
    python benchmarks/train_throughput.py --shape moe --batch-size 8
    python benchmarks/train_throughput.py --platform cuda --shape 114m --batch-size 32 --sequence-length 1024

All sides train the same model on the same shapes: float32 parameters, AdamW, clipping at 1, matmuls in float32 or
bfloat16 (torch: autocast).

- Each measurement runs in a new process, since equal processes may differ by tens of percent. Sides alternate within a
  round, and ratios are taken within a round.
- Ours runs with the process settings of train.py. On a CPU, transformers runs both with torch's defaults and with these
  settings. On a GPU, it runs both eagerly and with torch.compile.
- The shape moe is that of a Mixtral. transformers runs it with two of its implementations of experts, and with our
  settings; it has no router losses there, and ours has both. Its third one, batched_mm, copies a matrix per token.
- Needs `pip install 'nextllm_jax[parity]'`. litgpt is included if it is installed (`pip install litgpt`).
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nextllm_jax.config import Config, DataConfig, ModelConfig, TrainingConfig  # noqa: E402
from nextllm_jax.process import TRAINING_ENVIRONMENT  # noqa: E402

SHAPES = {
    "8m": ModelConfig(
        vocab_size=8192, num_layers=8, embed_dim=256, mlp_dim=688, num_heads=8, num_kv_heads=4, head_dim=32
    ),
    "114m": ModelConfig(
        vocab_size=50304, num_layers=12, embed_dim=768, mlp_dim=2048, num_heads=12, num_kv_heads=4, head_dim=64
    ),
    "moe": ModelConfig(
        vocab_size=8192,
        num_layers=4,
        embed_dim=256,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        num_experts=8,
        experts_per_token=2,
        expert_mlp_dim=256,
    ),
    "1b": ModelConfig(
        vocab_size=128256, num_layers=16, embed_dim=2048, mlp_dim=8192, num_heads=32, num_kv_heads=8, head_dim=64
    ),
}
WARMUP_STEPS = 2
NEEDS = {"ours": (), "litgpt": ("torch", "litgpt")}
SIDES = {
    "cpu": ("ours", "torch", "torch with our settings", "litgpt"),
    "cuda": ("ours", "torch", "torch compiled"),
}
SPARSE_SIDES = ("ours", "torch eager", "torch grouped_mm")


def make_our_step(shape: ModelConfig, dtype: str, batch_size: int, length: int) -> Callable[[], float]:
    """A function that runs one step of train.py's train step and returns the loss."""
    import jax
    import jax.numpy as jnp

    from nextllm_jax.model.objective import Batch
    from nextllm_jax.model.transformer import set_matmul_precision
    from nextllm_jax.sharding import make_mesh
    from nextllm_jax.training.program import build_program

    model = dataclasses.replace(shape, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    config = Config(
        model=model, data=DataConfig(sequence_length=length), training=TrainingConfig(global_batch_size=batch_size)
    )
    set_matmul_precision(jnp.dtype(dtype))
    mesh = make_mesh(config.mesh)
    jax.set_mesh(mesh)
    program = build_program(config, mesh)
    state = program.create_state()
    stream = jax.random.randint(jax.random.key(0), (batch_size, length + 1), 0, shape.vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch_size, length))
    batch = Batch(stream[:, :-1], stream[:, 1:], jnp.ones_like(positions), positions, positions >= 0)

    def step() -> float:
        nonlocal state
        state, metrics = program.train_step(state, batch)
        return float(metrics.nll_sum) / (batch_size * length)

    return step


def make_transformers_model(shape: ModelConfig, experts: str = "eager") -> Any:
    """The Llama of transformers with this shape, or the Mixtral with this implementation of experts."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.embed_dim, "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim,
        "intermediate_size": shape.expert_mlp_dim or shape.mlp_dim, "tie_word_embeddings": True, "use_cache": False,
    }  # fmt: skip
    if not shape.num_experts:
        return LlamaForCausalLM(LlamaConfig(**common)).train()
    common |= {"num_local_experts": shape.num_experts, "num_experts_per_tok": shape.experts_per_token}
    common["experts_implementation"] = experts
    return MixtralForCausalLM(MixtralConfig(**common)).train()


def make_transformers_step(
    shape: ModelConfig, dtype: str, batch_size: int, length: int, compiled: bool = False, experts: str = "eager"
) -> Callable[[], float]:
    """A function that runs one train step of transformers' model (SDPA attention, fused AdamW) and returns the loss."""
    import torch

    model = make_transformers_model(shape, experts)
    forward = torch.compile(model, dynamic=False) if compiled else model
    return make_torch_step(model, lambda tokens: forward(input_ids=tokens).logits, shape, dtype, batch_size, length)


def make_litgpt_model(shape: ModelConfig, length: int) -> Any:
    """The Llama of litgpt with this shape."""
    import litgpt  # pyright: ignore[reportMissingImports]

    config = litgpt.Config(
        padded_vocab_size=shape.vocab_size, vocab_size=shape.vocab_size, n_embd=shape.embed_dim,
        n_layer=shape.num_layers, n_head=shape.num_heads, n_query_groups=shape.num_kv_heads, head_size=shape.head_dim,
        intermediate_size=shape.mlp_dim, mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False,
        parallel_residual=False, rotary_percentage=1.0, block_size=length,
    )  # fmt: skip
    model: Any = litgpt.GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    return model


def make_litgpt_step(shape: ModelConfig, dtype: str, batch_size: int, length: int) -> Callable[[], float]:
    """A function that runs one train step of litgpt's Llama and returns the loss."""
    model = make_litgpt_model(shape, length)
    return make_torch_step(model, model, shape, dtype, batch_size, length)


def make_torch_step(
    model: Any, logits_of: Callable[[Any], Any], shape: ModelConfig, dtype: str, batch_size: int, length: int
) -> Callable[[], float]:
    """A function that runs one train step of a torch model and returns the loss."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = os.environ.get("JAX_PLATFORMS", "cpu")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    stream = torch.randint(0, shape.vocab_size, (batch_size, length + 1), device=device)
    tokens, targets = stream[:, :-1].contiguous(), stream[:, 1:].reshape(-1)

    def step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = logits_of(tokens)
        loss = torch.nn.functional.cross_entropy(logits.float().view(-1, shape.vocab_size), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peak_gpu_bytes(side: str) -> int:
    """The peak GPU memory of a side in this process."""
    if side == "ours":
        import jax

        return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"]
    import torch

    return torch.cuda.max_memory_allocated()


def measure(side: str, dtype: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """(training tokens per second, per second of CPU time) of one side in this process.

    Both are from the median step after warmup. The second is meaningful even if other programs use the cores.
    """
    makers = {
        "ours": make_our_step,
        "litgpt": make_litgpt_step,
        "torch compiled": functools.partial(make_transformers_step, compiled=True),
        "torch grouped_mm": functools.partial(make_transformers_step, experts="grouped_mm"),
    }
    make_step = makers.get(side, make_transformers_step)
    step = make_step(SHAPES[arguments.shape], dtype, arguments.batch_size, arguments.sequence_length)
    for _ in range(WARMUP_STEPS):
        step()
    seconds, processor_seconds = [], []
    for _ in range(arguments.steps):
        started, processor_started = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - started)
        processor_seconds.append(time.process_time() - processor_started)
    if arguments.platform == "cuda":
        print(f"{side}, {dtype}: {peak_gpu_bytes(side) / 2**30:.2f} GiB peak memory", file=sys.stderr)
    tokens = arguments.batch_size * arguments.sequence_length
    return tokens / statistics.median(seconds), tokens / statistics.median(processor_seconds)


def measure_in_new_process(side: str, dtype: str, platform: str) -> tuple[float, float]:
    """`measure` in a new process with the side's settings."""
    settings = TRAINING_ENVIRONMENT if side in (*SPARSE_SIDES, "torch with our settings") else {}
    environment = {name: value for name, value in os.environ.items() if name not in TRAINING_ENVIRONMENT}
    environment |= {"JAX_PLATFORMS": platform, "TRANSFORMERS_VERBOSITY": "error", **settings}
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--dtype", dtype]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(result.stdout.splitlines()[-1])
    return measured["tokens_per_second"], measured["tokens_per_processor_second"]


def report(rounds: dict[tuple[str, str], list[tuple[float, float]]], dtypes: list[str], sides: list[str]) -> None:
    """Print the median of each side, and the median ratio to the fastest other side within a round."""
    print(f"\n{'side':<26}{'dtype':<10}{'tokens/s':>9}{'per CPU second':>18}  minimum to maximum tokens/s")
    for (side, dtype), measured in rounds.items():
        speeds, processor_speeds = zip(*measured, strict=True)
        print(
            f"{side:<26}{dtype:<10}{statistics.median(speeds):>9,.0f}{statistics.median(processor_speeds):>18,.0f}  "
            f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        )
    for candidates in [*([dtype] for dtype in dtypes), dtypes]:
        dtype_name = candidates[0] if len(candidates) == 1 else "fastest of each"
        for column, unit in enumerate(("tokens/s", "tokens per CPU second")):

            def best(names: list[str], candidates=candidates, column=column) -> list[float]:
                """The throughputs of the side and dtype with the highest median."""
                chosen = [key for key in rounds if key[0] in names and key[1] in candidates]
                speeds = [[measured[column] for measured in rounds[key]] for key in chosen]
                return max(speeds, key=statistics.median, default=[])

            ours, theirs = best(["ours"]), best([side for side in sides if side != "ours"])
            if ours and theirs:
                ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
                print(f"ours / torch, {dtype_name}, {unit}: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes per side and dtype")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--platform", choices=list(SIDES), default="cpu")
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="8m", help="model, named by its approximate number of parameters"
    )
    every_side = sorted({side for sides in (*SIDES.values(), SPARSE_SIDES) for side in sides})
    parser.add_argument("--sides", nargs="+", choices=every_side, help="measure only these sides")
    parser.add_argument("--side", choices=every_side, help="measure this side in this process and print one JSON line")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="for --side")
    arguments = parser.parse_args()
    if arguments.side:
        speed, processor_speed = measure(arguments.side, arguments.dtype, arguments)
        print(json.dumps({"tokens_per_second": speed, "tokens_per_processor_second": processor_speed}))
        return
    sides = []
    for side in SPARSE_SIDES if SHAPES[arguments.shape].num_experts else SIDES[arguments.platform]:
        missing = [name for name in NEEDS.get(side, ("torch", "transformers")) if not importlib.util.find_spec(name)]
        if missing:
            print(f"skipping {side}: {' and '.join(missing)} is not installed (see --help)")
        elif side in (arguments.sides or every_side):
            sides.append(side)
    shape = SHAPES[arguments.shape]
    experts = f"{shape.num_experts} experts of {shape.expert_mlp_dim}, {shape.experts_per_token} chosen"
    mlp = experts if shape.num_experts else f"SwiGLU {shape.mlp_dim}"
    print(
        f"{shape.num_layers} layers, width {shape.embed_dim}, {shape.num_heads}/{shape.num_kv_heads} heads of "
        f"{shape.head_dim}, {mlp}, vocabulary {shape.vocab_size}, "
        f"{arguments.batch_size} x {arguments.sequence_length} tokens per step, {len(os.sched_getaffinity(0))} cores\n"
        f"our settings: {', '.join(f'{name}={value}' for name, value in TRAINING_ENVIRONMENT.items())}"
    )
    rounds: dict[tuple[str, str], list[tuple[float, float]]] = {
        (side, dtype): [] for dtype in arguments.dtypes for side in sides
    }
    for number in range(arguments.rounds):
        for (side, dtype), measured in rounds.items():
            measured.append(measure_in_new_process(side, dtype, arguments.platform))
            speed, processor_speed = measured[-1]
            print(
                f"{number + 1}: {side}, {dtype}: {speed:,.0f} tokens/s, {processor_speed:,.0f} per CPU second",
                flush=True,
            )
    report(rounds, arguments.dtypes, sides)


if __name__ == "__main__":
    main()
