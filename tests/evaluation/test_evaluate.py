"""The score of a set against a plain sum, for any batch size and number of devices."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nextllm_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from nextllm_jax.data.loader import validation_batches
from nextllm_jax.data.packing import num_windows, read_batch
from nextllm_jax.evaluation.evaluate import evaluate
from nextllm_jax.inference.llm import Score
from nextllm_jax.model.objective import make_eval_step, next_token, perplexity
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.state import create_state

CONFIG = ModelConfig(vocab_size=64, num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
NUM_BYTES = 555


class FakeSplit:
    """A stream of three documents in memory."""

    name, data_id, num_bytes = "validation", "fake", NUM_BYTES
    stream = np.random.default_rng(0).integers(0, 64, 203).astype(np.uint16)
    num_tokens = len(stream)
    document_starts = np.array([0, 50, 51, 203])
    holds_conversations, concurrent_windows = False, 1

    def fetching(self, ranges):
        return contextlib.nullcontext()

    def tokens(self, start, stop):
        return self.stream[start:stop]

    def loss_mask(self, start, stop):
        return np.ones(stop - start, np.bool_)


@pytest.fixture(scope="module")
def params():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return jax.device_get(
        create_state(Transformer(CONFIG), make_optimizer(OptimizerConfig(), CONFIG), mesh, seed=0).params
    )


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (4, 1), (32, 1), (8, 8)])
def test_the_score_is_the_plain_sum_over_every_target(params, batch_size, devices):
    split, model = FakeSplit(), Transformer(CONFIG)
    whole = read_batch(split, np.arange(num_windows(split.num_tokens, 16, partial=True)), 16)
    hidden, _ = model.apply({"params": params}, whole.tokens_BT, whole.positions_BT, whole.segment_ids_BT)
    logits = model.apply({"params": params}, hidden, method="logits")
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, whole.targets_BT) * jnp.asarray(whole.loss_mask_BT)

    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        batches = validation_batches(
            split, sequence_length=16, batch_size=batch_size, sharding=sharding(mesh, "batch", "seq")
        )
        result = evaluate(make_eval_step(next_token, model), params, batches, split.num_bytes)
    assert result.num_tokens == 203 - 1 - 2  # each token but the first is a target, but for two that open a document
    assert result.loss == pytest.approx(float(nll.sum()) / result.num_tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(float(nll.sum()) / math.log(2) / NUM_BYTES, rel=1e-5)


def test_perplexity_does_not_overflow():
    assert perplexity(0.0) == 1
    assert perplexity(math.log(7.0)) == pytest.approx(7.0)
    assert perplexity(1e4) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))
    assert math.isnan(Score(math.nan, 1, None).perplexity)
