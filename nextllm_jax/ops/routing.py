"""Which experts process a token, and with which weights.

Dimension letters: B batch, T time, E experts, K chosen experts of a token.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class Choice(NamedTuple):
    """The chosen experts of each token."""

    expert_BTK: jax.Array
    """int32; E for an expert that has no room left for the token."""
    weight_BTK: jax.Array
    """float32: factors on the outputs of these experts."""


def probabilities(logits_BTE: jax.Array, scores: Literal["softmax", "sigmoid"]) -> jax.Array:
    """The scores of the experts, float32."""
    return jax.nn.softmax(logits_BTE) if scores == "softmax" else jax.nn.sigmoid(logits_BTE)


def choose(score_BTE: jax.Array, bias_E: jax.Array | None, num_chosen: int, *, normalize: bool, scale: float) -> Choice:
    """The experts with the greatest scores. The bias changes which are chosen, but not their weights."""
    by_BTE = score_BTE if bias_E is None else score_BTE + bias_E.reshape(1, 1, -1)
    expert_BTK = jax.lax.top_k(jax.lax.stop_gradient(by_BTE), num_chosen)[1]
    weight_BTK = jnp.take_along_axis(score_BTE, expert_BTK, axis=-1)
    if normalize:
        weight_BTK = weight_BTK / (jnp.sum(weight_BTK, axis=-1, keepdims=True) + 1e-20)
    return Choice(expert_BTK, weight_BTK if scale == 1 else weight_BTK * scale)


def within_capacity(choice: Choice, num_experts: int, factor: float) -> Choice:
    """The choice in which an expert takes from each sequence at most `factor` times the mean number of tokens.

    It takes the first ones, so a token does not depend on later ones.
    """
    B, T, K = choice.expert_BTK.shape
    capacity = max(1, int(min(factor * T * K / num_experts, T * K)))  # a factor may be infinite
    chosen_BAE = choice.expert_BTK.reshape(B, T * K, 1) == jnp.arange(num_experts)[None, None]
    place_BAE = jnp.cumsum(chosen_BAE, axis=1, dtype=jnp.int32)
    fits_BTK = jnp.any(chosen_BAE & (place_BAE <= capacity), axis=-1).reshape(B, T, K)
    return choice._replace(expert_BTK=jnp.where(fits_BTK, choice.expert_BTK, num_experts))
