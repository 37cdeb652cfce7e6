"""Attention logits and their masks, shared by the XLA kernels."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, since -inf minus a row maximum of -inf would be NaN.
MASKED = -1e30

# Products of bfloat16 arrays are accumulated and returned in float32.
einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class LogitsRule(NamedTuple):
    """How products of queries and keys become logits: the window, a divisor, and a soft cap."""

    window: int | None
    divisor: float
    soft_cap: float | None

    @classmethod
    def of(cls, head_dim: int, window: int | None, scale: float | None, soft_cap: float | None) -> "LogitsRule":
        return cls(window, math.sqrt(head_dim) if scale is None else 1 / scale, soft_cap)

    def logits(self, products: jax.Array) -> jax.Array:
        """The logits, before the mask."""
        logits = products / self.divisor
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def d_products(self, d_logits: jax.Array, logits: jax.Array) -> jax.Array:
        """The gradient of the products, from the gradient of the masked logits."""
        if self.soft_cap is not None:
            # d tanh = 1 - tanh^2. Clipping treats a masked logit as one at the cap, where the gradient is 0.
            d_logits *= 1 - jnp.square(jnp.clip(logits / self.soft_cap, -1, 1))
        return d_logits / self.divisor


def visible(distance: jax.Array, window: int | None) -> jax.Array:
    """Whether a query sees a key that is `distance` positions before it."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def group(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """The query heads grouped by the key head that they share, [B, T, K, G, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
