"""Properties of the decoder: causality, documents, cache, remat, layouts and types."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.kv_cache import KVCache
from nextllm_jax.model.layers import RMSNorm
from nextllm_jax.model.transformer import Transformer, resolve_dtype
from nextllm_jax.model.weights import by_name, unstack_layers
from nextllm_jax.sharding import RULES
from tests import parameters

TOLERANCE = 2e-5  # hidden states are of order 1

TINY: dict[str, Any] = {
    "vocab_size": 31,
    "embed_dim": 16,
    "mlp_dim": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}
PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {"num_layers": 2},
    "pattern_and_remainder": {
        "num_layers": 5,
        "layer_pattern": ("local", "global_nope"),
        "sliding_window": 3,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 2.0,
        "qk_norm": True,
    },
}


def make_config(pattern: str = "plain", **changes: Any) -> ModelConfig:
    return ModelConfig(**TINY | PATTERNS[pattern] | changes)


def positions_of(tokens_BT: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)


def random_tokens(config: ModelConfig, batch: int, time: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, time), np.int32)


def boxed_params(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    """Shapes, types and logical axes of the parameters."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(Transformer(config, dtype).init, jax.random.key(0), tokens_BT, tokens_BT)
    return jax.eval_shape(init)["params"]


def random_params(config: ModelConfig) -> Any:
    return jax.tree.map(jnp.asarray, parameters.random_params(nn.meta.unbox(boxed_params(config))))


def call(model: Transformer, params: Any, *inputs: Any, method: str | None = None) -> Any:
    return model.apply({"params": params}, *inputs, method=method)


apply = jax.jit(call, static_argnums=0)


def hidden_states(model: Transformer, params: Any, *inputs: Any) -> np.ndarray:
    return np.asarray(apply(model, params, *inputs)[0])


def influence(config: ModelConfig, time: int, segment_ids_BT: np.ndarray | None = None) -> np.ndarray:
    """Greatest gradient of the hidden state at t with respect to the embedding of the token at s, [T, T]."""
    model, params = Transformer(config), random_params(config)
    tokens_BT = np.arange(time, dtype=np.int32)[None]  # each token once, so that its row stands for its position

    def summed(embedding: jax.Array, weights_D: jax.Array) -> jax.Array:
        replaced = params | {"embed": {"embedding": embedding}}
        hidden_BTD, _ = call(model, replaced, tokens_BT, positions_of(tokens_BT), segment_ids_BT)
        return hidden_BTD[0] @ weights_D

    weights_D = jax.random.normal(jax.random.key(1), (config.embed_dim,))
    gradients_TVD = jax.jit(jax.jacrev(summed))(params["embed"]["embedding"], weights_D)
    return np.abs(np.asarray(gradients_TVD)).max(-1)[:, :time]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_position_sees_itself_and_what_is_before_it_and_nothing_else(pattern: str) -> None:
    seen_TS = influence(make_config(pattern), 12) != 0
    np.testing.assert_array_equal(seen_TS, np.tri(12, dtype=bool))


