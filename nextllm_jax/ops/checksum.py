"""A uint32 checksum of an array's bits that does not depend on how the array is sharded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

_ODD = 0x9E3779B1
"""Multiplying by an odd number modulo 2^32 can be undone."""
_FUSED = {"xla_disable_hlo_passes": "tree_reduction_rewriter"}
"""On CPUs, that pass splits the sum, so the words would be written to memory first, 4 bytes for each element."""


@functools.partial(jax.jit, static_argnums=1, compiler_options=_FUSED)
def partial_checksums(x: jax.Array, sharding: Sharding | None = None) -> jax.Array:
    """uint32 [shards]: what each shard adds to the checksum of `x`, of any shape and of any dtype but a complex one.

    The checksum is their sum modulo 2^32. `sharding` is that of `x`. If it is a NamedSharding, each device reads its
    shard and keeps its part of the result, without any communication.

    Each element is a word, or several if it has over 32 bits. Its bits are scrambled by an invertible function and
    multiplied by an odd weight; the sum is modulo 2^32. So changes within one word always change the sum, and other
    changes do with a probability of about 1 - 2^-32. A weight is the product of one odd factor for each dimension,
    which is a hash of the index in it. So arrays may have more than 2^32 elements, as long as no dimension has.
    """
    if not isinstance(sharding, NamedSharding):
        return _weighted_sum(x, PartitionSpec())
    axes = tuple(axis for of_dimension in sharding.spec for axis in _axes(of_dimension))
    sum_shard = functools.partial(_weighted_sum, spec=sharding.spec)
    parts = PartitionSpec(axes) if axes else PartitionSpec()
    return jax.shard_map(sum_shard, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=parts)(x)


def _axes(of_dimension: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return of_dimension if isinstance(of_dimension, tuple) else () if of_dimension is None else (of_dimension,)


def _weighted_sum(shard: jax.Array, spec: PartitionSpec) -> jax.Array:
    """[1]: what the shard on this device adds to the checksum."""
    words = _words(shard)
    total = _scrambled(words)
    for dimension, length in enumerate(words.shape):
        axes = _axes(spec[dimension]) if dimension < len(spec) else ()
        index = lax.iota(jnp.uint32, length) + jnp.uint32(dimension * _ODD % 2**32)
        if axes:
            index += jnp.uint32(length) * lax.axis_index(axes).astype(jnp.uint32)
        factor = _scrambled(_scrambled(index)) | jnp.uint32(1)
        total *= lax.broadcast_in_dim(factor, words.shape, (dimension,))
    return jnp.sum(total, dtype=jnp.uint32)[None]


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as a uint32. Larger elements become several, in a new last dimension."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = (jnp.finfo if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.iinfo)(x.dtype).bits
    return lax.bitcast_convert_type(x, f"uint{min(bits, 32)}").astype(jnp.uint32)


def _scrambled(words: jax.Array) -> jax.Array:
    """An invertible function of uint32 words. Each bit affects many bits of the result."""
    words = (words ^ (words >> 16)) * jnp.uint32(_ODD)
    return words ^ (words >> 15)
