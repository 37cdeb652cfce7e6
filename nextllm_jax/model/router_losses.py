"""What the routers of a model record in a forward pass, the losses computed from it, and the selection bias."""

from typing import Any

import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig
from nextllm_jax.model.moe import ROUTING, RouterSums
from nextllm_jax.model.weights import by_name, in_layer_order, layer_paths, with_names
from nextllm_jax.sharding import sum_over_manual_axes


def router_sums(config: ModelConfig, intermediates: Any) -> RouterSums | None:
    """What the routers recorded, each value with a leading axis S over the sparse layers; None without experts."""
    if not config.num_experts:
        return None
    E = config.num_experts

    def flat(block: Any, num_stacked: int) -> jax.Array:
        if "mlp" not in block:  # a dense layer records nothing there
            return jnp.zeros((len(block["before_mlp"][0]), 2 * E + 4) if num_stacked else 2 * E + 4)
        found: RouterSums = block["mlp"]["router"][ROUTING][0]
        scalars = jnp.stack([found.z, found.entropy, found.dropped, found.counted], axis=-1)
        return jnp.concatenate([found.tokens_E, found.probability_E, scalars], axis=-1)

    sums_SX = in_layer_order(config, intermediates, flat)[jnp.array(config.sparse_layers)]
    tokens_SE, probability_SE, scalars_S4 = jnp.split(sums_SX, (E, 2 * E), axis=1)
    return RouterSums(tokens_SE, probability_SE, *scalars_S4.T)


def router_loss(config: ModelConfig, sums: RouterSums, num_tokens: jax.Array) -> jax.Array:
    """The load-balancing loss and the z-loss with their weights, means over the sparse layers, times `num_tokens`.

    The load-balancing loss of a layer is E sum_e f_e p_e (Fedus et al. 2021, arXiv:2101.03961), where f_e is the share
    of expert e in the choices and p_e its mean probability; the z-loss is that of Zoph et al. 2022 (arXiv:2202.08906).
    Both are those of a microbatch, of all devices together. `num_tokens` is the number of its tokens in the loss mask
    on this device, by which the summed loss is divided later.
    """
    tokens_SE, counted_S, num_tokens = sum_over_manual_axes((sums.tokens_E, sums.counted, num_tokens))
    counted_S = jnp.maximum(counted_S, 1)
    choices_S = counted_S * config.experts_per_token
    balance_S = config.num_experts * jnp.sum(tokens_SE / choices_S[:, None] * sums.probability_E, axis=1) / counted_S
    losses_S = config.load_balance_weight * balance_S + config.router_z_weight * sums.z / counted_S
    return jnp.mean(losses_S) * num_tokens


def with_moved_biases(config: ModelConfig, params: Any, sums: RouterSums, applied: jax.Array) -> Any:
    """The parameters after a step's change of the selection biases (Wang et al. 2024, arXiv:2408.15664).

    A bias rises by the rate if the global batch gave the expert fewer tokens than the mean, and falls if more. Nothing
    changes if `applied` is false.
    """
    weights, paths = by_name(params), layer_paths(config)
    tokens_SE = sums.tokens_E
    error_SE = jnp.mean(tokens_SE, axis=1, keepdims=True) - tokens_SE
    change_SE = jnp.where(applied, config.selection_bias_rate, 0.0) * jnp.sign(error_SE)
    by_path: dict[str, list[int]] = {}
    for i, layer in enumerate(config.sparse_layers):
        by_path.setdefault(paths[layer][0], []).append(i)
    for path, rows in by_path.items():
        name = f"{path}/mlp/router/selection_bias"
        weights[name] += change_SE[jnp.array(rows)].reshape(weights[name].shape)
    return with_names(params, weights)
