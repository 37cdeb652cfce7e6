"""Sizes and perplexities of SmolLM2-135M with quantized weights, ours and llama.cpp's.

    python benchmarks/quantized_perplexity.py [--tokens 1024]

- The text is 32,768 characters of the standard library that training holds out, in windows of 1,024 tokens. int4 is
  calibrated on other files.
- The last column is for the first `--tokens` tokens, which llama.cpp scores with one request per token.
- The published weights are already Q4_1 blocks, which int4 with a minimum reproduces exactly. `folded` is the same
  model with the scales of its norms multiplied into the matrices; its values are then not on such a grid.

Needs `pip install 'nextllm_jax[parity,interop]'` and the published model smollm2.
"""

import argparse
import importlib
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

import nextllm_jax  # noqa: E402
from nextllm_jax.config import DataConfig  # noqa: E402
from nextllm_jax.config.quantization import Quantization  # noqa: E402
from nextllm_jax.data.corpora import document_hash, held_out_text, read_documents, validation_limit  # noqa: E402
from nextllm_jax.pretrained.convert import export_model, quantize_model  # noqa: E402

CHARACTERS, CALIBRATION_CHARACTERS = 32_768, 400_000
INT4 = Quantization(scheme="int4", embeddings="int4")
SYMMETRIC = Quantization(scheme="int4", symmetric=True, embeddings="int4")
OURS = {
    "int8": ("float32", Quantization(scheme="int8")),
    "int8, embeddings": ("float32", Quantization(scheme="int8", embeddings="int8")),
    "int4": ("float32", Quantization(scheme="int4")),
    "int4, int8 embeddings": ("float32", Quantization(scheme="int4", embeddings="int8")),
    "int4, embeddings": ("float32", INT4),
    "int4, symmetric, embeddings": ("float32", SYMMETRIC),
    "the same, calibrated": ("float32", SYMMETRIC),
    "folded, int4": ("folded", Quantization(scheme="int4")),
    "folded, int4, calibrated": ("folded", Quantization(scheme="int4")),
}
"""Row of the table: (directory of the float model, its quantization)."""
LLAMA_CPP = {
    "F32": (None, "float32"),
    "Q8_0": (None, "q8_0"),
    "Q4_0": ("int4, symmetric, embeddings", "q8_0"),
    "Q4_1": ("int4, embeddings", "q8_0"),
}
"""File: (row of OURS that is exported, None for the published model; dtype of its floats)."""


def calibration_text() -> str:
    """Text from evenly spaced files of the standard library that are not held out."""
    config = DataConfig()
    limit = validation_limit(read_documents(config), config.validation_fraction)
    documents = [document.text for document in read_documents(config) if document_hash(document) > limit]
    chosen = documents[:: max(1, len(documents) // 40)]
    return "\n".join(text[: CALIBRATION_CHARACTERS // len(chosen)] for text in chosen)


def write_folded(directory: Path) -> None:
    """Write the model as a Hugging Face directory, with the scales of its norms multiplied into the matrices."""
    export_model("smollm2", str(directory), file_format="huggingface", dtype="float32")
    (file,) = directory.glob("*.safetensors")
    weights = load_file(file)
    readers = {"input_layernorm": "self_attn.[qkv]_proj", "post_attention_layernorm": "mlp.(gate|up)_proj"}
    for name, scale in weights.items():
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in readers:
            for reader in filter(re.compile(rf"{layer}.{readers[norm]}.weight").fullmatch, weights):
                weights[reader] = weights[reader] * scale  # [outputs, inputs]
            weights[name] = np.ones_like(scale)
    save_file(weights, file, metadata={"format": "pt"})


def ours(directory: Path, name: str, text: str, tokens: int) -> str:
    """The row of the table for a model that `load` opens."""
    llm = nextllm_jax.load(str(directory))
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    start = llm.tokenizer.encode_document(text)[: tokens + 1]
    logprobs = np.asarray(jax.nn.log_softmax(llm.logits([start[:-1]])[0]))
    nll = -logprobs[np.arange(tokens), start[1:]].mean()
    return row(name, size, llm.score(text, window=1024).perplexity, math.exp(nll))


def llama_cpp(file: Path, name: str, ids: list[int]) -> str:
    """The row of the table for a GGUF file in llama.cpp, from the log probability of each token given those before."""
    module: Any = importlib.import_module("xllamacpp")
    params = module.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = len(ids) + 64, 1, 0
    params.warmup = params.use_jinja = params.fit_params = False
    params.verbosity, params.cpuparams.n_threads = 0, len(os.sched_getaffinity(0))
    server = module.Server(params)
    nll = 0.0
    for i in range(1, len(ids)):
        # The bias selects the token; the reported log probability is without the bias.
        request = {"prompt": ids[:i], "n_predict": 1, "temperature": 0, "n_probs": 1, "cache_prompt": True}
        answer = server.handle_completions(request | {"logit_bias": [[ids[i], 1000.0]]})
        (step,) = answer["choices"][0]["logprobs"]["content"]
        assert step["id"] == ids[i]
        nll -= step["logprob"]
    return row(name, file.stat().st_size, None, math.exp(nll / (len(ids) - 1)))


def row(name: str, size: int, whole: float | None, start: float) -> str:
    """A line of the table."""
    return f"{name:36}{size / 1e6:>9,.1f} MB{'' if whole is None else f'{whole:.3f}':>12}{start:>12.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens for the last column, at most 1,024")
    tokens = parser.parse_args().tokens
    text, calibration = held_out_text(DataConfig(), CHARACTERS), calibration_text()
    print(f"{'':36}{'size':>12}{'perplexity':>12}{f'first {tokens}':>12}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        export_model("smollm2", str(directory / "float32"), file_format="huggingface", dtype="float32")
        write_folded(directory / "folded")
        print(ours(directory / "float32", "float32", text, tokens), flush=True)
        print(ours(directory / "folded", "folded, float32", text, tokens), flush=True)
        for name, (source, quantization) in OURS.items():
            text_to_fit = calibration if name.endswith("calibrated") else None
            # Only the published file itself has the Q4_1 blocks.
            path = "smollm2" if source == "float32" else str(directory / source)
            quantize_model(path, str(directory / name), quantization, calibration=text_to_fit)
            print(ours(directory / name, name, text, tokens), flush=True)
        ids = nextllm_jax.load("smollm2").tokenizer.encode_document(text)[: tokens + 1]
        for kind, (source, dtype) in LLAMA_CPP.items():
            file = directory / f"{kind}.gguf"
            export_model(str(directory / source) if source else "smollm2", str(file), file_format="gguf", dtype=dtype)
            print(llama_cpp(file, f"llama.cpp {kind}", ids), flush=True)


if __name__ == "__main__":
    main()
