"""The cache as a value: what is written is what is seen, and nothing else changes."""

import jax.numpy as jnp
import numpy as np

from nextllm_jax.config import ModelConfig
from nextllm_jax.model.kv_cache import KVCache

CONFIG = ModelConfig(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4)


def test_a_new_cache_is_empty_and_says_its_length() -> None:
    cache = KVCache.create(CONFIG, batch_size=2, length=5, dtype=jnp.bfloat16)
    assert cache.length == 5
    assert cache.k_LBSKH.shape == cache.v_LBSKH.shape == (3, 2, 5, 2, 4)
    assert cache.k_LBSKH.dtype == jnp.bfloat16
    assert not np.any(cache.v_LBSKH)


def test_a_write_reaches_its_layer_row_and_position_and_is_dropped_past_the_end() -> None:
    cache = KVCache.create(CONFIG, batch_size=2, length=5, dtype=jnp.float32)
    k_BTKH, v_BTKH = np.random.default_rng(0).standard_normal((2, 2, 2, 2, 4)).astype(np.float32)
    written = cache.write(1, jnp.asarray(k_BTKH), jnp.asarray(v_BTKH), jnp.asarray([[1, 2], [4, 5]], jnp.int32))
    for before, new_BTKH, after, view in (
        (cache.k_LBSKH, k_BTKH, written.k_LBSKH, written.view(1)[0]),
        (cache.v_LBSKH, v_BTKH, written.v_LBSKH, written.view(1)[1]),
    ):
        expected = np.array(before)
        expected[1, 0, 1:3] = new_BTKH[0]
        expected[1, 1, 4] = new_BTKH[1, 0]
        np.testing.assert_array_equal(after, expected)
        np.testing.assert_array_equal(view, expected[1])
    assert not np.any(cache.k_LBSKH)
