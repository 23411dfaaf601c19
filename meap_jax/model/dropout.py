"""Dropout of hidden states: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, UInt32


class Dropout(NamedTuple):
    """What decides which hidden states are dropped; one axis more in front where micro-batches are stacked.

    Every row has a seed of its own, and every position of the text a key that comes from it: neither micro-batches nor
    a mesh change what is dropped.
    """

    seeds: UInt32[Array, "*micro B 1"]
    rates: Float32[Array, "*micro B 1"]  # In [0, 1]; 0 drops nothing.

    def drop(
        self, x_BTD: Float[Array, "B T D"], place: int | Int[Array, ""], positions_T: Int[Array, " T"]
    ) -> Float[Array, "B T D"]:
        """Sets each number to 0 with probability p, its row's rate, and multiplies the others by 1 / (1 - p).

        Args:
          x_BTD: hidden states.
          place: in the decoder; each place has draws of its own.
          positions_T: in the row, of the T states, in whatever order they are held.

        Returns:
          [B, T, D] in the dtype of x_BTD.
        """

        def uniform(seed: UInt32[Array, ""], position: Int[Array, ""]) -> Float32[Array, " D"]:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), place), position)
            return jax.random.uniform(key, x_BTD.shape[-1:])

        uniform_BTD = jax.vmap(jax.vmap(uniform, (None, 0)), (0, None))(self.seeds[:, 0], positions_T)
        rates_B11 = self.rates[..., None]
        # At rate 1 nothing is kept: the bound is for the gradient, which would be 0 times infinity.
        scale_B11 = 1 / jnp.maximum(1 - rates_B11, 2**-24)
        return jnp.where(uniform_BTD < rates_B11, 0, x_BTD * scale_B11.astype(x_BTD.dtype))
