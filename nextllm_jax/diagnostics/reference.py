"""A Llama in plain numpy, float64, written from the papers: what `certify` and the equivalence tests compare with.

One loop over layers, one over heads, whole attention matrices, no cache. It shares nothing with the rest of the package
but the parameter tree and the config's field names.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """X over its root mean square on the last axis, times scale (Zhang and Sennrich, 2019)."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def silu(x: np.ndarray) -> np.ndarray:
    """X times its logistic sigmoid."""
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The Gaussian error linear unit by tanh (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def bounded(x: np.ndarray, cap: float | None) -> np.ndarray:
    """X softly bounded by cap (Gemma 2, 2024), or x itself."""
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(x: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis; -inf gets exactly none."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def rope_frequencies(config: Any, kind: str = "global") -> tuple[np.ndarray, float]:
    """Radians a position for each pair of a head [head_dim / 2], and the factor on cosine and sine.

    Su et al. 2021; `linear`: Chen et al. 2023; `llama3`: the Llama 3.1 release; `yarn`: Peng et al. 2023, section 3.2,
    with the ramp's ends rounded outwards to whole pairs as in the authors' code; `longrope`: Ding et al. 2024.
    """
    rotary_dim = config.rotary_dim or config.head_dim
    pairs = np.arange(rotary_dim // 2)
    if kind == "local" and config.rope_local_theta:
        return config.rope_local_theta ** (-2 * pairs / rotary_dim), 1.0
    frequency = config.rope_theta ** (-2 * pairs / rotary_dim)
    factor = config.rope_scaling_factor
    rotations = config.rope_original_context_length * frequency / (2 * np.pi)  # in the original context
    if config.rope_scaling == "none":
        return frequency, 1.0
    if config.rope_scaling == "linear":
        return frequency / factor, 1.0
    if config.rope_scaling == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        keep = np.clip((rotations - low) / (high - low), 0, 1)
        return keep * frequency + (1 - keep) * frequency / factor, 1.0

    original = config.rope_original_context_length
    if config.rope_scaling == "longrope":
        divisors = config.rope_long_factors if config.context_length > original else config.rope_short_factors
        attention_factor = config.rope_attention_factor or np.sqrt(1 + np.log(factor) / np.log(original))
        return frequency / np.array(divisors), attention_factor

    def pair_that_rotates(times: float) -> float:
        return rotary_dim * np.log(original / (times * 2 * np.pi)) / (2 * np.log(config.rope_theta))

    first = max(np.floor(pair_that_rotates(config.rope_beta_fast)), 0)
    last = min(np.ceil(pair_that_rotates(config.rope_beta_slow)), rotary_dim - 1)
    keep = 1 - np.clip((pairs - first) / (last - first), 0, 1)
    attention_factor = config.rope_attention_factor or 0.1 * np.log(factor) + 1
    return keep * frequency + (1 - keep) * frequency / factor, attention_factor


def rotate(x_BTNH: np.ndarray, kind: str, positions_BT: np.ndarray, config: Any) -> np.ndarray:
    """X with the pairs (i, i + R/2) of the first R dimensions of each head turned by position times frequency."""
    frequency, attention_factor = rope_frequencies(config, kind)
    x_BTNH, rest = np.split(x_BTNH, [2 * len(frequency)], axis=-1)
    angle_BTNH = positions_BT[:, :, None, None] * frequency
    cos, sin = np.cos(angle_BTNH) * attention_factor, np.sin(angle_BTNH) * attention_factor
    first, second = np.split(x_BTNH, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def visible(kind: str, segment_ids_BT: np.ndarray, config: Any) -> np.ndarray:
    """Which keys each query of a layer of this kind sees, bool [B, T, T]."""
    index = np.arange(segment_ids_BT.shape[1])
    distance = index[:, None] - index[None, :]
    mask = distance >= 0
    if kind == "local":
        mask = mask & (distance < config.sliding_window)
    return mask[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def attention(block: Any, x_BTD: np.ndarray, kind: str, positions_BT: np.ndarray, mask_BTT: np.ndarray, config: Any):
    """Grouped query attention (Ainslie et al. 2023), one query head at a time: [B, T, D]."""
    heads = {name: np.einsum("btd,dnh->btnh", x_BTD, block[name]["kernel"]) for name in "qkv"}
    if config.attention_bias:
        heads = {name: value + block[name]["bias"] for name, value in heads.items()}
    for name in "qk":
        if config.qk_norm:
            shape = heads[name].shape
            value = heads[name] if config.qk_norm_over == "head" else heads[name].reshape(*shape[:2], -1)
            scale = block[f"{name}_norm"]["scale"] + config.norm_scale_offset
            heads[name] = rms_norm(value, scale, config.norm_eps).reshape(shape)
        if kind != "global_nope":
            heads[name] = rotate(heads[name], kind, positions_BT, config)
    out_BTD = np.zeros_like(x_BTD)
    for n in range(config.num_heads):
        k = n // (config.num_heads // config.num_kv_heads)
        scale = config.attention_scale or 1 / np.sqrt(config.head_dim)
        scores_BTT = bounded(
            heads["q"][:, :, n] @ heads["k"][:, :, k].swapaxes(1, 2) * scale, config.attention_soft_cap
        )
        probabilities_BTT = softmax(np.where(mask_BTT, scores_BTT, -np.inf))
        out_BTD += probabilities_BTT @ heads["v"][:, :, k] @ block["o"]["kernel"][n]
    return out_BTD + (block["o"]["bias"] if config.attention_output_bias else 0)


Observer = Callable[[np.ndarray], None]
"""Called with the scores by which a router chooses experts, float32 [B, T, E]."""


def routed(router: Any, x_BTD: np.ndarray, config: Any, observe: Observer = lambda _: None) -> np.ndarray:
    """The weight of each expert for each token, [B, T, E]; 0 if the token does not reach it.

    Scores as in Shazeer et al. 2017 (softmax) or DeepSeek-V3 (2024: sigmoid, and a bias for the choice alone). They are
    float32, as routers define them: float64 would choose other experts where these scores are equal.
    """
    logits_BTE = x_BTD.astype(np.float32) @ np.asarray(router["kernel"], np.float32)
    scores_BTE = softmax(logits_BTE) if config.router_scores == "softmax" else 1 / (1 + np.exp(-logits_BTE))
    by_BTE = scores_BTE + np.asarray(router.get("selection_bias", 0), np.float32)
    observe(by_BTE)
    order_BTE = np.argsort(-by_BTE, axis=-1, kind="stable")
    chosen_BTE = np.argsort(order_BTE, axis=-1) < config.experts_per_token
    weights_BTE = scores_BTE.astype(np.float64) * chosen_BTE
    if config.normalize_expert_weights:
        weights_BTE /= weights_BTE.sum(axis=-1, keepdims=True)
    if config.capacity_factor:  # the first tokens of a sequence have precedence
        room = config.capacity_factor * x_BTD.shape[1] * config.experts_per_token // config.num_experts
        weights_BTE[chosen_BTE.cumsum(axis=1) > max(1, room)] = 0
    return weights_BTE * config.expert_weight_scale


def experts(block: Any, x_BTD: np.ndarray, activation: Any, config: Any, observe: Observer) -> np.ndarray:
    """A sparse layer, one expert after the other: [B, T, D]."""
    weights_BTE, out_BTD = routed(block["router"], x_BTD, config, observe), np.zeros_like(x_BTD)
    for expert in range(config.num_experts):
        b, t = weights_BTE[..., expert].nonzero()
        matrices = {name: {"kernel": matrix["kernel"][expert]} for name, matrix in block["experts"].items()}
        out_BTD[b, t] += weights_BTE[b, t, expert, None] * swiglu(matrices, x_BTD[b, t], activation)
    if "shared" in block:
        shared_BTD = swiglu(block["shared"], x_BTD, activation)
        if "shared_gate" in block:
            shared_BTD = shared_BTD / (1 + np.exp(-x_BTD @ to_float64(block["shared_gate"]["kernel"])))
        out_BTD += shared_BTD
    return out_BTD


def swiglu(block: Any, x: np.ndarray, activation: Any) -> np.ndarray:
    """The gated MLP (Shazeer 2020) of each row of x."""
    gate, up, down = (to_float64(block[name]["kernel"]) for name in ("gate", "up", "down"))
    return (activation(x @ gate) * (x @ up)) @ down


def unstack(params: Any, config: Any) -> list[Any]:
    """The blocks' parameters, one tree a layer, in order of depth, from the stack over periods of the pattern."""
    size = len(config.period)

    def pick(tree: Any, period: int) -> Any:
        return {name: pick(leaf, period) for name, leaf in tree.items()} if isinstance(tree, dict) else tree[period]

    whole = config.num_layers // size * size
    stacked = [pick(params["layers"][f"block_{layer % size}"], layer // size) for layer in range(whole)]
    return stacked + [params[f"remainder_{i}"] for i in range(config.num_layers - whole)]


def forward(params: Any, config: Any, tokens_BT: Any, segment_ids_BT: Any = None, positions_BT: Any = None):
    """Logits, float64 [B, T, V]; positions default to 0..T-1, segment ids to one document."""
    x_BTD = embedded(params["embed"], config, tokens_BT)
    for layer, block in enumerate(unstack(params, config)):
        x_BTD = block_forward(block, config, layer, x_BTD, segment_ids_BT, positions_BT)
    head = params["embed" if config.tie_embeddings else "lm_head"]
    return logits(params["final_norm"], head, config, x_BTD)


def embedded(embed: Any, config: Any, tokens_BT: Any) -> np.ndarray:
    """The residual stream before the first layer, float64 [B, T, D]."""
    return to_float64(np.asarray(embed["embedding"])[np.asarray(tokens_BT)]) * config.embedding_scale


def block_forward(
    block: Any,
    config: Any,
    layer: int,
    x_BTD: np.ndarray,
    segment_ids_BT: Any = None,
    positions_BT: Any = None,
    observe: Observer = lambda _: None,
) -> np.ndarray:
    """The residual stream after a layer, which is number `layer` from 0."""
    block = {name: part if name == "mlp" else to_float64(part) for name, part in block.items()}
    ones_BT = np.ones(x_BTD.shape[:2], int)
    segments = ones_BT if segment_ids_BT is None else np.asarray(segment_ids_BT)
    indices = np.broadcast_to(np.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    positions = indices if positions_BT is None else np.asarray(positions_BT)
    activation = {"silu": silu, "gelu_tanh": gelu_tanh}[config.activation]
    kind = config.layer_pattern[layer % len(config.layer_pattern)]
    mask_BTT, h_BTD = visible(kind, segments, config), norm(block, "attention_norm", x_BTD, config)
    out_BTD = attention(block["attention"], h_BTD, kind, positions, mask_BTT, config)
    x_BTD = x_BTD + norm(block, "attention_post_norm", out_BTD, config) * config.residual_scale
    h_BTD = norm(block, "mlp_norm", x_BTD, config)
    if "experts" in block["mlp"]:
        out_BTD = experts(block["mlp"], h_BTD, activation, config, observe)
    else:
        out_BTD = swiglu(block["mlp"], h_BTD, activation)
    return x_BTD + norm(block, "mlp_post_norm", out_BTD, config) * config.residual_scale


def norm(block: Any, name: str, x_BTD: np.ndarray, config: Any) -> np.ndarray:
    """X after the norm of this name, or x itself if the block has none."""
    if name not in block:
        return x_BTD
    return rms_norm(x_BTD, block[name]["scale"] + config.norm_scale_offset, config.norm_eps)


def logits(final_norm: Any, head: Any, config: Any, x_BTD: np.ndarray) -> np.ndarray:
    """Logits, float64 [B, T, V], from the residual stream after the last layer."""
    x_BTD = norm({"final_norm": to_float64(final_norm)}, "final_norm", x_BTD, config)
    head_VD, rows = head["embedding"], 4096  # a whole head in float64 may take gigabytes
    blocks = [x_BTD @ to_float64(head_VD[start : start + rows]).T for start in range(0, head_VD.shape[0], rows)]
    return bounded(np.concatenate(blocks, axis=-1) / config.logit_divisor, config.logit_soft_cap)


def to_float64(tree: Any) -> Any:
    """The same tree of plain dicts with float64 numpy leaves."""
    if hasattr(tree, "items"):
        return {name: to_float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)
