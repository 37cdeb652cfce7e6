"""The product of activations with a weight matrix, with a custom backward pass."""

import functools

import jax
import jax.numpy as jnp


def linear(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`einsum(equation, x, kernel)` in the operands' common dtype.

    The equation names all axes, as in "BTD,DF->BTF"; each letter must be in at least two of the three operands. The
    custom backward pass computes the kernel's gradient in the kernel's own layout. Automatic differentiation computes
    it transposed and then transposes it, which takes twice as long on a CPU.
    """
    return _linear(equation, x, kernel)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum that on CPUs accumulates in float32, since XLA's CPU backend is slow at writing bfloat16 results."""

    def accumulated(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    return jax.lax.platform_dependent(a, b, cpu=accumulated, default=functools.partial(jnp.einsum, equation))


def _forward(equation: str, x: jax.Array, kernel: jax.Array):
    return _einsum(equation, x, kernel), (x, kernel)


def _backward(equation: str, residuals: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    operands, y_dims = equation.split("->")
    x_dims, kernel_dims = operands.split(",")
    return _einsum(f"{y_dims},{kernel_dims}->{x_dims}", d_y, kernel), _einsum(
        f"{x_dims},{y_dims}->{kernel_dims}", x, d_y
    )


_linear = jax.custom_vjp(_einsum, nondiff_argnums=(0,))
_linear.defvjp(_forward, _backward)
