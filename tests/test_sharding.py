"""The mesh, and how arrays are split over it: eight virtual devices take the place of real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import tiny_models
from meap_jax import sharding
from meap_jax.errors import ConfigError
from meap_jax.sharding import AXES, batch_sharding, make_mesh, put, put_whole, replicated, spec, zigzag_order


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


@pytest.mark.parametrize(
    "sizes", [dict(), dict(data=3), dict(data=16), dict(data=-1, tensor=3), dict(data=-1, fsdp=16)]
)
def test_sizes_that_do_not_come_to_the_devices_are_refused(sizes):
    asked = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in AXES)
    with pytest.raises(ConfigError, match=f"mesh is {asked}, but there are 8 devices"):
        mesh_of(**sizes)


def test_a_batch_that_the_mesh_cannot_split_is_refused_with_its_divisor():
    mesh = mesh_of(data=2, fsdp=2, context=2)
    sharding.check_batch(mesh, global_batch_size=24, grad_accum_steps=3, seq_len=16)
    with pytest.raises(ConfigError, match="global_batch_size is 20, but must be a multiple of 12: 3 micro-batches"):
        sharding.check_batch(mesh, global_batch_size=20, grad_accum_steps=3, seq_len=16)
    with pytest.raises(ConfigError, match=r"seq_len is 14, but must be a multiple of 4, twice mesh.context \(2\)"):
        sharding.check_batch(mesh, global_batch_size=24, grad_accum_steps=3, seq_len=14)


# ------------------------------------------------------------------------------------------------------------ the rules


KV = (32, 2, 8), ("embed", "kv_heads", "head_dim")


@pytest.mark.parametrize(
    "tensor, shape, axes, expected",
    [
        (4, (64, 32), ("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
        (4, (2, 32, 4, 8), ("layers", "embed", "heads", "head_dim"), PartitionSpec(None, "fsdp", "tensor", None)),
        (4, (2, 32), ("layers", "norm"), PartitionSpec(None, None)),
        (4, (8, 16, 32), ("batch", "sequence", None), PartitionSpec(("data", "fsdp"), "context", None)),
        (4, (), (), PartitionSpec()),
        # kv heads are replicated where `tensor` does not divide them.
        (1, *KV, PartitionSpec("fsdp", "tensor", None)),
        (2, *KV, PartitionSpec("fsdp", "tensor", None)),
        (4, *KV, PartitionSpec("fsdp", None, None)),
    ],
)
def test_logical_axes_fall_on_the_axes_of_the_mesh(tensor, shape, axes, expected):
    assert spec(mesh_of(fsdp=-1, tensor=tensor), shape, axes) == expected


def test_query_heads_are_never_replicated_instead():
    with pytest.raises(ConfigError, match="'heads' of size 2 can't be split over tensor = 4 devices"):
        spec(mesh_of(data=2, tensor=4), (32, 2, 8), ("embed", "heads", "head_dim"))


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        (("heads", "mlp"), r"'heads', 'mlp'.*\['tensor', 'tensor'\].*one axis of an array only"),
        (("batch", "embed"), "'batch', 'embed'"),
        (("embed",), r"shape \(8, 8\) has 2 axes"),
    ],
)
def test_axes_that_share_one_of_the_mesh_or_have_no_name_are_refused(axes, sentence):
    with pytest.raises(ValueError, match=sentence):
        spec(mesh_of(data=-1), (8, 8), axes)


def test_an_array_is_really_split_as_its_axes_say():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    x = np.arange(32.0).reshape(4, 8)
    place = jax.NamedSharding(mesh, spec(mesh, (4, 8), ("embed", "mlp")))
    for shard in jax.device_put(x, place).addressable_shards:
        _, fsdp, tensor, _ = np.argwhere(mesh.device_ids == shard.device.id)[0]
        np.testing.assert_array_equal(shard.data, x[2 * fsdp : 2 * fsdp + 2, 4 * tensor : 4 * tensor + 4])


# -------------------------------------------------------------------------------------------------------- global arrays


def test_put_gives_every_device_what_it_holds_and_asks_for_no_more():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    x = np.arange(8 * 5, dtype=np.int32).reshape(8, 5)
    asked = set()

    def shard(index):
        asked.add(index[0].indices(8)[:2])
        return x[index]

    by_rows = batch_sharding(mesh)
    with jax.transfer_guard("disallow"):
        arrays = put(by_rows, x.shape, shard), put_whole(by_rows, x), put_whole(replicated(mesh), x)
    assert asked == {(0, 2), (2, 4), (4, 6), (6, 8)}
    for array, num_rows in zip(arrays, (2, 2, 8), strict=True):
        np.testing.assert_array_equal(array, x, strict=True)
        for held in array.addressable_shards:
            assert len(held.data) == num_rows
            np.testing.assert_array_equal(held.data, x[held.index])


def test_constrain_pins_an_activation_to_the_current_mesh_if_that_has_several_devices():
    mesh, x = mesh_of(data=2, fsdp=2, tensor=2), jnp.ones((4, 6))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "vocab"))(x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")), 2)
    assert sharding.constrain(x, "batch", "vocab") is x
    with jax.set_mesh(tiny_models.mesh_of(data=1)):
        assert sharding.constrain(x, "batch", "vocab") is x


# ---------------------------------------------------------------------------------------------------------- the zig-zag


def test_the_zigzag_pairs_the_first_part_with_the_last():
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag_order(6, 3).tolist() == [0, 5, 1, 4, 2, 3]


@given(shards=st.integers(1, 5), size=st.integers(1, 4))
def test_every_device_of_the_zigzag_has_the_same_causal_work_and_unzigzag_undoes_it(shards, size):
    order = zigzag_order(2 * shards * size, shards)
    assert sorted(order) == list(range(2 * shards * size))
    assert len(set((order + 1).reshape(shards, -1).sum(axis=1))) == 1  # Keys seen.
    x = np.random.default_rng(0).normal(size=(2, 2 * shards * size, 3)).astype(np.float32)
    np.testing.assert_array_equal(sharding.unzigzag(sharding.zigzag(jnp.asarray(x), shards), shards), x)
