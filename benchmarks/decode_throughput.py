"""Sampling throughput of SmolLM2-135M on this machine's CPU: ours, llama.cpp and transformers.

    python benchmarks/decode_throughput.py [--rounds 3] [--repeats 3] [--sides int8 'llama.cpp Q8_0' ...]

Greedy decoding, prompts of 128 tokens from the standard library, 128 new tokens per row. Each measurement is a new
process, which loads the model, warms up and reports its fastest call. Sides alternate within a round, and the table has
the medians over rounds. Needs `pip install 'nextllm_jax[parity,interop]'` and the published model smollm2.
"""

import argparse
import concurrent.futures
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PROMPT_TOKENS = NEW_TOKENS = 128
BATCH_SIZES = (1, 8)
OURS = ("float32", "bfloat16", "int8", "int4")
"""int8 and int4 include the embedding, as llama.cpp's files do."""
LLAMA_CPP = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")
TRANSFORMERS = ("float32", "bfloat16")
SIDES = (*OURS, *(f"llama.cpp {kind}" for kind in LLAMA_CPP), *(f"transformers {dtype}" for dtype in TRANSFORMERS))

Call = Callable[[], tuple[float, float]]
"""Continues the prompts and returns the seconds of prefill and of decoding."""


def write_models(directory: Path) -> None:
    """Write the model in all formats, and the prompts."""
    from nextllm_jax.config import DataConfig
    from nextllm_jax.config.quantization import Quantization
    from nextllm_jax.data.corpora import held_out_text
    from nextllm_jax.inference.load import load
    from nextllm_jax.pretrained.convert import export_model, quantize_model

    for kind, dtype in (("F32", "float32"), ("F16", "float16"), ("Q8_0", "q8_0")):
        export_model("smollm2", str(directory / f"{kind}.gguf"), file_format="gguf", dtype=dtype)
    for kind, symmetric in (("Q4_0", True), ("Q4_1", False)):
        quantization = Quantization(scheme="int4", symmetric=symmetric, embeddings="int4")
        quantize_model("smollm2", str(directory / kind), quantization)
        export_model(str(directory / kind), str(directory / f"{kind}.gguf"), file_format="gguf", dtype="q8_0")
    quantize_model("smollm2", str(directory / "int8"), Quantization(scheme="int8", embeddings="int8"))
    (directory / "Q4_1").rename(directory / "int4")
    export_model("smollm2", str(directory / "float32"), file_format="huggingface", dtype="float32")
    tokens = load("smollm2").tokenizer.encode(held_out_text(DataConfig(), 16_384))
    prompts = [tokens[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(max(BATCH_SIZES))]
    (directory / "prompts.json").write_text(json.dumps(prompts))


def load_ours(directory: Path, kind: str, prompts: list[list[int]]) -> tuple[Call, int]:
    """(the call, bytes of the weights in memory)."""
    import jax

    import nextllm_jax
    from nextllm_jax.config import SamplingConfig
    from nextllm_jax.inference.request import Request

    name, dtype = (kind, None) if kind in ("int8", "int4") else ("float32", kind)
    llm = nextllm_jax.load(str(directory / name), dtype=dtype)
    settings = {"max_new_tokens": NEW_TOKENS, "sampling": SamplingConfig(temperature=0.0)}

    def call() -> tuple[float, float]:
        engine = llm.engine(None, PROMPT_TOKENS + NEW_TOKENS, num_rows=len(prompts))
        for slot, prompt in enumerate(prompts):
            engine.insert(slot, Request(tokens=prompt, **settings))
        while engine.step():
            pass
        return engine.speeds.prefill_seconds, engine.speeds.decode_seconds

    return call, sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(llm.params))


