"""The mesh, and which axis of an array is sharded over which axis of the mesh."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from meap_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "context")

# Logical axes of parameters and activations -> mesh axes. An axis that is not named here is replicated.
RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": "context",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with axes (data, fsdp, tensor, context); one size may be -1, "the devices that are left".

    Several TPU slices, which the slower data-centre network connects, are split over `data` alone, outermost;
    all other traffic stays within a slice.

    Raises:
      ConfigError: if the sizes do not come to the number of devices, or the slices don't divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    shape = {axis: sizes[axis] for axis in AXES}
    known = math.prod(size for size in shape.values() if size != -1)
    fitted = {axis: len(devices) // known if size == -1 else size for axis, size in shape.items()}
    if math.prod(fitted.values()) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in shape.items())
        raise ConfigError(
            f"mesh is {asked}, but there are {len(devices)} devices: the sizes must multiply to that, with one axis "
            "-1 for what is left."
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(fitted.values()), AXES, axis_types=axis_types, devices=devices)
    if fitted["data"] % slices:
        raise ConfigError(f"mesh.data is {fitted['data']}, but must be a multiple of the {slices} slices.")
    within = fitted | {"data": fitted["data"] // slices}
    grid = mesh_utils.create_hybrid_device_mesh(tuple(within.values()), (slices, 1, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=axis_types)


def check_batch(mesh: Mesh, global_batch_size: int, grad_accum_steps: int, seq_len: int) -> None:
    """Stops a batch that the mesh cannot split evenly.

    Raises:
      ConfigError: naming the size and its divisor.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if global_batch_size % (shards * grad_accum_steps):
        raise ConfigError(
            f"global_batch_size is {global_batch_size}, but must be a multiple of {shards * grad_accum_steps}: "
            f"{grad_accum_steps} micro-batches over data x fsdp = {shards} devices."
        )
    if mesh.shape["context"] > 1:
        zigzag_order(seq_len, mesh.shape["context"])


def spec(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    """How an array with these logical axes is split; kv heads are replicated where `tensor` does not divide them.

    Raises:
      ConfigError: if the mesh does not divide an axis.
      ValueError: if two axes of one array fall on the same mesh axis.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} has {len(shape)} axes, its logical names {axes} are {len(axes)}")
    entries: list[str | tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        entry = RULES.get(axis) if axis else None
        shards = int(np.prod([mesh.shape[a] for a in np.atleast_1d(entry)])) if entry else 1
        if size % shards and axis == "kv_heads":
            entry = None
        elif size % shards:
            raise ConfigError(
                f"the axis {axis!r} of size {size} can't be split over {entry} = {shards} devices; "
                "choose a mesh that divides it."
            )
        entries.append(entry)
    used = [a for entry in entries if entry for a in np.atleast_1d(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map to {entries}: a mesh axis may hold one axis of an array only")
    return PartitionSpec(*entries)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of [B, T + 1] blocks from the data pipeline: rows over (data, fsdp), whole rows on each device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation on the current mesh (`jax.set_mesh`), if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if is_trivial(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, x.shape, axes))


def shards_of(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Devices along an axis of the mesh; 1 where there is no mesh or no such axis."""
    return 1 if mesh.empty else dict(mesh.shape).get(axis, 1)


def is_trivial(mesh: Mesh | AbstractMesh) -> bool:
    """Whether every array is whole on one device, as far as the axes of `AXES` go."""
    return all(shards_of(mesh, axis) == 1 for axis in AXES)


def zigzag_order(seq_len: int, shards: int) -> np.ndarray:
    """The positions of a sequence in the order in which `shards` devices hold them.

    The sequence is cut into 2 * shards chunks and device i holds chunks i and 2 * shards - 1 - i: under causal
    attention all devices then have the same work, while of contiguous chunks the last has twice the mean.

    Raises:
      ConfigError: if 2 * shards does not divide the sequence.
    """
    if seq_len % (2 * shards):
        raise ConfigError(
            f"seq_len is {seq_len}, but must be a multiple of {2 * shards}, twice mesh.context ({shards})."
        )
    chunks = np.arange(seq_len).reshape(2 * shards, -1)
    return np.concatenate([chunks[[i, 2 * shards - 1 - i]].ravel() for i in range(shards)])


def zigzag(x: jax.Array, shards: int) -> jax.Array:
    """[B, T, ...] from the order of the text to that of the devices of `context`; nothing changes for one device."""
    return x if shards == 1 else jnp.take(x, zigzag_order(x.shape[1], shards), axis=1)


def unzigzag(x: jax.Array, shards: int) -> jax.Array:
    """The inverse of `zigzag`."""
    return x if shards == 1 else jnp.take(x, np.argsort(zigzag_order(x.shape[1], shards)), axis=1)


def put(sharding: NamedSharding, shape: tuple[int, ...], shard: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """A global array from the shards that this process's devices hold; explicit transfers only.

    Args:
      sharding: of the global array.
      shape: of the global array.
      shard: gives the host array at a global index.
    """
    indices = sharding.addressable_devices_indices_map(shape)
    arrays = [jax.device_put(shard(index), device) for device, index in indices.items() if index is not None]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def put_whole(sharding: NamedSharding, array: np.ndarray | np.generic) -> jax.Array:
    """A global array from a host array that every process has whole."""
    whole = np.asarray(array)
    return put(sharding, whole.shape, lambda index: whole[index])
