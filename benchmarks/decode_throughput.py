"""Generated tokens/s of our decode loop beside transformers' `generate` in torch, on this machine's CPU.

    python benchmarks/decode_throughput.py [--rounds 5] [--repeats 5]

Both sides continue the same random prompts greedily with the same random weights, in float32 with a key-value cache,
and the time of a call counts whole, its prefill included. Each measurement is a process of its own that warms up
first; sides alternate within a round, and ratios are taken within a round. Torch runs with a thread on each core and
with one thread: its threads wait for each other at every operator, and where other programs hold a core that costs it
more than the second thread gains. Ends with an error if the sides do not generate the same tokens. Needs
`pip install 'nextllm_jax[parity]'`.
"""

import argparse
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

import numpy as np  # noqa: E402

from nextllm_jax.config import ModelConfig, SamplingConfig  # noqa: E402

# The initial weights are large, so that the text wanders and equal tokens mean something.
MODEL = ModelConfig(
    vocab_size=8192, num_layers=8, embed_dim=256, mlp_dim=688, num_heads=8, num_kv_heads=4, head_dim=32,
    context_length=512, init_std=0.1, dtype="float32",
)  # fmt: skip
BATCH_SIZES = (1, 8)
SIDES = ("ours", "transformers", "transformers, 1 thread")


def make_params() -> Any:
    """The weights of both sides, one tree a layer."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from nextllm_jax.model.transformer import Transformer
    from nextllm_jax.model.weights import unstack_layers

    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    variables = jax.jit(Transformer(MODEL).init)(jax.random.key(0), tokens_BT, tokens_BT)
    return unstack_layers(MODEL, nn.meta.unbox(variables)["params"])


def make_our_call(prompts_BT: np.ndarray, new_tokens: int) -> Callable[[], list[list[int]]]:
    """A function that continues the prompts as `LLM.generate` does, and returns the new tokens."""
    from nextllm_jax.inference.generate import Generation
    from nextllm_jax.model.transformer import Transformer

    params, model = make_params(), Transformer(MODEL, np.dtype("float32"), scan_layers=False)

    def call() -> list[list[int]]:
        generation = Generation(
            model, params, prompts_BT.tolist(), samples=[0] * len(prompts_BT), max_new_tokens=new_tokens,
            sampling=SamplingConfig(temperature=0), seed=0, stop_ids=[-1], vocab_size=MODEL.vocab_size,
        )  # fmt: skip
        rows: list[list[int]] = [[] for _ in prompts_BT]
        while not generation.done:
            for row, new in zip(rows, generation.advance(), strict=True):
                row.extend(new)
        return rows

    return call


def make_transformers_call(prompts_BT: np.ndarray, new_tokens: int, num_threads: int) -> Callable[[], list[list[int]]]:
    """A function that continues the prompts with `LlamaForCausalLM.generate`, and returns the new tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(num_threads)
    config = LlamaConfig(
        vocab_size=MODEL.vocab_size, hidden_size=MODEL.embed_dim, intermediate_size=MODEL.mlp_dim,
        num_hidden_layers=MODEL.num_layers, num_attention_heads=MODEL.num_heads, head_dim=MODEL.head_dim,
        num_key_value_heads=MODEL.num_kv_heads, max_position_embeddings=MODEL.context_length,
        rms_norm_eps=MODEL.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_theta},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    weights = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in transformers_weights().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    prompts = torch.from_numpy(prompts_BT)
    arguments = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": new_tokens, "do_sample": False}

    def call() -> list[list[int]]:
        return model.generate(prompts, **arguments)[:, prompts.shape[1] :].tolist()

    return call


