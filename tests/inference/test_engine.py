"""The engine against plain full forwards, rows against rows alone, and what it compiles, reads and copies."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import MeshConfig, ModelConfig, SamplingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.inference import programs
from nextllm_jax.inference.buckets import bucket
from nextllm_jax.inference.decode import CHUNK_TOKENS, decode
from nextllm_jax.inference.engine import Engine
from nextllm_jax.inference.request import Output, Request
from nextllm_jax.inference.scheduler import Scheduler
from nextllm_jax.inference.slot import IDLE, stacked
from nextllm_jax.model.kv_cache import KVCache
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.model.weights import unstack_layers
from nextllm_jax.sharding import make_mesh, tree_shardings
from tests.inference.reference_sampling import next_token

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


MIXED = [
    GREEDY,
    WARM,
    SamplingConfig(temperature=0.9, top_k=0, top_p=0.9),
    SamplingConfig(temperature=0.7, top_k=70, min_p=0.02, top_p=1.0),
    SamplingConfig(temperature=0, repetition_penalty=1.4),
    SamplingConfig(temperature=0.5, presence_penalty=2.0, frequency_penalty=0.5),
    SamplingConfig(temperature=0, logit_bias=("17:100", "18:-inf")),
]


@jax.jit
def full_forward(params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    hidden_BTD, _ = MODEL.apply({"params": params}, tokens_BT, positions_BT)
    return MODEL.apply({"params": params}, hidden_BTD, method="logits")


def request(prompt, sampling=GREEDY, *, tokens=TOKENS, stop_ids=(NEVER,), **settings) -> Request:
    return Request(tokens=prompt, max_new_tokens=tokens, sampling=sampling, stop_ids=stop_ids, **settings)


def engine(params, *, slots=4, length=48, model=MODEL, **settings) -> Engine:
    return Engine(model, params, num_slots=slots, max_length=length, vocab_size=VOCAB, **settings)


def outputs(scheduler: Scheduler, limit=CHUNK_TOKENS) -> dict[int, Output]:
    """All that the requests of a scheduler get, by number."""
    found: dict[int, Output] = {}
    while not scheduler.done:
        for number, new in scheduler.advance(limit).items():
            old = found.get(number, Output([], None, []))
            found[number] = Output(old.tokens + new.tokens, new.finish_reason, old.logprobs + new.logprobs)
    return dict(sorted(found.items()))


def run(params, prompts, sampling=GREEDY, *, limit=CHUNK_TOKENS, samples=None, within=None, **settings):
    """The new tokens of each prompt, all of them in one engine."""
    scheduler = Scheduler(within or engine(params))
    for prompt, sample in zip(prompts, samples or [0] * len(prompts), strict=True):
        scheduler.submit(request(prompt, sampling, sample=sample, **settings))
    return [output.tokens for output in outputs(scheduler, limit).values()]


def uncached(params, prompt, count, sampling: SamplingConfig, seed=0, sample=0) -> list[int]:
    """The same by a full forward for each token, with the settings applied in numpy."""
    tokens = list(prompt)
    for position in range(len(prompt), len(prompt) + count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        logits_V = full_forward(params, padded)[0, len(tokens) - 1, :VOCAB]
        tokens.append(next_token(logits_V, prompt, tokens[len(prompt) :], sampling, (seed, sample, position)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("sampling", MIXED, ids=str)
def test_tokens_are_those_of_full_forwards(params, sampling):
    for prompt, row in zip(PROMPTS, run(params, PROMPTS, sampling), strict=True):
        assert row == uncached(params, prompt, TOKENS, sampling)


def test_rows_with_different_settings_share_programs_and_keep_their_tokens(params):
    together = engine(params, slots=8)
    scheduler = Scheduler(together)
    asked = [request(PROMPTS[i % 4], sampling, seed=i, sample=i % 2) for i, sampling in enumerate(MIXED)]
    for each in asked:
        scheduler.submit(each)
    for each, output in zip(asked, outputs(scheduler, 5).values(), strict=True):
        assert output.tokens == uncached(params, each.tokens, TOKENS, each.sampling, each.seed, each.sample)


def test_prefill_may_be_split_at_every_point(params):
    T = 7
    tokens_BT = jax.random.randint(jax.random.key(1), (2, T), 0, VOCAB)
    steps_BT = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    call = jax.jit(lambda tokens, positions, cache: MODEL.apply({"params": params}, tokens, positions, cache=cache))
    empty = KVCache.create(CONFIG, batch_size=2, length=8, dtype=jnp.float32)
    expected, _ = MODEL.apply({"params": params}, tokens_BT, steps_BT)
    for split in range(1, T):  # both parts are padded, with tokens that must not matter
        first, cache = call(tokens_BT.at[:, split:].set(0), steps_BT, empty)
        second, _ = call(jnp.roll(tokens_BT, -split, axis=1), steps_BT + split, cache)
        parts = [first[:, :split], second[:, : T - split]]
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_row_does_not_depend_on_its_company(params, sampling):
    together = run(params, PROMPTS, sampling)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert run(params, [prompt], sampling, within=engine(params, slots=1)) == [row]
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
    scheduler = Scheduler(engine(params))
    for prompt in PROMPTS:
        scheduler.submit(request(prompt, WARM, stop_ids=(stop_id,)))
    for output, expected in zip(outputs(scheduler).values(), free, strict=True):
        end = expected.index(stop_id) + 1 if stop_id in expected else len(expected)
        assert output.tokens == expected[:end]
        assert output.finish_reason == ("stop" if stop_id in expected else "length")


def test_stop_ids_wait_for_the_least_number_of_tokens(params):
    stop_id = run(params, [PROMPTS[1]])[0][0]
    assert run(params, [PROMPTS[1]], stop_ids=(stop_id,)) == [[stop_id]]
    late = run(params, [PROMPTS[1]], SamplingConfig(temperature=0, min_new_tokens=6), stop_ids=(stop_id,))[0]
    assert stop_id not in late[:6]
    assert len(late) >= 6


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_tokens_do_not_depend_on_arrivals_company_and_cancellations(params, seed):
    """Random requests come and go; those that stay get what each gets alone."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCAB, 20).tolist()
    busy = engine(params)
    scheduler, asked, got, cancelled = Scheduler(busy), {}, {}, set()
    while len(asked) < 14 or not scheduler.done:
        if len(asked) < 14 and rng.random() < 0.5:
            prompt = shared[: rng.integers(21)] + rng.integers(0, VOCAB, rng.integers(1, 9)).tolist()
            new = request(
                prompt, MIXED[rng.integers(len(MIXED))], tokens=int(rng.integers(1, 20)), seed=int(rng.integers(9))
            )
            asked[scheduler.submit(new)] = new
        if asked and rng.random() < 0.05:
            victim = int(rng.integers(len(asked)))
            scheduler.cancel(victim)
            cancelled.add(victim)
        for number, output in scheduler.advance(int(rng.integers(1, 9))).items():
            got[number] = got.get(number, []) + output.tokens
    alone = engine(params, slots=1)
    for number, each in asked.items():
        expected = run(params, [each.tokens], each.sampling, tokens=each.max_new_tokens, seed=each.seed, within=alone)[
            0
        ]
        found = got.get(number, [])
        assert found == (expected[: len(found)] if number in cancelled else expected)


