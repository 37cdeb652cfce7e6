"""The device mesh, and the table of the mesh axes that each logical axis is sharded over.

Logical axis names are stated once at each parameter's initializer. `RULES` maps them to mesh axes. The mapping is
strict, where Flax would silently replicate the array. Errors are
- a name that is not in the table;
- two logical axes of an array that use the same mesh axis;
- a size that is not divisible by its mesh axes.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from nextllm_jax.config import MeshConfig
from nextllm_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "sequence", "tensor", "expert")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "lookup_batch": ("data",),  # during the embedding lookup
    "seq": ("sequence",),
    "residual_seq": ("sequence", "tensor"),  # between sublayers, in training
    "activation_embed": (),
    # parameters; heads, kv_heads, mlp and vocab also shard activations
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "expert_embed": ("fsdp",),  # embed of expert weights
    "router_experts": (),  # the outputs of the router
    "norm": (),
    "rank": (),
    "layers": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all given devices (default: all devices) with the axes MESH_AXES of type Auto.

    The order of TPUs follows their torus. Each slice is one contiguous part of the data axis. Raises InputError if the
    product of the axis sizes is not the number of devices, or if `config.slices` does not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    found = num_slices(devices)
    if config.slices == found > 1:
        in_a_slice = (sizes[0] // found, *sizes[1:])
        order = create_hybrid_device_mesh(in_a_slice, (found, 1, 1, 1, 1), devices, allow_split_physical_axes=True)
    elif config.slices == 1 and (found == 1 or devices[0].platform != "tpu"):
        # GPU nodes count as slices too, but any axis may span several nodes.
        order = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif found == 1 and devices[0].platform == "cpu":
        order = np.array(devices).reshape(sizes)  # simulated slices: data is the outermost axis
    else:
        fit = f"{found}" if found == 1 or devices[0].platform == "tpu" else f"{found}, or 1 to let any axis span them"
        raise InputError(f"mesh.slices is {config.slices}, but the devices form {found}; set --mesh.slices {fit}")
    return Mesh(order, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which `mesh` is jax's current mesh. It does nothing for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array. If it is sharded over processes, all of them must call this."""
    return np.array(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def num_slices(devices: Sequence[Any]) -> int:
    """The number of TPU slices or GPU nodes of the devices; 1 for devices that do not report it."""
    return len({getattr(device, "slice_index", None) for device in devices})


def num_parts(mesh: Mesh | AbstractMesh, name: str) -> int:
    """The number of shards of a logical axis on a mesh."""
    return math.prod(mesh.shape[axis] for axis in RULES[name])


def padded_size(size: int, name: str) -> int:
    """The smallest size >= `size` that the current mesh can shard evenly along a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return size if mesh.empty else -(-size // num_parts(mesh, name)) * num_parts(mesh, name)


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names (None: not sharded).

    Inside `jax.shard_map`, manual axes are left out. Raises ValueError for a name that is not in RULES, and for two
    names that use the same mesh axis.
    """
    entries: list[str | tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis '{name}' is unknown; sharding.RULES has {', '.join(RULES)}")
        axes = RULES[name] if name is not None else ()
        for axis in axes:
            if axis in used:
                raise ValueError(f"logical axes '{used[axis]}' and '{name}' of {tuple(names)} both use '{axis}'")
            used[axis] = str(name)
        axes = tuple(axis for axis in axes if axis not in manual)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, constrained to the sharding of its logical axes on the current mesh; unchanged without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def per_shard(
    f: Callable[..., Any],
    in_names: Sequence[Sequence[str | None]],
    out_names: Sequence[str | None],
    summed_names: Sequence[str] = (),
) -> Callable[..., Any]:
    """`f`, mapped over shards of its arguments, for functions that XLA cannot shard, such as Pallas kernels.

    `in_names` are the logical axes of each argument, and `out_names` those of the single result. Results are summed
    over the mesh axes of `summed_names`. Without a current mesh this is `f`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return f
    summed = tuple(axis for name in summed_names for axis in RULES[name])

    def on_shard(*args: Any) -> Any:
        return jax.lax.psum(f(*args), summed) if summed else f(*args)

    return jax.shard_map(on_shard, in_specs=tuple(map(spec, in_names)), out_specs=spec(out_names), check_vma=False)


def per_layer(
    f: Callable[[jax.Array], jax.Array], x: jax.Array, names: Sequence[str | None], *, over_data: bool = False
) -> jax.Array:
    """`f(x)` for stacked layers [L, ...] with these logical axes; each device computes `f` of its share of the layers.

    `f` gets whole layers, for which the devices exchange their shards, and returns layers of the same shape. `x` is
    padded with zeros if the devices do not divide L. With `over_data`, `x` is also sharded over "data", as by
    `also_over_data`; the result is not. Without a current mesh this is `f(x)`.
    """
    mesh, num_layers = jax.sharding.get_abstract_mesh(), len(x)
    if mesh.empty:
        return f(x)
    result = sharding(mesh, *names)
    operand = also_over_data(result, x.shape) if over_data else result
    # The minor mesh axis of a dimension comes first.
    axes = [(axis, dim) for dim, entry in enumerate(operand.spec) for axis in reversed(_as_tuple(entry))]
    axes = [(axis, dim) for axis, dim in axes if mesh.shape[axis] > 1]
    if not axes:
        return f(x)
    kept = {axis for entry in result.spec for axis in _as_tuple(entry)}

    def on_shard(x: jax.Array) -> jax.Array:
        for axis, dim in axes:
            x = jax.lax.all_to_all(x, axis, 0, dim, tiled=True) if dim else x
        x = f(x)
        for axis, dim in reversed(axes):
            if axis not in kept:
                x = jax.lax.all_gather(x, axis, tiled=True)
            elif dim:
                x = jax.lax.all_to_all(x, axis, dim, 0, tiled=True)
        return x

    padding = -num_layers % math.prod(mesh.shape[axis] for axis, _ in axes)
    x = jnp.pad(x, [(0, padding), *[(0, 0)] * (x.ndim - 1)])
    return jax.shard_map(on_shard, in_specs=operand.spec, out_specs=result.spec, check_vma=False)(x)[:num_layers]


def _as_tuple(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def is_divisible(shape: Sequence[int], names: Sequence[str | None]) -> bool:
    """Whether the current mesh can shard an array of this shape evenly by its logical axes. True without a mesh.

    Inside `jax.shard_map`, manual axes do not count, as in `spec`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or all(
        size % math.prod(mesh.shape[axis] for axis in _as_tuple(entry)) == 0
        for size, entry in zip(shape, spec(names), strict=True)
    )


def sum_over_data(f: Callable[[Any, Any], Any], whole: Any, batch: Any) -> Any:
    """The sum over the mesh axis "data" of `f(whole, rows)`, where `rows` is each index's shard of `batch`.

    `f` returns a pytree of arrays. It communicates nothing over "data"; only the sum does. Without such an axis in the
    current mesh this is `f(whole, batch)`.
    """
    if jax.sharding.get_abstract_mesh().shape.get("data", 1) == 1:
        return f(whole, batch)
    part = jax.shard_map(
        lambda *arguments: jax.tree.map(lambda x: x[None], f(*arguments)),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
    )
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), part(whole, batch))


