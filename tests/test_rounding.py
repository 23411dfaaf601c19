"""Stochastic rounding: right in the mean, never further than the next number, and the same bits on any mesh."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meap_jax.rounding import stochastically
from tiny_models import mesh_of

BFLOAT16 = ml_dtypes.bfloat16
rounded = jax.jit(stochastically)


def neighbours(x):
    """The bfloat16 numbers next to each float32 number, towards zero and away from it; infinity is one."""
    bits = np.asarray(x, np.float32).view(np.uint32) >> 16
    return (np.uint16(bits).view(BFLOAT16), np.uint16(bits + 1).view(BFLOAT16))


def numbers(size=4096):
    """Of all magnitudes and both signs, from denormal ones to the largest, as random bits have them."""
    bits = np.random.default_rng(0).integers(0, 2**32, size, np.uint32).view(np.float32)
    return np.r_[bits[np.isfinite(bits)], np.float32([1e-45, -1e-40, 3.4e38, -3.4e38])]


def test_the_mean_over_many_keys_is_the_number():
    x, keys = np.float32([1.001, 3.999, -0.3, 1e-30, 255.1, 1.0039, -7e20]), jax.random.split(jax.random.key(0), 20_000)
    drawn = np.float64(jax.jit(jax.vmap(stochastically, (None, 0)))(x, keys))
    low, high = np.float64(neighbours(x))
    share = (x - low) / (high - low)  # That must be rounded away from zero.
    bound = 4.5 * np.sqrt(share * (1 - share) / len(keys))
    assert (np.abs((drawn.mean(axis=0) - low) / (high - low) - share) <= bound).all()
    assert (np.abs((x.astype(BFLOAT16) - x) / (high - low)) > bound).any()  # Rounding to the nearest would fail.


def test_no_number_goes_further_than_to_one_of_its_neighbours():
    x = numbers()
    drawn = np.array([rounded(x, jax.random.key(seed)) for seed in range(8)])
    low, high = (n.view(np.uint16) for n in neighbours(x))
    is_low, is_high = drawn.view(np.uint16) == low, drawn.view(np.uint16) == high
    assert (is_low | is_high).all() and is_low.any() and is_high.any()


def test_what_bfloat16_holds_stays_as_it_is_and_so_do_infinities_and_nans():
    every = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)
    after = np.asarray(rounded(every.astype(np.float32), jax.random.key(3)))
    is_nan = np.isnan(every.astype(np.float32))
    np.testing.assert_array_equal(after.view(np.uint16)[~is_nan], every.view(np.uint16)[~is_nan])
    assert np.isnan(after.astype(np.float32)[is_nan]).all()
    payload = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]).view(np.float32)  # NaNs whose bits would carry.
    assert np.isnan(np.float32(rounded(payload, jax.random.key(0)))).all()


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_the_bits_do_not_depend_on_the_mesh(sizes):
    x, key = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32), jax.random.key(7)
    split = NamedSharding(mesh_of(**sizes), PartitionSpec("fsdp", "tensor"))
    there = jax.jit(stochastically, in_shardings=(split, None), out_shardings=split)(x, key)
    np.testing.assert_array_equal(np.asarray(there).view(np.uint16), np.asarray(rounded(x, key)).view(np.uint16))


def test_updates_below_half_a_step_are_lost_to_the_nearest_and_add_up_stochastically():
    start, update, num_updates = jnp.ones(512, jnp.bfloat16), jnp.float32(2**-10), 128  # bfloat16 steps by 2^-7 here.

    def after(round_):
        def add(x, key):
            return round_(x.astype(jnp.float32) + update, key), None

        return np.float32(jax.lax.scan(add, start, jax.random.split(jax.random.key(1), num_updates))[0])

    assert (after(lambda x, _: x.astype(jnp.bfloat16)) == 1).all()
    moved = after(stochastically)
    # Each of 512 numbers takes a step of 2^-7 with probability 1/8, 128 times.
    assert abs(moved.mean() - 1.125) < 4.5 * 2**-7 * np.sqrt(num_updates / 8 * 7 / 8 / 512)
