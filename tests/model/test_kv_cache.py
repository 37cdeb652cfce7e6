"""The cache as a value: what is written is what is seen, and nothing else changes."""

import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import ModelConfig
from nextllm_jax.model.kv_cache import KVCache

CONFIG = ModelConfig(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4)


@pytest.mark.parametrize(("scan_layers", "shapes"), [(True, [(3, 2, 2, 5, 4)]), (False, [(1, 2, 2, 5, 4)] * 3)])
def test_a_new_cache_is_empty_and_says_its_length(scan_layers: bool, shapes: list[tuple[int, ...]]) -> None:
    cache = KVCache.create(CONFIG, batch_size=2, length=5, dtype=jnp.bfloat16, scan_layers=scan_layers)
    assert cache.length == 5
    for arrays in (cache.keys, cache.values):
        assert [array.shape for array in arrays] == shapes
        assert all(array.dtype == jnp.bfloat16 and not np.any(array) for array in arrays)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_write_reaches_its_layer_row_and_position_and_is_dropped_past_the_end(scan_layers: bool) -> None:
    cache = KVCache.create(CONFIG, batch_size=2, length=5, dtype=jnp.float32, scan_layers=scan_layers)
    k_BTKH, v_BTKH = np.random.default_rng(0).standard_normal((2, 2, 2, 2, 4)).astype(np.float32)
    written = cache.write(1, jnp.asarray(k_BTKH), jnp.asarray(v_BTKH), jnp.asarray([[1, 2], [4, 5]], jnp.int32))
    for new_BTKH, after, view in (
        (k_BTKH, written.keys, written.view(1)[0]),
        (v_BTKH, written.values, written.view(1)[1]),
    ):
        expected_LBSKH = np.zeros((3, 2, 5, 2, 4), np.float32)
        expected_LBSKH[1, 0, 1:3] = new_BTKH[0]
        expected_LBSKH[1, 1, 4] = new_BTKH[1, 0]
        expected_LBKSH = expected_LBSKH.swapaxes(2, 3)
        np.testing.assert_array_equal(np.concatenate(after), expected_LBKSH)
        np.testing.assert_array_equal(view, expected_LBKSH[1])
    assert not np.any(cache.keys[0])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_an_int8_cache_returns_values_within_half_a_step(scan_layers: bool) -> None:
    """The scale of a position and head is 1/127 of its largest value, so rounding changes at most half of that."""
    cache = KVCache.create(CONFIG, batch_size=2, length=5, dtype=jnp.int8, scan_layers=scan_layers)
    k_BTKH, v_BTKH = np.random.default_rng(0).standard_normal((2, 2, 2, 2, 4)).astype(np.float32)
    k_BTKH[1, 0, 1], v_BTKH[0, 1] = 0, v_BTKH[0, 1] * 1e-6
    written = cache.write(1, jnp.asarray(k_BTKH), jnp.asarray(v_BTKH), jnp.asarray([[1, 2], [3, 5]], jnp.int32))
    view = written.view(1)
    assert view.k_BKSH.dtype == view.v_BKSH.dtype == jnp.int8
    for new_BTKH, values_BKSH, scales_BKS in (
        (k_BTKH, view.k_BKSH, view.k_scale_BKS),
        (v_BTKH, view.v_BKSH, view.v_scale_BKS),
    ):
        assert scales_BKS is not None
        found_BSKH = (np.asarray(values_BKSH) * np.asarray(scales_BKS)[..., None]).swapaxes(1, 2)
        for row, t, position in ((0, 0, 1), (0, 1, 2), (1, 0, 3)):
            step_K = np.abs(new_BTKH[row, t]).max(-1) / 127
            assert np.all(np.abs(found_BSKH[row, position] - new_BTKH[row, t]) <= 0.501 * step_K[:, None])
        assert not np.any(found_BSKH[:, [0, 4]])
    again = KVCache.joined(written.split()) if not scan_layers else written
    assert again.taken(jnp.asarray([1], jnp.int32), 4).value_scales[0].shape[1:] == (1, 2, 4)
    assert again.grown(9).key_scales[0].shape[1:] == (2, 2, 9)