def test_a_local_layer_sees_its_window() -> None:
    config = make_config(num_layers=1, layer_pattern=("local",), sliding_window=4)
    distance_TS = np.arange(12)[:, None] - np.arange(12)
    np.testing.assert_array_equal(influence(config, 12) != 0, (distance_TS >= 0) & (distance_TS < 4))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_position_sees_nothing_of_another_document(pattern: str) -> None:
    segment_ids_BT = np.array([[1, 1, 1, 1, 2, 3, 3, 3, 3, 0, 0, 0]], np.int32)
    seen_TS = influence(make_config(pattern), 12, segment_ids_BT) != 0
    np.testing.assert_array_equal(seen_TS, np.tri(12, dtype=bool) & (segment_ids_BT == segment_ids_BT.T))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_equal_separate_documents(pattern: str) -> None:
    config = make_config(pattern)
    model, params = Transformer(config), random_params(config)
    lengths = (7, 1, 5)
    documents = [random_tokens(config, 1, length, seed=length) for length in lengths]
    padding = np.zeros((1, 3), np.int32)
    packed_BT = np.concatenate([*documents, padding], axis=1)
    segment_ids_BT = np.repeat([1, 2, 3, 0], [*lengths, 3])[None].astype(np.int32)
    positions_BT = np.concatenate([np.arange(n) for n in (*lengths, 3)])[None].astype(np.int32)
    packed = hidden_states(model, params, packed_BT, positions_BT, segment_ids_BT)
    for document_BT, start in zip(documents, (0, 7, 8), strict=True):
        alone = hidden_states(model, params, document_BT, positions_of(document_BT))
        np.testing.assert_allclose(packed[:, start : start + document_BT.shape[1]], alone, atol=TOLERANCE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cache_equals_no_cache_with_the_prefill_split_at_every_point(pattern: str) -> None:
    """Row p prefills p tokens and steps through the rest: all splits, and rows at different positions, at once."""
    time = 9
    config = make_config(pattern)
    model, params = Transformer(config), random_params(config)
    tokens_BT = np.broadcast_to(random_tokens(config, 1, time), (time, time))
    expected = hidden_states(model, params, tokens_BT, positions_of(tokens_BT))
    prompt = np.tri(time, k=-1, dtype=bool)  # row p holds p tokens, then pads
    cache = KVCache.create(config, batch_size=time, length=time, dtype=jnp.float32)
    prompts_BT = np.where(prompt, tokens_BT, 30)
    hidden_BTD, cache = apply(model, params, prompts_BT, positions_of(tokens_BT), None, cache)
    np.testing.assert_allclose(np.asarray(hidden_BTD)[prompt], expected[prompt], atol=TOLERANCE)
    rows = np.arange(time)
    for offset in range(time):
        position = rows + offset  # rows that are done write past the end of the cache, which must do nothing
        tokens_B1, positions_B1 = tokens_BT[rows, position % time][:, None], position[:, None].astype(np.int32)
        hidden_BTD, cache = apply(model, params, tokens_B1, positions_B1, None, cache)
        live = position < time
        np.testing.assert_allclose(hidden_BTD[live, 0], expected[live, position[live]], atol=TOLERANCE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_in_pieces_equals_prefill_at_once(pattern: str) -> None:
    config = make_config(pattern)
    model, params = Transformer(config), random_params(config)
    tokens_BT = random_tokens(config, 2, 11)
    expected = hidden_states(model, params, tokens_BT, positions_of(tokens_BT))
    cache, pieces = KVCache.create(config, batch_size=2, length=16, dtype=jnp.float32), []
    for piece in (slice(0, 4), slice(4, 11)):
        positions_BT = positions_of(tokens_BT)[:, piece]
        hidden_BTD, cache = apply(model, params, tokens_BT[:, piece], positions_BT, None, cache)
        pieces.append(hidden_BTD)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=TOLERANCE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unstacked_layers_equal_the_scan_with_a_cache_and_without(pattern: str) -> None:
    config = make_config(pattern)
    params, tokens_BT = random_params(config), random_tokens(config, 2, 6)
    unrolled, unstacked = Transformer(config, scan_layers=False), unstack_layers(config, params)
    expected = hidden_states(Transformer(config), params, tokens_BT, positions_of(tokens_BT))
    hidden_BTD = hidden_states(unrolled, unstacked, tokens_BT, positions_of(tokens_BT))
    np.testing.assert_allclose(hidden_BTD, expected, atol=TOLERANCE)
    cache = KVCache.create(config, batch_size=2, length=8, dtype=jnp.float32, scan_layers=False)
    for piece in (slice(0, 5), slice(5, 6)):
        positions_BT = positions_of(tokens_BT)[:, piece]
        hidden_BTD, cache = apply(unrolled, unstacked, tokens_BT[:, piece], positions_BT, None, cache)
        np.testing.assert_allclose(hidden_BTD, expected[:, piece], atol=TOLERANCE)


def test_segment_ids_with_a_cache_are_refused() -> None:
    config = make_config()
    tokens_BT = random_tokens(config, 1, 4)
    cache = KVCache.create(config, batch_size=1, length=4, dtype=jnp.float32)
    with pytest.raises(ValueError, match="not both"):
        apply(Transformer(config), random_params(config), tokens_BT, tokens_BT, tokens_BT, cache)


def decode_step_memory(config: ModelConfig, batch: int, length: int, *, scan_layers: bool) -> tuple[Any, int]:
    """What one step that is given its cache needs, and the bytes of the cache."""
    model, params = Transformer(config, scan_layers=scan_layers), random_params(config)
    if not scan_layers:
        params = unstack_layers(config, params)
    cache = KVCache.create(config, batch_size=batch, length=length, dtype=jnp.float32, scan_layers=scan_layers)
    tokens_B1 = np.zeros((batch, 1), np.int32)
    step = jax.jit(
        lambda params, cache: call(model, params, tokens_B1, tokens_B1, None, cache), donate_argnames=("cache",)
    )
    memory = step.lower(params, cache).compile().memory_analysis()
    return memory, sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(("scan_layers", "fraction"), [(True, 1 / 8), (False, 1 / 32)])  # of a cache of 16 layers
def test_a_decode_step_carries_the_cache_and_does_not_copy_it(scan_layers: bool, fraction: float) -> None:
    memory, cache_bytes = decode_step_memory(make_config(num_layers=16), 4, 4096, scan_layers=scan_layers)
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < fraction * cache_bytes


def test_a_decode_step_copies_no_matrix_of_unstacked_layers() -> None:
    config = make_config(embed_dim=128, head_dim=32, mlp_dim=128)
    memory, _ = decode_step_memory(config, 1, 16, scan_layers=False)
    smallest = 4 * 128 * config.num_kv_heads * config.head_dim
    assert memory.temp_size_in_bytes < smallest


def gradient_program(remat: str) -> tuple[Any, Any]:
    """The compiled loss and gradients of a model with this remat policy, and its parameters."""
    config = make_config(num_layers=8, remat=remat)
    model, params = Transformer(config), random_params(config)
    tokens_BT = random_tokens(config, 4, 32)

    def loss(params: Any) -> jax.Array:
        hidden_BTD, _ = call(model, params, tokens_BT, positions_of(tokens_BT))
        log_probs_BTV = jax.nn.log_softmax(call(model, params, hidden_BTD, method="logits"))
        return -jnp.take_along_axis(log_probs_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1).mean()

    return jax.jit(jax.value_and_grad(loss)).lower(params).compile(), params


def test_remat_saves_memory_and_changes_neither_loss_nor_gradients() -> None:
    programs = {remat: gradient_program(remat) for remat in ("none", "dots", "full")}
    results = {remat: program(params) for remat, (program, params) in programs.items()}
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6),
            results[remat],
            results["none"],
        )
    temporary = {remat: program.memory_analysis().temp_size_in_bytes for remat, (program, _) in programs.items()}
    products = {remat: program.cost_analysis()["flops"] for remat, (program, _) in programs.items()}
    assert temporary["none"] > 1.1 * temporary["dots"] > 1.1**2 * temporary["full"], temporary
    assert products["none"] < products["dots"] < products["full"], products


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_holds_for_layers_outside_the_scan_too(remat: str) -> None:
    config = make_config(num_layers=1, layer_pattern=("global", "local"), remat=remat)
    model, params, tokens_BT = Transformer(config), boxed_params(config), random_tokens(config, 1, 4)
    forward = jax.make_jaxpr(lambda params: call(model, params, tokens_BT, tokens_BT)[0])
    assert bool(re.search("policy=(?!None)", str(forward(nn.meta.unbox(params))))) == (remat != "none")


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "attention_bias": True}])
def test_every_parameter_names_the_logical_axis_of_each_dimension(changes: dict[str, Any]) -> None:
    config = make_config("pattern_and_remainder", **changes)
    sizes: dict[str | None, int] = {
        "vocab": 31,
        "embed": 16,
        "mlp": 24,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "layers": 2,
    }
    leaves = jax.tree_util.tree_leaves_with_path(
        boxed_params(config), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
    assert len(leaves) > 20
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.Partitioned), name
        assert set(leaf.names) <= set(RULES), name
        expected = [sizes.get(axis, size) for axis, size in zip(leaf.names, leaf.value.shape, strict=True)]
        assert list(leaf.value.shape) == expected, name
        assert (leaf.names[0] == "layers") == ("layers" in name), name


