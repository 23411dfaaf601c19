"""Rotary position embedding, and its scalings for long texts."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from meap_jax.model.config import RopeScaling


def rope(
    x: Float[Array, "B T N d"], positions: Int[Array, "B T"], base: float, scaling: RopeScaling | None = None
) -> Float[Array, "B T N d"]:
    """Rotary position embedding, Llama's layout: dimension i turns with i + d / 2, by position * base^(-2 i / d).

    Args:
      x: [B, T, N, d] with even d.
      positions: [B, T] int.
      base: theta; 10,000 in the paper, 640,000 in its 64K extension.
      scaling: changes the angles for long texts; None: nothing does.

    Returns:
      [B, T, N, d] in the dtype of x; angles and rotation in float32.
    """
    half = x.shape[-1] // 2
    if scaling is None or scaling.kind == "none":
        frequency, magnitude = base ** (-jnp.arange(half, dtype=jnp.float32) / half), 1.0
    else:
        scaled, magnitude = scaled_frequencies(half, base, scaling)
        frequency = jnp.asarray(scaled)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, T, 1, d / 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if magnitude != 1:
        cos, sin = cos * magnitude, sin * magnitude
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def scaled_frequencies(half: int, base: float, scaling: RopeScaling) -> tuple[Float32[np.ndarray, " half"], float]:
    """The angle a position of each pair of dimensions, and what cosines and sines are multiplied by.

    As transformers computes them (modeling_rope_utils.py), which follows Llama 3.1's code and YaRN's
    (https://arxiv.org/abs/2309.00071).

    Args:
      half: d / 2.
      base: theta.
      scaling: of any kind.
    """
    plain = base ** (-np.arange(half, dtype=np.float64) / half)
    slow = plain / scaling.factor
    magnitude = 1.0
    if scaling.kind == "linear":
        frequency = slow
    elif scaling.kind == "llama3":
        turns = scaling.original_seq_len * plain / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0, 1)
        frequency = keep * plain + (1 - keep) * slow
    elif scaling.kind == "yarn":
        keep = 1 - _yarn_ramp(half, base, scaling)
        frequency = keep * plain + (1 - keep) * slow
        magnitude = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    else:
        frequency = plain
    return frequency.astype(np.float32), magnitude


def _yarn_ramp(half: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """0 for pairs that turn more than beta_fast times in the original length, 1 below beta_slow, linear between."""

    def pair(turns: float) -> float:
        return half * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / math.log(base)

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    return np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