def sum_over_manual_axes(tree: Any) -> Any:
    """A pytree of arrays, each summed over the mesh axes that are manual here, as "data" is inside `sum_over_data`."""
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return jax.lax.psum(tree, axes) if axes else tree


def sharding(mesh: Mesh | AbstractMesh, *names: str | None) -> NamedSharding:
    """The NamedSharding of an array with these logical axes on `mesh`."""
    return NamedSharding(mesh, spec(names))


def on_device(abstract_tree: Any, device: Any) -> Any:
    """The tree of abstract arrays without boxes, each placed on one device."""
    single = SingleDeviceSharding(device)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=single), nn.meta.unbox(abstract_tree)
    )


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def tree_shardings(mesh: Mesh | AbstractMesh, abstract_tree: Any) -> Any:
    """A NamedSharding for each leaf of a tree of abstract arrays, from the logical names in its box.

    Leaves without a box, such as counters, are replicated. The result has the structure of the unboxed tree. Raises
    InputError if a dimension is not divisible by its mesh axes.
    """

    def leaf_sharding(path: Any, leaf: Any) -> NamedSharding:
        if not _is_boxed(leaf):
            return NamedSharding(mesh, PartitionSpec())
        result = sharding(mesh, *leaf.names)
        for size, name in zip(leaf.value.shape, leaf.names, strict=True):
            axes = RULES[name] if name is not None else ()
            parts = num_parts(mesh, name) if name is not None else 1
            if size % parts:
                raise InputError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')}: its '{name}' axis of size {size} "
                    f"cannot be sharded over {parts} devices (mesh.{' x mesh.'.join(axes)})"
                )
        return result

    return jax.tree_util.tree_map_with_path(leaf_sharding, abstract_tree, is_leaf=_is_boxed)


def placed(mesh: Mesh | AbstractMesh, boxed: Any) -> Any:
    """The tree of abstract arrays without boxes, each with its sharding on the mesh.

    Raises InputError if a dimension cannot be sharded over its mesh axes.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        tree_shardings(mesh, boxed),
    )


def resized(sharding: Any, shape: Sequence[int], new: Sequence[int]) -> Any:
    """The sharding for an array of shape `new`, given the sharding for an array of shape `shape`.

    Axes may be shorter in `new`. A shorter axis that is not divisible by its mesh axes is not sharded.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    for i, (size, entry) in enumerate(zip(new, entries, strict=True)):
        axes = _as_tuple(entry)
        if size != shape[i] and size % math.prod(sharding.mesh.shape[axis] for axis in axes):
            entries[i] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)


def also_over_data(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The sharding with the mesh axis "data" added to the largest dimension that remains divisible.

    If there is no such dimension, the sharding is unchanged.
    """
    mesh = sharding.mesh
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    for i in sorted(range(len(shape)), key=lambda i: -shape[i]):
        axes = (*_as_tuple(entries[i]), "data")
        if shape[i] % math.prod(mesh.shape[axis] for axis in axes) == 0:
            entries[i] = axes
            return NamedSharding(mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)
    return sharding


def is_over_data(sharding: NamedSharding) -> bool:
    """Whether an array with this sharding is sharded over "data"."""
    return any("data" in (entry or ()) for entry in sharding.spec)
