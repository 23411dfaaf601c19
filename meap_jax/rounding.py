"""Rounds float32 to bfloat16, to the nearest or stochastically.

bfloat16 has 8 bits of precision: rounded to the nearest, an update smaller than 1/512 of its parameter is lost. Rounded
stochastically it moves the parameter to the next number sometimes, so often that the mean is right.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Key


def stochastically(x: Float32[Array, "..."], key: Key[Array, ""]) -> BFloat16[Array, "..."]:
    """Rounds each number up or down, with probabilities whose mean is the number itself.

    Numbers that bfloat16 holds stay, and so do infinities and NaNs. The draw depends on the key and the place in the
    array alone, not on how it is sharded.
    """
    # bfloat16 is the first half of float32: what is cut off, over 2^16, is the probability of a carry into it.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    halves = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16
    rounded = jax.lax.bitcast_convert_type(halves.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
