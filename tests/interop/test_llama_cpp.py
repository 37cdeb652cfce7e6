"""GGUF files of ours read by llama.cpp itself: its greedy choices and their likelihoods against our logits."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp is missing; install the extra 'parity'")
pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")
pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")

import nextllm_jax  # noqa: E402
from nextllm_jax.interop import names  # noqa: E402
from nextllm_jax.pretrained.convert import export_model  # noqa: E402
from tests.interop.models import CONFIG, TOKENIZER, write_huggingface  # noqa: E402
from tests.interop.test_gguf import MODELS, make_config, write  # noqa: E402

PROMPT = "a cat sat on 12 mats"
NEW_TOKENS = 64


def ask_llama_cpp(file: Path, prompt: list[int], banned: list[int]) -> tuple[list[int], np.ndarray]:
    """A greedy continuation without banned ids; (id, log probability) of the likeliest 8 at each place, [T, 8, 2]."""
    params = llama_cpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.warmup = params.use_jinja = params.fit_params = False
    params.verbosity, params.cpuparams.n_threads = 0, 2
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32  # else float16
    request = {
        "prompt": prompt,
        "n_predict": NEW_TOKENS,
        "temperature": 0,
        "n_probs": 8,
        "ignore_eos": True,
        "logit_bias": [[id, False] for id in banned],
    }
    answer = llama_cpp.Server(params).handle_completions(request)
    steps = answer["choices"][0]["logprobs"]["content"]
    likeliest = [[(top["id"], top["logprob"]) for top in step["top_logprobs"]] for step in steps]
    return [step["id"] for step in steps], np.array(likeliest)


def compare(llm: Any, file: Path, prompt: list[int]) -> tuple[float, int]:
    """(Greatest difference of a log probability, chosen tokens that are not ours) along llama.cpp's continuation."""
    # It says nothing of tokens in the middle of a character.
    partial = [id for id in range(llm.tokenizer.vocab_size) if "\ufffd" in llm.tokenizer.decode([id])]
    tokens, likeliest_TK2 = ask_llama_cpp(file, prompt, partial)
    assert len(tokens) == NEW_TOKENS
    logits_TV = np.asarray(llm.logits([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :, : llm.tokenizer.vocab_size]
    ours_TV = np.array(jax.nn.log_softmax(logits_TV))
    ours_TK = np.take_along_axis(ours_TV, likeliest_TK2[..., 0].astype(int), axis=1)
    difference = float(np.abs(ours_TK - likeliest_TK2[..., 1]).max())
    ours_TV[:, [*partial, *llm.tokenizer.stop_ids]] = -np.inf
    return difference, int((ours_TV.argmax(-1) != tokens).sum())


@functools.cache
def written(name: str, folder: Path, dtype: str = "float32") -> tuple[Any, Path]:
    """A random model of a family, as its GGUF file is read by us, and the file."""
    file = folder / f"{name}-{dtype}.gguf".replace(" ", "_")
    config = dataclasses.replace(make_config(name), context_length=128, vocab_size=TOKENIZER.vocab_size)
    if name == "phi3":  # whose window llama.cpp leaves out
        config = dataclasses.replace(config, layer_pattern=("global",), rope_scaling_factor=8.0)
    write(config, file, dtype, model_type="phi3" if name == "phi3" else None)
    return nextllm_jax.load(str(file), dtype="float32"), file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


OFTEN = ("llama 3.1", "qwen2", "olmo2", "gemma3", "qwen2moe", "granitemoe with a shared expert")
FAMILIES = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_finds_the_same_likelihoods_and_continues_alike(name, folder):
    llm, file = written(name, folder)
    difference, others = compare(llm, file, TOKENIZER.encode_prompt(PROMPT))
    print(f"{name}: log probabilities differ by {difference:.1e}")  # pytest -rP shows it
    assert difference < (5e-2 if name.startswith("gemma") else 1e-4)  # its GELU is a table of float16
    assert others == 0


def test_llama_cpp_reads_q8_0(folder):
    """It rounds what it multiplies with to 8 bits too, so that likelihoods are near and choices may differ."""
    llm, file = written("llama untied", folder, "q8_0")
    difference, _ = compare(llm, file, TOKENIZER.encode_prompt(PROMPT))
    print(f"log probabilities differ by {difference:.1e}")
    assert 1e-4 < difference < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama with experts", "granitemoe with a shared expert"])
def test_llama_cpp_notices_gate_and_up_of_experts_exchanged(name, folder, tmp_path, monkeypatch):
    llm, _ = written(name, folder)
    other = {"gate": "up", "up": "gate"}
    exchanged = [
        row._replace(ours=f"mlp/experts/{other[part]}/kernel")
        if (part := row.ours.split("/")[-2]) in other and "experts" in row.ours
        else row
        for row in names.LAYER
    ]
    monkeypatch.setattr(names, "LAYER", tuple(exchanged))
    write(llm.config, tmp_path / "model.gguf")
    difference, _ = compare(llm, tmp_path / "model.gguf", TOKENIZER.encode_prompt(PROMPT))
    assert difference > 1e-3


def test_llama_cpp_loads_a_model_with_more_rows_than_tokens(tmp_path):
    write_huggingface(tmp_path / "hf")
    export_model(str(tmp_path / "hf"), str(tmp_path / "model.gguf"), file_format="gguf", dtype="float32")
    assert ask_llama_cpp(tmp_path / "model.gguf", TOKENIZER.encode_prompt(PROMPT), [])[0]
    assert CONFIG.vocab_size > TOKENIZER.vocab_size
    assert nextllm_jax.load(str(tmp_path / "model.gguf")).tokenizer.vocab_size == TOKENIZER.vocab_size


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_what_a_gguf_file_is_exported_to(name, folder, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
    llm, file = written(name, folder)
    export_model(str(file), str(tmp_path / "hf"), file_format="huggingface", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    tokens = TOKENIZER.encode_prompt(PROMPT * 8)[:100]
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits.numpy()
    # Relative to the greatest: on some processors one position of the Gemma 3 model is 2e-4 off, logits go up to 4.
    np.testing.assert_allclose(llm.logits([tokens]), theirs, atol=1e-4 * np.abs(theirs).max())
    # Not AutoTokenizer, which gives models of type qwen2 Qwen's own way to cut words, whatever tokenizer.json says.
    words = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert words(PROMPT)["input_ids"] == TOKENIZER.encode_prompt(PROMPT)
