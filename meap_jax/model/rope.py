"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope(x: Float[Array, "B T N d"], positions: Int[Array, "B T"], base: float) -> Float[Array, "B T N d"]:
    """Rotary position embedding, Llama's layout: dimension i turns with i + d / 2, by position * base^(-2 i / d).

    Args:
      x: [B, T, N, d] with even d.
      positions: [B, T] int.
      base: theta; 10,000 in the paper, 640,000 in its 64K extension.

    Returns:
      [B, T, N, d] in the dtype of x; angles and rotation in float32.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, T, 1, d / 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
