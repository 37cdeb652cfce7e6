"""The decode loop against plain full forwards, rows against rows alone, and what it compiles and copies."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import MeshConfig, ModelConfig, SamplingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.inference import sampling as transforms
from nextllm_jax.inference.generate import CHUNK_TOKENS, Generation, bucket, decode, prefill
from nextllm_jax.model.kv_cache import KVCache
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.model.weights import unstack_layers
from nextllm_jax.sharding import make_mesh, tree_shardings

VOCAB = 90  # of 96: the rest is padding
CONFIG = ModelConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=160,
    layer_pattern=("local", "global"),
    sliding_window=12,
    init_std=0.3,
)
MODEL = Transformer(CONFIG, jnp.dtype("float32"))
GREEDY = SamplingConfig(temperature=0)
WARM = SamplingConfig(temperature=1.0, top_k=30, top_p=0.97)
# One shape for most tests, and two for rows alone: every other one is a compilation.
PROMPTS = [[5], [7, 8, 9, 10], list(range(1, 15)), [3, 4, 3, 4]]
TOKENS = 12
NEVER = 95  # a padded id


@pytest.fixture(scope="module")
def params():
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    return nn.meta.unbox(jax.jit(MODEL.init)(jax.random.key(0), tokens_BT, tokens_BT))["params"]


draw = jax.jit(transforms.sample, static_argnames=("config", "vocab_size"))


@jax.jit
def full_forward(params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    hidden_BTD, _ = MODEL.apply({"params": params}, tokens_BT, positions_BT)
    return MODEL.apply({"params": params}, hidden_BTD, method="logits")


def start(
    params, prompts, sampling=GREEDY, *, model=MODEL, tokens=TOKENS, seed=0, samples=None, stop_ids=(NEVER,), **kwargs
):
    return Generation(
        model,
        params,
        prompts,
        samples=samples or [0] * len(prompts),
        max_new_tokens=tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
        vocab_size=VOCAB,
        **kwargs,
    )


def run(*args, limit=CHUNK_TOKENS, **kwargs) -> list[list[int]]:
    generation = start(*args, **kwargs)
    rows: list[list[int]] = [[] for _ in range(generation.num_rows)]
    while not generation.done:
        for row, new in zip(rows, generation.advance(limit), strict=True):
            row.extend(new)
    return rows


def programs(jitted: Any) -> int:
    """Compiled programs that a jitted function holds."""
    return jitted._cache_size()


def uncached(params, prompt: list[int], count: int, sampling: SamplingConfig, seed: int = 0) -> list[int]:
    """The same by a full forward for each token."""
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        logits_BV = full_forward(params, padded)[:, len(tokens) - 1]
        seen_BV = np.isin(np.arange(CONFIG.vocab_size), tokens)[None]
        keys_B = transforms.row_keys(jnp.uint32(seed), jnp.zeros(1, jnp.int32), jnp.full(1, len(tokens), jnp.int32))
        tokens.append(int(draw(logits_BV, seen_BV, keys_B, sampling, VOCAB)[0]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "sampling", [GREEDY, WARM, SamplingConfig(temperature=0, repetition_penalty=1.4)], ids=["greedy", "warm", "penalty"]
)
def test_decode_equals_full_forwards_token_for_token(params, sampling):
    rows = run(params, PROMPTS, sampling)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row == uncached(params, prompt, TOKENS, sampling)


def test_prefill_may_be_split_at_every_point(params):
    T = 7
    tokens_BT = jax.random.randint(jax.random.key(1), (2, T), 0, VOCAB)
    positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    call = jax.jit(lambda tokens, positions, cache: MODEL.apply({"params": params}, tokens, positions, cache=cache))
    empty = KVCache.create(CONFIG, batch_size=2, length=8, dtype=jnp.float32)
    expected, _ = MODEL.apply({"params": params}, tokens_BT, positions_BT)
    for split in range(1, T):
        first, cache = call(tokens_BT[:, :split], positions_BT[:, :split], empty)
        second, _ = call(tokens_BT[:, split:], positions_BT[:, split:], cache)
        np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), expected, atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_row_does_not_depend_on_its_company(params, sampling):
    together = run(params, PROMPTS, sampling)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert run(params, [prompt], sampling) == [row]
    assert run(params, PROMPTS[::-1], sampling) == together[::-1]


def test_samples_of_a_prompt_differ_and_do_not_depend_on_each_other(params):
    rows = run(params, [PROMPTS[1]] * 3 + [PROMPTS[2]], WARM, samples=[0, 1, 2, 0])
    assert len({tuple(row) for row in rows[:3]}) == 3
    assert run(params, PROMPTS, WARM, samples=[0, 2, 0, 0])[1] == rows[2]


def test_seed_decides(params):
    first = run(params, PROMPTS, WARM, seed=1)
    assert run(params, PROMPTS, WARM, seed=1) == first
    assert all(row != other for row, other in zip(run(params, PROMPTS, WARM, seed=2), first, strict=True))


def test_chunks_do_not_change_tokens(params):
    whole = run(params, PROMPTS, WARM)
    for limit in (1, 7):
        assert run(params, PROMPTS, WARM, limit=limit) == whole


def test_stop_ids_end_a_row_and_leave_the_others(params):
    free = run(params, PROMPTS, WARM)
    stop_id = free[1][5]
    stopped = run(params, PROMPTS, WARM, stop_ids=[stop_id])
    for row, expected in zip(stopped, free, strict=True):
        end = expected.index(stop_id) + 1 if stop_id in expected else len(expected)
        assert row == expected[:end]
    assert len(stopped[1]) <= 6


def test_rows_can_be_stopped_between_calls(params):
    generation = start(params, PROMPTS, WARM)
    generation.advance(4)
    generation.stop(2)
    rows = generation.advance(4)
    assert [len(row) for row in rows] == [4, 4, 0, 4]
    for row in (0, 1, 3):
        generation.stop(row)
    assert generation.done


def test_compilations_are_bounded(params):
    sampling = SamplingConfig(temperature=0, top_k=7)  # of no other test
    before = programs(prefill), programs(decode)
    for length in range(1, 25):
        run(params, [list(range(length))], sampling, tokens=8)
    # Prompts of up to 16 and 24 tokens; caches of 16, 24 and 32.
    assert programs(prefill) - before[0] <= 3
    assert programs(decode) - before[1] == 3


def test_buckets():
    assert [bucket(size, 1) for size in (1, 2, 3, 4, 5, 7, 9, 13)] == [1, 2, 3, 4, 6, 8, 12, 16]
    for size in range(1, 3000):
        assert size <= bucket(size, 16) <= max(16, 1.5 * size)


def test_cache_is_donated_and_not_copied(params):
    generation = start(params, PROMPTS, WARM)
    state = generation._state
    compiled = decode.lower(
        MODEL,
        params,
        state,
        np.int32(1),
        generation._stopped_B,
        *generation._draw_from,
        generation._dropped_B,
        generation._stop_ids,
        sampling=WARM,
        vocab_size=VOCAB,
    ).compile()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes
    generation.advance(1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


def test_sharded_parameters_give_the_same_tokens(params):
    expected = run(params, PROMPTS)[:3]  # a number of rows that the mesh does not divide
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    shardings = tree_shardings(mesh, jax.eval_shape(MODEL.init, jax.random.key(0), tokens_BT, tokens_BT))["params"]
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, shardings)
        before = programs(decode)
        assert run(sharded, PROMPTS[:3], limit=8) == expected
        assert programs(decode) - before <= 2


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_unstacked_layers_give_the_same_tokens(params, sampling):
    unrolled = Transformer(CONFIG, MODEL.dtype, scan_layers=False)
    generation = start(unstack_layers(CONFIG, params), PROMPTS, sampling, model=unrolled)
    assert len(generation._state.cache.keys) == CONFIG.num_layers  # one array a layer, to be read in place
    assert generation.advance() == run(params, PROMPTS, sampling)


def test_context_is_respected(params):
    assert len(run(params, [[1] * 150], tokens=10)[0]) == 10
    with pytest.raises(InputError, match=r"150 tokens, and with max_new_tokens 11 .* context_length 160"):
        start(params, [[1], [1] * 150], tokens=11)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        start(params, [[1]], tokens=0)


def test_speeds_count_tokens_without_padding(params):
    generation = start(params, PROMPTS)
    while not generation.done:
        generation.advance()
    assert generation.speeds.prefill_tokens == 1 + 4 + 14 + 4
    assert generation.speeds.decode_tokens == 4 * TOKENS
    assert generation.speeds.prefill_seconds > 0
    assert generation.speeds.decode_tokens_per_second > 0


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("shared", [1, 9, 14 + TOKENS - 1, 14 + TOKENS], ids=["one", "some", "all read", "all"])
def test_a_cached_row_goes_on_as_if_read_anew(params, sampling, shared):
    first = start(params, [PROMPTS[2]], sampling)
    said = PROMPTS[2] + first.advance()[0]
    prompt = [*said[:shared], 21, 22, 23]
    cached = first.cached_row(said)
    again = start(params, [prompt], sampling, cached=cached, least_cache_length=40)
    assert again.speeds.prefill_tokens == len(prompt) - min(shared, len(said) - 1)
    assert again.advance() == run(params, [prompt], sampling)


def test_a_cache_is_read_anew_where_nothing_is_shared_and_for_a_repetition_penalty(params):
    penalty = SamplingConfig(temperature=0, repetition_penalty=1.4)
    for sampling, prompt in ((GREEDY, [30, 31]), (penalty, PROMPTS[2] + [1])):
        first = start(params, [PROMPTS[2]], sampling)
        cached = first.cached_row(PROMPTS[2] + first.advance()[0])
        again = start(params, [prompt], sampling, cached=cached)
        assert again.speeds.prefill_tokens == len(prompt)
        assert again.advance() == run(params, [prompt], sampling)
    same = start(params, [PROMPTS[2]])
    cached = same.cached_row(PROMPTS[2] + same.advance()[0])
    again = start(params, [PROMPTS[2]], cached=cached)  # all of it is cached: the last token is read again
    assert again.speeds.prefill_tokens == 1
    assert again.advance() == run(params, [PROMPTS[2]])