def test_initial_layers_differ_and_residual_projections_start_smaller() -> None:
    config = make_config(num_layers=8, embed_dim=64, mlp_dim=64, head_dim=16)
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    variables = jax.jit(Transformer(config).init)(jax.random.key(0), tokens_BT, tokens_BT)
    block = nn.meta.unbox(variables)["params"]["layers"]["block_0"]
    up, down = np.asarray(block["mlp"]["up"]["kernel"]), np.asarray(block["mlp"]["down"]["kernel"])
    assert not np.array_equal(up[0], up[1])
    np.testing.assert_allclose(up.std(), 0.02, rtol=0.03)
    for residual in (down, np.asarray(block["attention"]["o"]["kernel"])):
        np.testing.assert_allclose(residual.std(), 0.02 / np.sqrt(2 * 8), rtol=0.03)


def test_zero_outputs_start_every_layer_as_the_identity() -> None:
    config = make_config(zero_init_outputs=True)
    tokens_BT = jnp.arange(6, dtype=jnp.int32)[None]
    variables = nn.meta.unbox(Transformer(config).init(jax.random.key(0), tokens_BT, tokens_BT))
    for name, leaf in by_name(variables["params"]).items():
        assert np.any(leaf) != name.endswith(("o/kernel", "down/kernel")), name
    hidden_BTD, _ = Transformer(config).apply(variables, tokens_BT, tokens_BT)
    x_BTD = np.asarray(variables["params"]["embed"]["embedding"])[tokens_BT]
    expected = x_BTD / np.sqrt(np.mean(np.square(x_BTD), axis=-1, keepdims=True) + config.norm_eps)
    np.testing.assert_allclose(hidden_BTD, expected, rtol=1e-5)


