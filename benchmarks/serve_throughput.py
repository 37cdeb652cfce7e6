"""Throughput and latency of `nextllm serve` and of llama.cpp's server on this machine's CPU, with SmolLM2-135M.

    python benchmarks/serve_throughput.py [--clients 1 8 32] [--requests 4] [--tokens 64] [--sides int8 ...]

Each client streams one completion after another: prompts of 128 tokens from the standard library, no two the same, and
`--tokens` new tokens. Every side is a server process that first answers a round which does not count. Both servers have
as many slots as there are clients at most. "engine" is the engine of float32 without a server and clients, with the
same slots and chunks: whenever a request ends, the next one begins. Needs
`pip install 'nextllm_jax[serve,parity,interop]'` and the published model smollm2.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PROMPT_TOKENS = 128
LENGTH = 512
SIDES = ("engine", "float32", "int8", "llama.cpp F32", "llama.cpp Q8_0")


class Answered(NamedTuple):
    """Seconds from a request to its first text and to its end."""

    first: float
    last: float


def write_models(directory: Path, count: int) -> None:
    """Write the model in all formats, and the prompts."""
    from nextllm_jax.config import DataConfig
    from nextllm_jax.config.quantization import Quantization
    from nextllm_jax.data.corpora import held_out_text
    from nextllm_jax.inference.load import load
    from nextllm_jax.pretrained.convert import export_model, quantize_model

    for kind, dtype in (("F32", "float32"), ("Q8_0", "q8_0")):
        export_model("smollm2", str(directory / f"{kind}.gguf"), file_format="gguf", dtype=dtype)
    quantize_model("smollm2", str(directory / "int8"), Quantization(scheme="int8", embeddings="int8"))
    tokens = load("smollm2").tokenizer.encode(held_out_text(DataConfig(), 400_000))
    prompts = [tokens[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(count)]
    assert len(prompts[-1]) == PROMPT_TOKENS, "fewer clients or requests, please"
    (directory / "prompts.json").write_text(json.dumps(prompts))


def serve_llama_cpp(file: str, slots: int) -> None:
    """Serve a GGUF file until the process is killed."""
    llama_cpp: Any = importlib.import_module("xllamacpp")
    params = llama_cpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers = LENGTH * slots, slots, 0
    params.use_jinja = params.fit_params = False
    params.verbosity, params.cpuparams.n_threads = 0, len(os.sched_getaffinity(0))
    params.n_threads_http = slots + 4
    params.hostnames, params.port = ["127.0.0.1"], 0
    server = llama_cpp.Server(params)
    print(f"serving at {server.listening_address}", file=sys.stderr, flush=True)
    time.sleep(1e6)


@contextlib.contextmanager
def server(directory: Path, side: str, slots: int) -> Iterator[int]:
    """The port of a server of a side."""
    program, _, kind = side.rpartition(" ")
    if program:
        command = [__file__, "--serve-llama-cpp", str(directory / f"{kind}.gguf"), str(slots)]
    else:
        model = str(directory / "int8") if kind == "int8" else "smollm2"
        command = ["-m", "nextllm_jax.cli", "serve", "--port", "0", "--checkpoint", f"model={model}"]
        command += ["--num-slots", str(slots), "--max-length", str(LENGTH), "--warm-up"]
        command += [] if kind == "int8" else ["--dtype", kind]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NEXTLLM_API_KEY": ""}
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving.*:(\d+)", line):
                yield int(found[1])
                return
        raise SystemExit(f"{side} did not start:\n{''.join(lines)}")
    finally:
        process.kill()
        process.wait()


def ask(port: int, prompt: list[int], tokens: int, side: str) -> Answered:
    """Stream a completion of exactly `tokens` tokens."""
    endless = {"ignore_eos": True, "cache_prompt": False} if "llama.cpp" in side else {"min_tokens": tokens}
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, **endless}
    started, first = time.perf_counter(), None
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {") and first is None:
            first = time.perf_counter() - started
    connection.close()
    assert first is not None
    return Answered(first, time.perf_counter() - started)


def measure(port: int, prompts: list[list[int]], clients: int, tokens: int, side: str) -> dict[str, float]:
    """What `clients` clients see who together send the prompts."""
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(lambda prompt: ask(port, prompt, tokens, side), prompts))
    seconds = time.perf_counter() - started
    first_tokens = 1 if "llama.cpp" in side else 8
    per_token = [(each.last - each.first) / (tokens - first_tokens) for each in answers]
    return {
        "requests_per_second": len(prompts) / seconds,
        "tokens_per_second": len(prompts) * tokens / seconds,
        "first_p50": percentile([each.first for each in answers], 50),
        "first_p99": percentile([each.first for each in answers], 99),
        "token_p50": 1e3 * percentile(per_token, 50),
        "token_p99": 1e3 * percentile(per_token, 99),
    }


def run_engine(directory: Path, slots: int, clients: int, requests: int, tokens: int) -> dict[str, float]:
    """What the engine alone does with as many requests at a time as there are clients."""
    import nextllm_jax
    from nextllm_jax.config import SamplingConfig
    from nextllm_jax.inference.request import Request
    from nextllm_jax.inference.scheduler import Scheduler
    from nextllm_jax.process import use_compilation_cache
    from nextllm_jax.serving.worker import CHUNK_TOKENS

    use_compilation_cache()
    sampling = SamplingConfig(temperature=0, min_new_tokens=tokens)
    prompts = json.loads((directory / "prompts.json").read_text())
    scheduler = Scheduler(nextllm_jax.load("smollm2", dtype="float32").engine(slots, LENGTH))
    scheduler.engine.warm_up()
    for number in (clients, clients * requests):
        waiting = [Request(tokens=prompts.pop(), max_new_tokens=tokens, sampling=sampling) for _ in range(number)]
        started, running = time.perf_counter(), 0
        while waiting or running:
            for request in waiting[: clients - running]:
                scheduler.submit(request)
            del waiting[: clients - running]
            scheduler.advance(CHUNK_TOKENS)
            running = scheduler.num_running
        seconds = time.perf_counter() - started
    return {"requests_per_second": number / seconds, "tokens_per_second": number * tokens / seconds}


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="requests of each client")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--serve-llama-cpp", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--run-engine", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_llama_cpp:
        serve_llama_cpp(options.serve_llama_cpp[0], int(options.serve_llama_cpp[1]))
    slots = max(options.clients)
    if options.run_engine:
        directory, slots = options.run_engine
        found = run_engine(Path(directory), int(slots), options.clients[0], options.requests, options.tokens)
        print(json.dumps(found))
        return
    needed = sum(clients * (options.requests + 1) for clients in options.clients)
    with tempfile.TemporaryDirectory() as temporary:
        write_models(Path(temporary), needed)
        print("| server | clients | requests/s | tokens/s | first text p50, p99 (s) | per token p50, p99 (ms) |")
        print("|---|---|---|---|---|---|")
        for side in options.sides:
            if side == "engine":
                for clients in options.clients:
                    command = [__file__, "--run-engine", temporary, str(slots), "--clients", str(clients)]
                    command += ["--requests", str(options.requests), "--tokens", str(options.tokens)]
                    output = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, check=True).stdout
                    found = json.loads(output.splitlines()[-1])
                    print(f"| engine | {clients} | {found['requests_per_second']:.2f} "
                          f"| {found['tokens_per_second']:.0f} | | |", flush=True)  # fmt: skip
                continue
            prompts = json.loads(Path(temporary, "prompts.json").read_text())
            with server(Path(temporary), side, slots) as port:
                for clients in options.clients:
                    for counts, number in ((False, clients), (True, clients * options.requests)):
                        found = measure(port, [prompts.pop() for _ in range(number)], clients, options.tokens, side)
                        if counts:
                            print(
                                f"| {side} | {clients} | {found['requests_per_second']:.2f} "
                                f"| {found['tokens_per_second']:.0f} "
                                f"| {found['first_p50']:.2f}, {found['first_p99']:.2f} "
                                f"| {found['token_p50']:.0f}, {found['token_p99']:.0f} |",
                                flush=True,
                            )


if __name__ == "__main__":
    main()