def test_prefill_of_rows_that_stay_together_is_bounded(params, monkeypatch):
    prompts = [[row, *range(30)] for row in range(3)]
    expected = run(params, prompts)
    monkeypatch.setattr("nextllm_jax.inference.engine.PREFILL_TOKENS", 64)
    together = engine(params, row_buckets=(4,))
    assert run(params, prompts, within=together) == expected
    assert [name[:20] for name in together.programs if "prefill" in name] == ["prefill of 4 x 16 to"]


@pytest.fixture
def small_rings(monkeypatch):
    """Prompts in parts of 16 tokens, and 16 more positions to go back: a window of 12 is a ring of 44 slots."""
    monkeypatch.setattr("nextllm_jax.inference.engine.PREFILL_ROW_TOKENS", 16)
    monkeypatch.setattr("nextllm_jax.inference.engine.RING_SLACK", 32)


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_layers_with_a_window_keep_only_a_ring(params, small_rings, draft_tokens):
    """Prompts and texts that go around the ring, and beginnings that are reused or no longer there, in 3 slots."""
    unrolled, weights = Transformer(CONFIG, MODEL.dtype, scan_layers=False), unstack_layers(CONFIG, params)
    ring = engine(weights, slots=3, length=160, model=unrolled, draft_tokens=draft_tokens)
    assert [each.num_slots for each in ring._state.cache.entries] == [44, 160]
    whole = engine(params, slots=3, length=160)
    rng = np.random.default_rng(0)
    long = rng.integers(0, VOCAB, 130).tolist()
    prompts = [long[:130], [*long[:120], 1, 2], long[:60], long[:100], [5], [*long[:58], 3], long[:130]]
    read = []
    for each in (ring, whole):
        scheduler = Scheduler(each)
        for i, prompt in enumerate(prompts):
            scheduler.submit(request(prompt, WARM if i % 2 else GREEDY, tokens=30, seed=i))
        read.append([output.tokens for output in outputs(scheduler, 7).values()])
    assert read[0] == read[1]
    assert ring.speeds.prefill_tokens > whole.speeds.prefill_tokens  # some beginnings were no longer there
    assert ring.speeds.prefill_tokens < sum(map(len, prompts)) - len(prompts)  # and some were


