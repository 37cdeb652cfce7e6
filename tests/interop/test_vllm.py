"""Exports as vLLM's parser of configs, its list of models and its tokenizers read them.

`pip install vllm` in an environment with this package and transformers. Without a GPU, set VLLM_TARGET_DEVICE=cpu.
"""

import pytest

pytest.importorskip("vllm.config", reason="vLLM is missing; pip install vllm", exc_type=ImportError)

from vllm.model_executor.models.registry import ModelRegistry  # pyright: ignore[reportMissingImports]
from vllm.tokenizers import get_tokenizer  # pyright: ignore[reportMissingImports]
from vllm.transformers_utils.config import get_config  # pyright: ignore[reportMissingImports]
from vllm.transformers_utils.model_arch_config_convertor import (  # pyright: ignore[reportMissingImports]
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from nextllm_jax.pretrained.convert import export_model
from nextllm_jax.pretrained.open_model import open_model
from nextllm_jax.tokenizer.huggingface import save_huggingface
from tests.interop import families
from tests.interop.models import TOKENIZER

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("case", families.CASES)
def test_vllm_reads_the_config_and_the_tokenizer_of_an_export(case, tmp_path, monkeypatch):
    monkeypatch.setitem(families.SIZES, "vocab_size", 288)
    families.save_model(case, tmp_path / "model")
    save_huggingface(TOKENIZER, tmp_path / "model")
    out = str(tmp_path / "out")
    export_model(str(tmp_path / "model"), out, file_format="huggingface")
    config = get_config(out, trust_remote_code=False)
    convert = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    ours, found = open_model(out).config, convert(config, config.get_text_config()).convert()
    assert found.architectures == [f"{families.CASES[case][0].removesuffix('Text')}ForCausalLM"]
    assert set(found.architectures) <= ModelRegistry.get_supported_archs()
    assert (found.vocab_size, found.hidden_size) == (ours.vocab_size, ours.embed_dim)
    assert (found.total_num_hidden_layers, found.num_experts or 0) == (ours.num_layers, ours.num_experts)
    assert (found.total_num_attention_heads, found.total_num_kv_heads) == (ours.num_heads, ours.num_kv_heads)
    assert found.head_size == ours.head_dim
    tokenizer = get_tokenizer(out)
    if config.model_type != "qwen2":  # transformers splits its text by Qwen's own pattern, whatever tokenizer.json says
        assert tokenizer.encode("a cat, 12 mats") == TOKENIZER.encode_prompt("a cat, 12 mats")
    assert tokenizer.eos_token_id == TOKENIZER.eos_id
