"""The checksum of an array's bits: equal to numpy on any mesh, different for other bits, and without a copy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from nextllm_jax.ops.checksum import partial_checksums

SHAPE = (8, 4, 16)


def scrambled(words):
    words = (words ^ words >> 16) * 0x9E3779B1 % 2**32
    return words ^ words >> 15


def reference(words):
    """The checksum of uint32 words [...], in Python's integers."""
    words = np.asarray(words)
    total = 0
    for index in np.ndindex(words.shape):
        term = scrambled(int(words[index]))
        for dimension, i in enumerate(index):
            term *= scrambled(scrambled((i + dimension * 0x9E3779B1) % 2**32)) | 1
        total += term
    return total % 2**32


def checksum(x, sharding=None):
    return int(np.sum(partial_checksums(x, sharding), dtype=np.uint32))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def bits(dtype):
    """Random bits of SHAPE, including those of NaNs, as an array of a dtype and as uint32 words."""
    random = np.random.default_rng(0)
    if dtype in (jnp.int4, bool):
        values = random.integers(0, 2 if dtype is bool else 16, SHAPE, np.uint8)
        return jnp.asarray(values).astype(dtype), values.astype(np.uint32)
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    words = random.integers(0, 2 ** (8 * unsigned.itemsize), SHAPE, np.uint64).astype(unsigned)
    return jnp.asarray(words.view(dtype)), words.astype(np.uint32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.int4, jnp.uint32, bool])
def test_equals_numpy(dtype):
    x, words = bits(dtype)
    assert checksum(x) == reference(words)


@pytest.mark.parametrize(
    "spec",
    [
        PartitionSpec(),
        PartitionSpec("data"),
        PartitionSpec("fsdp", "data"),
        PartitionSpec(None, None, ("fsdp", "data")),
        PartitionSpec(("data", "fsdp")),
    ],
)
def test_does_not_depend_on_the_mesh(mesh, spec):
    x, words = bits(jnp.float32)
    sharding = NamedSharding(mesh, spec)
    x = jax.device_put(x, sharding)
    with jax.set_mesh(mesh):
        assert checksum(x, sharding) == reference(words)


def test_other_kinds_of_arrays(mesh):
    key = jax.random.split(jax.random.key(3), 8)
    expected = reference(jax.random.key_data(key))
    assert checksum(key) == expected
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    assert checksum(jax.device_put(key, sharding), sharding) == expected
    assert checksum(jnp.int32(-7)) == reference(np.uint32(2**32 - 7))
    assert checksum(jnp.zeros((0, 3))) == 0


def test_any_flipped_bit_changes_the_checksum():
    words = np.random.default_rng(1).integers(0, 2**32, 35, np.uint32)
    flipped = np.stack(
        [words ^ np.roll(np.eye(1, 35, dtype=np.uint32)[0] << bit, i) for i in range(35) for bit in range(32)]
    )
    assert checksum(jnp.asarray(words)) not in np.asarray(jax.vmap(partial_checksums)(flipped))


def test_rearranged_bits_have_another_checksum():
    x = np.random.default_rng(2).standard_normal((16, 16)).astype(np.float32)
    negated = x.copy()
    negated[2, 3], negated[4, 5] = -x[2, 3], -x[4, 5]
    exchanged = x.copy()
    exchanged[2, 3], exchanged[2, 4] = x[2, 4], x[2, 3]
    opposite = x.copy()
    opposite[0], opposite[1] = -x[0], x[0]
    opposite_exchanged = opposite.copy()
    opposite_exchanged[[0, 1]] = opposite[[1, 0]]
    arrays = [x, x.T, x[::-1], np.roll(x, 1), -x, negated, exchanged, opposite, opposite_exchanged, np.zeros_like(x)]
    assert len({checksum(jnp.asarray(array)) for array in arrays}) == len(arrays)


def needs(shape, dtype, sharding):
    """(hundreds of bytes of temporaries, kinds of collectives) of the compiled program."""
    compiled = partial_checksums.lower(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding), sharding).compile()
    collectives = re.findall(r" ((?:all|reduce|collective)-[\w-]+)\(", compiled.as_text())
    return compiled.memory_analysis().temp_size_in_bytes // 100, [name for name in collectives if "window" not in name]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int4])
def test_needs_no_memory_and_sends_nothing(mesh, dtype):
    assert needs((32, 4096, 14336), dtype, NamedSharding(mesh, PartitionSpec("data", None, "fsdp"))) == (0, [])


def test_needs_no_memory_on_tpus(four_tpus):
    """An array of more than 2^32 elements on four devices, and one on a single device."""
    mesh = jax.sharding.Mesh(np.asarray(four_tpus).reshape(2, 2), ("data", "fsdp"))
    assert needs((80, 8192, 8192), jnp.bfloat16, NamedSharding(mesh, PartitionSpec("data", "fsdp"))) == (0, [])
    assert needs((128256, 4096), jnp.int8, SingleDeviceSharding(four_tpus[0])) == (0, [])
