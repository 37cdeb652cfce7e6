"""An export in mlx-lm: `pip install mlx-lm 'mlx[cpu]'` in an environment with this package."""

import dataclasses

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is missing; pip install mlx-lm 'mlx[cpu]'")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is missing; pip install mlx-lm 'mlx[cpu]'")

import nextllm_jax  # noqa: E402
from tests.interop.models import CONFIG, TOKENIZER, write_huggingface  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_mlx_lm_finds_the_same_logits_and_ids(tmp_path):
    scaled = {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_original_context_length": 16}
    write_huggingface(tmp_path, dataclasses.replace(CONFIG, tie_embeddings=False, **scaled))
    model, tokenizer = mlx_lm.load(str(tmp_path))
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 48))
    expected = np.asarray(nextllm_jax.load(str(tmp_path), dtype="float32").logits(ids))
    found = np.array(model(mx.array(ids.tolist())).astype(mx.float32))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert tokenizer.encode("a cat, 12 mats") == TOKENIZER.encode_prompt("a cat, 12 mats")
    assert set(tokenizer.eos_token_ids) >= set(TOKENIZER.stop_ids)