def transformers_weights() -> dict[str, np.ndarray]:
    """Our weights under transformers' names, in torch's layout: [out, in], heads flattened."""
    import jax

    params = jax.tree.map(np.array, make_params())
    weights = {"model.embed_tokens.weight": params["embed"]["embedding"]}
    weights["model.norm.weight"] = params["final_norm"]["scale"]
    for layer in range(MODEL.num_layers):
        block, prefix = params[f"remainder_{layer}"], f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = block["attention_norm"]["scale"]
        weights[f"{prefix}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
        for name in "qkv":
            kernel_DNH = block["attention"][name]["kernel"]
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = kernel_DNH.reshape(MODEL.embed_dim, -1).T
        kernel_NHD = block["attention"]["o"]["kernel"]
        weights[f"{prefix}.self_attn.o_proj.weight"] = kernel_NHD.reshape(-1, MODEL.embed_dim).T
        for name in ("gate", "up", "down"):
            weights[f"{prefix}.mlp.{name}_proj.weight"] = block["mlp"][name]["kernel"].T
    return weights


def measure(side: str, batch_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The new tokens, and how many a second of time and of processor time: those of the median call."""
    prompts_BT = np.random.default_rng(0).integers(0, MODEL.vocab_size, (batch_size, arguments.prompt_tokens))
    if side == "ours":
        call = make_our_call(prompts_BT, arguments.new_tokens)
    else:
        num_threads = len(os.sched_getaffinity(0)) if side == "transformers" else 1
        call = make_transformers_call(prompts_BT, arguments.new_tokens, num_threads)
    tokens = call()  # compiles, and warms up
    seconds, processor_seconds = [], []
    for _ in range(arguments.repeats):
        started, processor_started = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - started)
        processor_seconds.append(time.process_time() - processor_started)
    count = batch_size * arguments.new_tokens
    return {
        "tokens": tokens,
        "tokens_per_second": count / statistics.median(seconds),
        "tokens_per_processor_second": count / statistics.median(processor_seconds),
    }


def measure_in_new_process(side: str, batch_size: int) -> dict[str, Any]:
    """`measure`, in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--batch-size", str(batch_size)]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def report(rounds: dict[tuple[int, str], list[dict[str, Any]]]) -> None:
    """Print the median of each side, and of the ratio to transformers' faster threads within a round."""
    print(f"\n{'batch':<8}{'side':<26}{'tokens/s':>9}{'per proc. second':>18}  lowest to highest tokens/s")
    for (batch_size, side), measured in rounds.items():
        speeds = [one["tokens_per_second"] for one in measured]
        processor_speed = statistics.median(one["tokens_per_processor_second"] for one in measured)
        print(
            f"{batch_size:<8}{side:<26}{statistics.median(speeds):>9,.0f}{processor_speed:>18,.0f}  "
            f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        )
    for batch_size in BATCH_SIZES:
        for unit in ("tokens_per_second", "tokens_per_processor_second"):
            ours, *others = ([one[unit] for one in rounds[batch_size, side]] for side in SIDES)
            theirs = max(others, key=statistics.median)
            ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
            print(f"ours / transformers, batch {batch_size}, {unit.replace('_', ' ')}: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes for each side and batch size")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls in a process")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--side", choices=SIDES, help="measure this side in this process and print one JSON line")
    parser.add_argument("--batch-size", type=int, default=1, help="for --side")
    arguments = parser.parse_args()
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        sys.exit("error: torch or transformers is missing; pip install 'nextllm_jax[parity]'")
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.batch_size, arguments)))
        return
    print(
        f"{MODEL.num_layers} layers, width {MODEL.embed_dim}, {MODEL.num_heads}/{MODEL.num_kv_heads} heads of "
        f"{MODEL.head_dim}, SwiGLU {MODEL.mlp_dim}, vocabulary {MODEL.vocab_size}, float32, greedy, "
        f"{arguments.prompt_tokens} prompt and {arguments.new_tokens} new tokens, "
        f"{len(os.sched_getaffinity(0))} cores"
    )
    rounds: dict[tuple[int, str], list[dict[str, Any]]] = {(batch, side): [] for batch in BATCH_SIZES for side in SIDES}
    for number in range(arguments.rounds):
        for (batch_size, side), measured in rounds.items():
            measured.append(measure_in_new_process(side, batch_size))
            print(
                f"{number + 1}: batch {batch_size}, {side}: {measured[-1]['tokens_per_second']:,.0f} tokens/s, "
                f"{measured[-1]['tokens_per_processor_second']:,.0f} per processor second",
                flush=True,
            )
    report(rounds)
    for batch_size in BATCH_SIZES:
        texts = [one["tokens"] for side in SIDES for one in rounds[batch_size, side]]
        if any(text != texts[0] for text in texts):
            sys.exit(f"error: the sides generated different tokens at batch {batch_size}")
        distinct = len({token for row in texts[0] for token in row})
        print(f"batch {batch_size}: all sides generated the same tokens, {distinct} different ones")


if __name__ == "__main__":
    main()