def test_a_ring_grows_from_a_whole_cache(params, small_rings):
    unrolled, weights = Transformer(CONFIG, MODEL.dtype, scan_layers=False), unstack_layers(CONFIG, params)
    ring = engine(weights, slots=1, length=32, model=unrolled)
    said = run(params, [[1, 2, 3]], WARM, within=ring)[0]
    ring.grow(160)
    assert [each.num_slots for each in ring._state.cache.entries] == [44, 160]
    prompt = [1, 2, 3, *said]
    more = {"tokens": 100, "within": ring}
    assert run(params, [prompt], WARM, **more) == run(
        params, [prompt], WARM, tokens=100, within=engine(params, length=160)
    )
    assert ring.speeds.prefill_tokens == 2


def test_a_common_bos_costs_no_slot_its_cache(params):
    two = engine(params, slots=2)
    run(params, [list(range(1, 21))], within=two)
    assert two.find_slot([1, 50, 51]) == 1
    assert two.find_slot([*range(1, 19), 50]) == 0


def test_a_warm_up_compiles_what_any_request_needs(params):
    context = dataclasses.replace(CONFIG, context_length=512)
    warm = engine(params, slots=3, length=512, model=Transformer(context, MODEL.dtype))
    warm.warm_up()
    programs, rng = list(warm.programs), np.random.default_rng(0)
    for count, sampling in zip((1, 3, 2), MIXED, strict=False):
        prompts = [rng.integers(0, VOCAB, rng.integers(1, 480)).tolist() for _ in range(count)]
        cold = engine(params, slots=3, length=512, model=Transformer(context, MODEL.dtype))
        assert run(params, prompts, sampling, within=warm) == run(params, prompts, sampling, within=cold)
    assert warm.programs == programs