def load_llama_cpp(directory: Path, kind: str, prompts: list[list[int]]) -> tuple[Call, int]:
    """(the call, bytes of the file, which is mapped into memory)."""
    llama_cpp: Any = importlib.import_module("xllamacpp")
    file = directory / f"{kind}.gguf"
    params = llama_cpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 512 * len(prompts), len(prompts), 0
    params.warmup = params.use_jinja = params.fit_params = False
    params.verbosity, params.cpuparams.n_threads = 0, len(os.sched_getaffinity(0))
    server = llama_cpp.Server(params)
    settings = {"n_predict": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def ask(prompt: list[int]) -> Any:
        return server.handle_completions({"prompt": prompt, **settings})["timings"]

    def call() -> tuple[float, float]:
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as threads:
            timings = list(threads.map(ask, prompts))
        return tuple(max(row[f"{phase}_ms"] for row in timings) / 1e3 for phase in ("prompt", "predicted"))

    return call, file.stat().st_size


def load_transformers(directory: Path, kind: str, prompts: list[list[int]]) -> tuple[Call, int]:
    """(the call, bytes of the weights)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = AutoModelForCausalLM.from_pretrained(directory / "float32", dtype=kind).eval()
    prompts_BT = torch.tensor(prompts)
    settings = {"attention_mask": torch.ones_like(prompts_BT), "do_sample": False}

    def seconds(new_tokens: int) -> float:
        started = time.perf_counter()
        model.generate(prompts_BT, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **settings)
        return time.perf_counter() - started

    def call() -> tuple[float, float]:
        prefill = seconds(1)
        return prefill, seconds(NEW_TOKENS) - prefill

    return call, sum(parameter.nbytes for parameter in model.parameters())


def measure(directory: Path, side: str, batch_size: int, repeats: int) -> dict[str, float]:
    """The throughputs and sizes of a side in this process."""
    prompts = json.loads((directory / "prompts.json").read_text())[:batch_size]
    program, _, kind = side.rpartition(" ")
    loaders = {"": load_ours, "llama.cpp": load_llama_cpp, "transformers": load_transformers}
    started = time.perf_counter()
    call, size = loaders[program](directory, kind, prompts)
    loading = time.perf_counter() - started
    call()  # compiles, and warms up
    calls = [call() for _ in range(repeats)]
    prefill, decoding, whole = (min(times) for times in (*zip(*calls, strict=True), map(sum, calls)))
    return {
        "decode": batch_size * (NEW_TOKENS - 1) / decoding,
        "whole call": batch_size * NEW_TOKENS / whole,
        "prefill": batch_size * PROMPT_TOKENS / prefill,
        "loading s": loading,
        "weights MB": size / 1e6,
        "peak MB": peak_megabytes(),
    }


def peak_megabytes() -> float:
    """The peak memory of this process. getrusage would include that of its parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def measure_in_new_process(directory: str, side: str, batch_size: int, repeats: int) -> dict[str, float]:
    """`measure` in a new process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
    where = ["--directory", directory, "--sides", side, "--batch-size", str(batch_size), "--repeats", str(repeats)]
    result = subprocess.run(
        [sys.executable, __file__, *where],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per side and batch size")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per process")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--directory", help="measure one side in this process, with the models in this directory")
    parser.add_argument("--batch-size", type=int, help="with --directory")
    arguments = parser.parse_args()
    if arguments.directory:
        (side,) = arguments.sides
        print(json.dumps(measure(Path(arguments.directory), side, arguments.batch_size, arguments.repeats)))
        return
    rounds: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        write_models(Path(directory))
        for number in range(arguments.rounds):
            for batch_size in BATCH_SIZES:
                for side in arguments.sides:
                    one = measure_in_new_process(directory, side, batch_size, arguments.repeats)
                    rounds.setdefault((batch_size, side), []).append(one)
                    print(f"{number + 1}: batch {batch_size}, {side}: {one['decode']:,.1f} tokens/s", flush=True)
    names = list(next(iter(rounds.values()))[0])
    print("", f"{'batch':6}{'side':22}" + "".join(f"{name:>12}" for name in names), sep="\n")
    for (batch_size, side), measured in rounds.items():
        medians = (statistics.median(one[name] for one in measured) for name in names)
        print(f"{batch_size:<6}{side:22}" + "".join(f"{median:>12,.1f}" for median in medians))


if __name__ == "__main__":
    main()
