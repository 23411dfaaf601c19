"""Checksums of arrays, with which a flipped bit is found: on disk, or in the memory of one of several devices.

A checksum is a sum, modulo 2^32, of an array's words, each times an odd number that depends on its place. So one
changed bit always changes it, and anything else that changes leaves it as it was with a chance of about 2^-32, or 2^-64
for the two that are taken. Such sums come out the same in any order, so that the layout over devices doesn't matter.
"""

import functools
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def checksum(x: jax.Array) -> jax.Array:
    """The checksum of an array of any dtype and shape: two uint32 (a [2] array), each with factors of its own."""
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = _mixed(place)
    factors = (mixed, mixed << 16 | mixed >> 16)  # The same bits in another order are as good as new ones.
    return jnp.stack([(words * (factor | 1)).sum(dtype=jnp.uint32) for factor in factors])


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, one word a number (and two where a number has 8 bytes)."""
    if x.dtype == jnp.bool_ or x.dtype.itemsize == 1:
        # Also what has fewer than 8 bits, such as int4: as int8 it keeps its value.
        x = x.astype(jnp.int8) if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_ else x
        return jax.lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint32)
    if x.dtype.itemsize == 2:
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A uint32 that looks random for each uint32 and is another for each: the finalizer of MurmurHash3, fmix32."""
    x = x + jnp.uint32(0x9E3779B9)  # Or 0 would stay 0.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree in their order, each with its path: ("params.layers.attn.q_proj", array)."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]


def checksums(tree: Any) -> dict[str, str]:
    """The dtype and checksum of each array of a tree, by its path: {"params.head": "float32:0123456789abcdef"}.

    Every process of a run must call it, and all get the same.
    """
    names = named(tree)
    if not names:
        return {}
    with jax.transfer_guard_device_to_host("allow"):  # Of eight bytes an array.
        sums = jax.device_get(_all_checksums([leaf for _, leaf in names]))
    return {name: f"{leaf.dtype.name}:{one[0]:08x}{one[1]:08x}" for (name, leaf), one in zip(names, sums, strict=True)}


def _all_checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    mesh = getattr(leaves[0].sharding, "mesh", None)  # None: all is on one device.
    return _compiled_checksums(mesh and _everywhere(mesh))(leaves)


@functools.lru_cache(maxsize=8)
def _compiled_checksums(sharding: NamedSharding | None) -> Any:
    return jax.jit(lambda leaves: [checksum(x) for x in leaves], out_shardings=sharding)


class Corruption(NamedTuple):
    """An array of which devices should hold the same bits and don't."""

    name: str
    devices: tuple[int, ...]  # The ids of those that differ from the majority, or all where there is none.


def differing_replicas(tree: Any, mesh: Mesh) -> list[Corruption]:
    """Finds arrays of which some devices hold other bits than others that should hold the same.

    XLA takes them for equal and never compares them, so that the error of a faulty device stays unseen and spreads.

    Args:
      tree: of arrays on all devices of `mesh`, with NamedShardings. Every process of a run must call this.
      mesh: of the run.

    Returns:
      One entry for each array that differs.
    """
    names, leaves = zip(*named(tree), strict=True)
    with jax.transfer_guard("allow"):
        sums = _local_checksums(mesh, tuple(x.sharding.spec for x in leaves))(list(leaves))
        held = np.asarray(jax.device_get(sums)).reshape(mesh.size, len(leaves), 2)
    devices = list(mesh.devices.flat)
    found = []
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        groups: dict[str, list[int]] = {}
        places = leaf.sharding.devices_indices_map(leaf.shape)
        for position, device in enumerate(devices):
            groups.setdefault(str(places[device]), []).append(position)
        wrong: list[int] = []
        for members in groups.values():
            values = [tuple(held[position, i].tolist()) for position in members]
            (most, count), *others = Counter(values).most_common()
            if others:
                is_tied = others[0][1] == count
                wrong += [devices[p].id for p, v in zip(members, values, strict=True) if is_tied or v != most]
        if wrong:
            found.append(Corruption(name, tuple(sorted(wrong))))
    return found


@functools.lru_cache(maxsize=8)
def _local_checksums(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    """Makes a function from arrays of these specs to [devices, arrays, 2]: of what each device holds, by itself."""

    def on_one_device(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([checksum(x) for x in leaves])[None]

    every_axis = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(on_one_device, mesh=mesh, in_specs=(list(specs),), out_specs=every_axis, check_vma=False)
    return jax.jit(mapped, out_shardings=_everywhere(mesh))


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
