"""The mesh, and where arrays lie on it: eight virtual devices stand for the real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from meap_jax.errors import ConfigError
from meap_jax.sharding import (
    AXES,
    batch_sharding,
    check_batch,
    constrain,
    make_mesh,
    put,
    put_whole,
    replicated,
    sharding_of,
    spec,
    unzigzag,
    zigzag,
    zigzag_order,
)


def mesh_of(**sizes):
    return make_mesh(dict.fromkeys(AXES, 1) | sizes)


# ------------------------------------------------------------------------------------------------------------- the mesh


@pytest.mark.parametrize(
    "sizes, shape",
    [
        (dict(data=-1), (8, 1, 1, 1)),
        (dict(fsdp=-1, tensor=2), (1, 4, 2, 1)),
        (dict(data=2, fsdp=2, tensor=2), (2, 2, 2, 1)),
        (dict(data=2, context=-1), (2, 1, 1, 4)),
        (dict(data=8, fsdp=-1), (8, 1, 1, 1)),
    ],
)
def test_an_axis_of_minus_1_takes_the_devices_that_are_left(sizes, shape):
    mesh = mesh_of(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor", "context")
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_mesh_can_be_made_of_some_devices():
    assert make_mesh(dict(data=-1, fsdp=1, tensor=1, context=1), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "sizes", [dict(), dict(data=3), dict(data=16), dict(data=-1, tensor=3), dict(data=-1, fsdp=16)]
)
def test_sizes_that_do_not_come_to_the_devices_are_refused(sizes):
    asked = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in AXES)
    with pytest.raises(ConfigError, match=f"mesh is {asked}, but there are 8 devices"):
        mesh_of(**sizes)


def test_a_batch_that_the_mesh_cannot_split_is_refused_with_its_divisor():
    mesh = mesh_of(data=2, fsdp=2, context=2)
    check_batch(mesh, global_batch_size=24, grad_accum_steps=3, seq_len=16)
    with pytest.raises(ConfigError, match="global_batch_size is 20, but must be a multiple of 12: 3 micro-batches"):
        check_batch(mesh, global_batch_size=20, grad_accum_steps=3, seq_len=16)
    with pytest.raises(ConfigError, match=r"seq_len is 14, but must be a multiple of 4, twice mesh.context \(2\)"):
        check_batch(mesh, global_batch_size=24, grad_accum_steps=3, seq_len=14)


# ------------------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize(
    "shape, axes, expected",
    [
        ((64, 32), ("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
        ((2, 32, 4, 8), ("layers", "embed", "heads", "head_dim"), PartitionSpec(None, "fsdp", "tensor", None)),
        ((2, 32), ("layers", "norm"), PartitionSpec(None, None)),
        ((8, 16, 32), ("batch", "sequence", None), PartitionSpec(("data", "fsdp"), "context", None)),
        ((), (), PartitionSpec()),
    ],
)
def test_logical_axes_fall_on_the_axes_of_the_mesh(shape, axes, expected):
    assert spec(mesh_of(fsdp=2, tensor=4), shape, axes) == expected


@pytest.mark.parametrize("tensor, entry", [(1, "tensor"), (2, "tensor"), (4, None)])
def test_kv_heads_are_replicated_where_tensor_does_not_divide_them(tensor, entry):
    mesh = mesh_of(data=-1, tensor=tensor)
    assert spec(mesh, (32, 2, 8), ("embed", "kv_heads", "head_dim")) == PartitionSpec("fsdp", entry, None)


def test_query_heads_are_never_replicated_instead():
    with pytest.raises(ConfigError, match="'heads' of size 2 can't be split over tensor = 4 devices"):
        spec(mesh_of(data=2, tensor=4), (32, 2, 8), ("embed", "heads", "head_dim"))


def test_two_axes_of_one_array_on_one_axis_of_the_mesh_are_refused_with_both():
    with pytest.raises(ValueError, match=r"'heads', 'mlp'.*\['tensor', 'tensor'\].*one axis of an array only"):
        spec(mesh_of(data=-1), (4, 8), ("heads", "mlp"))
    with pytest.raises(ValueError, match="'batch', 'embed'"):
        spec(mesh_of(data=-1), (8, 8), ("batch", "embed"))


def test_a_name_missing_for_an_axis_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 8\) has 2 axes"):
        spec(mesh_of(data=-1), (4, 8), ("embed",))


def test_an_array_really_lies_where_its_axes_say():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    x = np.arange(32.0).reshape(4, 8)
    sharding = sharding_of(mesh, jax.ShapeDtypeStruct((4, 8), jnp.float32), ("embed", "mlp"))
    for shard in jax.device_put(x, sharding).addressable_shards:
        _, fsdp, tensor, _ = np.argwhere(mesh.device_ids == shard.device.id)[0]
        np.testing.assert_array_equal(shard.data, x[2 * fsdp : 2 * fsdp + 2, 4 * tensor : 4 * tensor + 4])


# -------------------------------------------------------------------------------------------------------- global arrays


def test_put_makes_a_global_array_of_the_pieces_its_devices_hold():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    x = np.arange(8 * 5, dtype=np.int32).reshape(8, 5)
    asked = []

    def piece(index):
        asked.append(index[0].indices(8)[:2])
        return x[index]

    with jax.transfer_guard("disallow"):
        array = put(batch_sharding(mesh), x.shape, piece)
    assert set(asked) == {(0, 2), (2, 4), (4, 6), (6, 8)}
    assert array.shape == (8, 5) and array.dtype == x.dtype and array.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(array, x)
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, x[shard.index])


def test_put_whole_gives_every_device_what_it_holds():
    mesh = mesh_of(data=-1)
    x = np.arange(16, dtype=np.int32).reshape(8, 2)
    with jax.transfer_guard("disallow"):
        split, everywhere = put_whole(batch_sharding(mesh), x), put_whole(replicated(mesh), x)
    assert {shard.data.shape for shard in split.addressable_shards} == {(1, 2)}
    assert {shard.data.shape for shard in everywhere.addressable_shards} == {(8, 2)}
    np.testing.assert_array_equal(split, x)
    np.testing.assert_array_equal(everywhere, x)


def test_constrain_does_nothing_without_a_mesh_or_on_a_mesh_of_one():
    x = jnp.ones((3, 5))  # 3 rows could not be split.
    assert constrain(x, "batch", "vocab") is x
    with jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])):
        assert constrain(x, "batch", "vocab") is x


def test_constrain_pins_an_activation_to_the_current_mesh():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "batch", "vocab"))(jnp.ones((4, 6)))
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")), 2)


# ---------------------------------------------------------------------------------------------------------- the zig-zag


def test_the_zigzag_pairs_the_first_part_with_the_last():
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag_order(6, 3).tolist() == [0, 5, 1, 4, 2, 3]


@given(shards=st.integers(1, 5), size=st.integers(1, 4))
def test_under_causal_attention_every_device_of_the_zigzag_has_the_same_work(shards, size):
    order = zigzag_order(2 * shards * size, shards)
    assert sorted(order) == list(range(2 * shards * size))
    keys_seen = (order + 1).reshape(shards, -1).sum(axis=1)
    assert len(set(keys_seen.tolist())) == 1


@given(shards=st.integers(1, 5), size=st.integers(1, 4))
def test_unzigzag_undoes_zigzag(shards, size):
    x = np.random.default_rng(0).normal(size=(2, 2 * shards * size, 3))
    np.testing.assert_array_equal(unzigzag(zigzag(jnp.asarray(x), shards), shards), x.astype(np.float32))
