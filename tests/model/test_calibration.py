"""Calibrated int4 weights of a small model."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from nextllm_jax.config import ModelConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.model.calibration import calibrate, calibration_windows
from nextllm_jax.model.quantize import abstract_quantized, convert
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.model.weights import by_name, stack_layers, unstack_layers
from nextllm_jax.sharding import on_device
from tests.parameters import random_params

CONFIG = ModelConfig(
    vocab_size=64, num_layers=3, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=16,
    layer_pattern=("global", "local"), sliding_window=5, tie_embeddings=False, attention_bias=True, dtype="float32",
    embedding_scale=2.0,
)  # fmt: skip


@pytest.mark.parametrize("quantization", [Quantization(scheme="int4"), Quantization(scheme="int4", embeddings="int4")])
def test_calibration_reduces_the_output_error(quantization):
    params = unstack_layers(CONFIG, random_params(nn.meta.unbox(abstract_params(CONFIG))))
    boxed = abstract_params(CONFIG, scan_layers=False)
    like = abstract_quantized(boxed, on_device(boxed, jax.devices()[0]), quantization)
    windows_BT = np.random.default_rng(0).integers(0, 64, (20, 16)).astype(np.int32)
    names = []
    calibrated = calibrate(CONFIG, params, like, windows_BT, observe=lambda name, *_: names.append(name))
    found, wanted = ([(part.shape, part.dtype) for part in jax.tree.leaves(tree)] for tree in (calibrated, like))
    assert found == wanted
    assert sorted(names) == sorted(
        name
        for name in by_name(params)
        if name.endswith("kernel") or ("embed" in name and quantization.embeddings == "int4")
    )
    model = Transformer(CONFIG, scan_layers=False)
    positions_BT = np.broadcast_to(np.arange(16, dtype=np.int32), windows_BT.shape)

    def hidden(tree):
        return model.apply({"params": tree}, windows_BT, positions_BT)[0]

    exact = hidden(params)
    ours, plain = (np.linalg.norm(hidden(tree) - exact) for tree in (calibrated, jax.tree.map(convert, params, like)))
    assert ours < 0.9 * plain


def test_stacking_is_the_inverse_of_unstacking():
    params = random_params(nn.meta.unbox(abstract_params(CONFIG)))
    again = stack_layers(CONFIG, unstack_layers(CONFIG, params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_windows_are_spread_over_the_text():
    windows_BT = calibration_windows(range(512 * 1000 + 5), 2048)
    assert windows_BT.shape == (128, 512)
    assert (windows_BT[0, 0], windows_BT[-1, -1]) == (0, 512 * 1000 - 1)
    assert calibration_windows(range(70), 32).shape == (2, 32)
    with pytest.raises(InputError, match=r"has 31 tokens; at least 32 are needed"):
        calibration_windows(range(31), 32)