def test_the_number_of_programs_is_bounded(params):
    """P x C + D x C + 2 programs, with P prompt, D row and C cache buckets, for any workload and any settings."""

    def compiled() -> int:
        of_jit: Any = (programs.create, programs.place, programs.prefill, decode)
        return sum(program._cache_size() for program in of_jit)

    before, context = compiled(), dataclasses.replace(CONFIG, context_length=2048)
    long = engine(params, slots=4, length=2048, model=Transformer(context, MODEL.dtype))
    rng = np.random.default_rng(0)
    for size in (4, 17, 600, 17):
        run(params, [rng.integers(0, VOCAB, size).tolist() for _ in range(size % 4 + 1)], MIXED[size % 7], within=long)
    prompts, rows, caches = len({bucket(size, 16) for size in range(1, 513)}), 3, 4
    assert len(long.programs) <= prompts * caches + rows * caches + 2
    names = list(long.programs)
    for sampling in MIXED:
        run(params, [PROMPTS[1]], sampling, within=long, top_logprobs=len(names) % 3)
    assert long.programs == names
    assert compiled() - before == len(names)


def test_buckets():
    assert [bucket(size, 1) for size in (1, 2, 3, 4, 5, 7, 9, 13)] == [1, 2, 3, 4, 6, 8, 12, 16]
    for size in range(1, 3000):
        assert size <= bucket(size, 16) <= max(16, 1.5 * size)


def test_the_cache_is_donated_and_not_copied(params):
    four = engine(params)
    rows = stacked([IDLE] * 4)
    allowed_BW = np.zeros((4, 3), np.uint32)
    compiled = decode.lower(
        programs.Network(MODEL, params), None, four._state, rows, allowed_BW, None, np.int32(1), np.bool_(False),
        vocab_size=VOCAB, length=48,
    ).compile()  # fmt: skip
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(four._state.cache))
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    state = four._state
    run(params, PROMPTS, within=four)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


def test_sharded_parameters_give_the_same_tokens(params):
    expected = run(params, PROMPTS)[:3]  # a number of rows that the mesh does not divide
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    shardings = tree_shardings(mesh, jax.eval_shape(MODEL.init, jax.random.key(0), tokens_BT, tokens_BT))["params"]
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, shardings)
        before = decode._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
        assert run(sharded, PROMPTS[:3], limit=8, within=engine(sharded, slots=3)) == expected
        assert decode._cache_size() - before <= 2  # pyright: ignore[reportFunctionMemberAccess]


def test_unstacked_layers_give_the_same_tokens(params):
    unrolled = Transformer(CONFIG, MODEL.dtype, scan_layers=False)
    one_by_one = engine(unstack_layers(CONFIG, params), model=unrolled)
    assert len(one_by_one._state.cache.entries) == CONFIG.num_layers  # one array per layer, which is updated in place
    assert run(params, PROMPTS, WARM, within=one_by_one) == run(params, PROMPTS, WARM)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_an_int8_cache_changes_logits_little(params, scan_layers):
    """Log probabilities of the same tokens differ by about 1%, and the cache has a third of the bytes."""
    model = MODEL if scan_layers else Transformer(CONFIG, MODEL.dtype, scan_layers=False)
    weights = params if scan_layers else unstack_layers(CONFIG, params)
    exact, int8 = (engine(weights, model=model, quantize_cache=quantize) for quantize in (False, True))
    bytes_of = [sum(leaf.nbytes for leaf in jax.tree.leaves(each._state.cache)) for each in (exact, int8)]
    assert bytes_of[1] * 32 == bytes_of[0] * 12  # 8 values of 4 bytes, or of 1 byte and a scale of 4
    found = []
    for each in (exact, int8):
        scheduler = Scheduler(each)
        for prompt in PROMPTS:
            forced = SamplingConfig(temperature=0, logit_bias=("17:100",))
            scheduler.submit(request(prompt, forced, top_logprobs=0))
        found.append([top.logprob for output in outputs(scheduler).values() for top in output.logprobs])
    difference = np.abs(np.subtract(*found))
    assert 0 < difference.mean() < 0.02 * np.abs(found[0]).mean()


