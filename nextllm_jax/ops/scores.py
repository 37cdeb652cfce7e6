"""How attention scores are made and masked: what the kernels written here share."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, since -inf minus a row maximum of -inf would be NaN.
MASKED = -1e30

# Products of bfloat16 arrays accumulate and come out in float32.
einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class ScoreRule(NamedTuple):
    """The window of visible positions, what divides products, and what bounds them."""

    window: int | None
    divisor: float
    soft_cap: float | None

    @classmethod
    def of(cls, head_dim: int, window: int | None, scale: float | None, soft_cap: float | None) -> "ScoreRule":
        return cls(window, math.sqrt(head_dim) if scale is None else 1 / scale, soft_cap)

    def scores(self, products: jax.Array) -> jax.Array:
        """Scores before the mask."""
        scores = products / self.divisor
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)

    def d_products(self, d_scores: jax.Array, scores: jax.Array) -> jax.Array:
        """The gradient for the products, of that for the masked scores."""
        if self.soft_cap is not None:
            # d tanh = 1 - tanh^2; a masked score counts as one at its bound, whose gradient is 0.
            d_scores *= 1 - jnp.square(jnp.clip(scores / self.soft_cap, -1, 1))
        return d_scores / self.divisor


def visible(distance: jax.Array, window: int | None) -> jax.Array:
    """Whether a query sees a key that is `distance` positions before it."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def group(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, K, G, H]: the query heads by the key head that they share."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
