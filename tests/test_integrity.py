"""Checksums: any flipped bit changes them, no layout does, and devices that differ are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from meap_jax import integrity
from meap_jax.integrity import checksums, differing_replicas
from tiny_models import mesh_of

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "int4", "bool", "float8_e4m3fn")


def by_hand(x):
    """The checksum of an array with numpy, number by number."""
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    sums = [0, 0]
    for place, word in enumerate(x.ravel().view(width).tolist()):
        mixed = (place + 0x9E3779B9) % 2**32
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        mixed ^= mixed >> 16
        for i, factor in enumerate((mixed, (mixed << 16 | mixed >> 16) % 2**32)):
            sums[i] = (sums[i] + word * (factor | 1)) % 2**32
    return f"{x.dtype.name}:{sums[0]:08x}{sums[1]:08x}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int32"])
def test_a_checksum_is_that_of_a_loop_over_the_numbers(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 5, 2)).astype(dtype)
    assert checksums({"a": {"b": x}}) == {"a.b": by_hand(np.asarray(x))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [("data", "fsdp"), (None, "data"), (("data", "fsdp"), None), (None, None)])
def test_the_layout_over_devices_changes_no_checksum(dtype, spec):
    x = (jax.random.normal(jax.random.key(0), (16, 8)) * 3).astype(dtype)
    sharded = jax.device_put(x, NamedSharding(mesh_of(data=2, fsdp=4), PartitionSpec(*spec)))
    assert checksums({"x": sharded}) == checksums({"x": x})


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 36 * 32 - 1), st.integers(1, 5))
def test_flipped_bits_change_the_checksum(seed, bit, others):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, (4, 9), dtype=np.uint32)
    flipped = words.copy()
    for position in {bit, *rng.integers(0, 36 * 32, others).tolist()}:
        flipped.ravel()[position // 32] ^= np.uint32(1 << position % 32)
    before, after = (checksums({"x": jnp.asarray(x)})["x"] for x in (words, flipped))
    assert before != after


def test_an_exchange_of_two_numbers_and_another_shape_of_the_same_numbers_are_told_apart():
    x = jnp.arange(12.0)
    assert checksums({"x": x}) != checksums({"x": x[::-1]})
    assert checksums({"x": x}) == checksums({"x": x.reshape(3, 4)})  # Shapes are compared by orbax.


def with_other_copies(x, sharding, changed):
    """An array whose copies on the devices `changed`, by their place on the mesh, have one other bit."""
    good = jax.device_put(x, sharding)
    places = {device: i for i, device in enumerate(sharding.mesh.devices.flat)}
    shards = []
    for shard in good.addressable_shards:
        data = np.array(shard.data)
        if places[shard.device] in changed:
            data.ravel().view(np.uint32)[-1] ^= 1
        shards.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


@pytest.mark.parametrize("mesh, spec, changed, blamed", [
    ({"data": 8}, (), {5}, [5]),  # One of eight copies.
    ({"data": 8}, (), {1, 2, 6}, [1, 2, 6]),
    ({"data": 4, "fsdp": 2}, ("fsdp",), {6}, [6]),  # Four copies of each half.
    ({"data": 2, "fsdp": 4}, ("fsdp",), {5}, [1, 5]),  # Of two copies nobody knows which is right.
    ({"data": 2, "fsdp": 2, "tensor": 2}, ("fsdp", "tensor"), {0}, [0, 4]),
])  # fmt: skip
def test_a_copy_that_differs_is_found_with_its_devices(mesh, spec, changed, blamed):
    mesh = mesh_of(**mesh)
    x = jnp.ones((8, 8))
    bad = with_other_copies(x, NamedSharding(mesh, PartitionSpec(*spec)), changed)
    good = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    [found] = differing_replicas({"good": good, "bad": {"x": bad}}, mesh)
    assert found.name == "bad.x"
    assert list(found.devices) == [list(mesh.devices.flat)[i].id for i in blamed]


def test_what_every_device_holds_alone_has_nothing_to_differ_from():
    mesh = mesh_of(data=8)
    bad = with_other_copies(jnp.ones((8, 8)), NamedSharding(mesh, PartitionSpec("data")), {3})
    assert differing_replicas({"x": bad}, mesh) == []


def test_leaves_are_named_by_their_path():
    assert [name for name, _ in integrity.named({"a": {"b": 1}, "c": [2, (3,)]})] == ["a.b", "c.0", "c.1.0"]