def test_what_does_not_fit_is_refused(params):
    full = engine(params, length=160)
    assert len(run(params, [[1] * 150], tokens=10, within=full)[0]) == 10
    with pytest.raises(InputError, match=r"150 tokens, and with max_new_tokens 11 .* context_length 160"):
        Scheduler(full).submit(request([1] * 150, tokens=11))
    with pytest.raises(InputError, match="logit_bias names token 90; the ids are 0 to 89"):
        Scheduler(full).submit(request([1], SamplingConfig(logit_bias=("90:1",))))
    for token in (-1, 96):
        with pytest.raises(InputError, match=f"the prompt has token {token}; the ids are 0 to 95"):
            Scheduler(full).submit(request([1, token]))
    short = engine(params, length=32)
    for slide, needed in ((False, 42), (True, 42)):
        with pytest.raises(InputError, match=f"needs {needed} positions, and the slots have 32"):
            Scheduler(short).submit(request([1] * 30, slide=slide))
    with pytest.raises(InputError, match="needs 160 positions, and the slots have 32"):
        Scheduler(short).submit(request([1], tokens=1000, slide=True))
    short.grow(1000)
    assert short.max_length == engine(params, slots=1, length=1000).max_length == 160
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        request([1], tokens=0)
    with pytest.raises(InputError, match="top_logprobs is 21; it must be in 0 to 20"):
        request([1], top_logprobs=21)


def test_speeds_count_tokens_without_padding(params):
    four = engine(params)
    run(params, PROMPTS, within=four)
    assert four.speeds.prefill_tokens == 0 + 3 + 13 + 3  # the last token of a prompt is read with the first new one
    assert four.speeds.decode_tokens == 4 * TOKENS
    assert four.speeds.prefill_seconds > 0
    assert four.speeds.decode_tokens_per_second > 0


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=0, repetition_penalty=1.4)], ids=str)
@pytest.mark.parametrize("shared", [20, 24, 26], ids=["some", "all but the last", "all"])
def test_a_free_slot_keeps_what_it_has_read(params, sampling, shared):
    one, prompt = engine(params, slots=1), list(range(1, 16))
    said = prompt + run(params, [prompt], sampling, within=one)[0]
    following = [*said[:shared], 21, 22, 23]
    before = one.speeds.prefill_tokens
    again = run(params, [following], sampling, within=one)
    assert one.speeds.prefill_tokens - before == len(following) - 1 - min(shared, len(said) - 1)
    assert again == run(params, [following], sampling, within=engine(params, slots=1))


def test_a_common_beginning_is_read_once(params):
    common = list(range(1, 31))
    four = engine(params)
    prompts = [[*common, 50 + row, 60 + row] for row in range(4)]
    rows = run(params, prompts, WARM, within=four)
    assert four.speeds.prefill_tokens == 31 + 3 * 1
    assert rows == [run(params, [prompt], WARM, within=engine(params, slots=1))[0] for prompt in prompts]


def test_log_probabilities_are_those_of_the_plain_logits(params):
    scheduler = Scheduler(engine(params))
    prompt = PROMPTS[2]
    scheduler.submit(request(prompt, WARM, top_logprobs=3))
    scheduler.submit(request(PROMPTS[1], WARM))
    first, second = outputs(scheduler, 5).values()
    assert second.logprobs == []
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(prompt) + TOKENS] = prompt + first.tokens
    logits_TV = np.asarray(full_forward(params, padded)[0, :, :VOCAB], np.float64)
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    assert [each.id for each in first.logprobs] == first.tokens
    for i, each in enumerate(first.logprobs):
        expected_V = logprobs_TV[len(prompt) - 1 + i]
        np.testing.assert_allclose(each.logprob, expected_V[each.id], atol=1e-4)
        assert [id for id, _ in each.top] == np.argsort(-expected_V)[:3].tolist()
        np.testing.assert_allclose([logprob for _, logprob in each.top], -np.sort(-expected_V)[:3], atol=1e-4)