def test_bfloat16_compute_keeps_parameters_and_logits_in_float32() -> None:
    config = make_config()
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed_params(config, jnp.bfloat16))} == {jnp.dtype("float32")}
    model, params = Transformer(config, jnp.bfloat16), random_params(config)
    tokens_BT = random_tokens(config, 1, 8)
    hidden_BTD = hidden_states(model, params, tokens_BT, positions_of(tokens_BT))
    assert hidden_BTD.dtype == jnp.bfloat16
    assert call(model, params, hidden_BTD, method="logits").dtype == jnp.float32
    exact = hidden_states(Transformer(config), params, tokens_BT, positions_of(tokens_BT))
    error = np.abs(np.asarray(hidden_BTD, np.float32) - np.asarray(exact))
    assert 0 < error.max() < 0.05


def test_param_dtype_is_the_type_of_the_parameters() -> None:
    params = boxed_params(make_config(param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_norms_compute_in_float32() -> None:
    x = jax.random.normal(jax.random.key(0), (4, 256)).astype(jnp.bfloat16)
    scale = 1 + 0.1 * jax.random.normal(jax.random.key(1), (256,))
    normed: Any = RMSNorm(1e-5, jnp.float32).apply({"params": {"scale": scale}}, x)
    assert normed.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)[None]
    # Rounded once, at the end: nearly all are the nearest bfloat16. With roundings in between a third are not.
    assert np.mean(np.asarray(normed) == exact.astype(jnp.bfloat16)) > 0.99


@pytest.mark.parametrize(
    ("name", "platform", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "tpu", "bfloat16"),
        ("auto", "gpu", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_dtype_is_resolved_by_platform(name: str, platform: str, expected: str) -> None:
    assert resolve_dtype(name, platform) == jnp.dtype(expected)


@pytest.mark.parametrize(("has_units", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_training_on_a_cpu_follows_its_units(has_units: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextllm_jax.hardware.cpu_has_bfloat16", lambda: has_units)
    assert resolve_dtype("auto", "cpu", training=True) == jnp.dtype(expected)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.dtype is float16"):
        resolve_dtype("float16", "cpu")
