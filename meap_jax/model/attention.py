"""Who sees whom, and attention under it.

Callers describe visibility once, by positions, segments, window and branches; how it is computed is this file's
business.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCK = 512  # Longer sequences go block by block, so that memory grows as T, not as T squared.


class Visibility(NamedTuple):
    """Who sees whom in each row. A query sees a key if all of these hold.

    - same segment (document);
    - the key's position is not after the query's (causal; by position, so that a permuted sequence works too);
    - the distance in positions is below `window`, if there is one;
    - the key is on the trunk (branch 0) or on the query's own branch, if there are branches.
    """

    segment_ids: Int[Array, "B T"]  # 0 is padding by convention.
    positions: Int[Array, "B T"]  # From 0 in each segment; also RoPE's.
    window: int | None = None  # Positions, the query's own included.
    branch_ids: Int[Array, "B T"] | None = None  # 0 is the trunk.

    def mask(self, queries: slice = slice(None)) -> Bool[Array, "B Q T"]:
        """Which keys each of these queries sees."""
        return _sees(*self, queries)


def _sees(
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    window: int | None,
    branch_ids: Int[Array, "B T"] | None,
    queries: slice,
) -> Bool[Array, "B Q T"]:
    """`Visibility.mask` with the fields as arguments, whose shapes are checked in tests as those of fields are not."""
    q_pos, k_pos = positions[:, queries, None], positions[:, None, :]
    sees = (segment_ids[:, queries, None] == segment_ids[:, None, :]) & (k_pos <= q_pos)
    if window is not None:
        sees &= q_pos - k_pos < window
    if branch_ids is not None:
        k_branch = branch_ids[:, None, :]
        sees &= (k_branch == 0) | (k_branch == branch_ids[:, queries, None])
    return sees


def attention(
    q: Float[Array, "B T H d"], k: Float[Array, "B T K d"], v: Float[Array, "B T K d"], visibility: Visibility
) -> Float[Array, "B T H d"]:
    """Grouped-query attention with float32 scores and softmax.

    Args:
      q: [B, T, H, d], any float dtype.
      k, v: [B, T, K, d]; K divides H, and kv head i serves the query heads i * H / K ... (i + 1) * H / K - 1.
      visibility: who sees whom; every query must see at least one key (its own position does).

    Returns:
      [B, T, H, d] in the dtype of q.
    """
    B, T, H, d = q.shape
    K = k.shape[2]
    q_BTKGd = q.reshape(B, T, K, H // K, d)

    if T <= QUERY_BLOCK:
        return _attend(q_BTKGd, k, v, visibility.mask()).reshape(B, T, H, d)

    def block(queries: slice) -> Float[Array, "B Q K G d"]:
        # The weights of a block are recomputed in the backward pass: they are what would not fit.
        return jax.checkpoint(lambda q: _attend(q, k, v, visibility.mask(queries)))(q_BTKGd[:, queries])

    blocks = [block(slice(start, min(start + QUERY_BLOCK, T))) for start in range(0, T, QUERY_BLOCK)]
    return jnp.concatenate(blocks, axis=1).reshape(B, T, H, d)


def _attend(
    q: Float[Array, "B Q K G d"], k: Float[Array, "B T K d"], v: Float[Array, "B T K d"], sees: Bool[Array, "B Q T"]
) -> Float[Array, "B Q K G d"]:
    """Q queries over all keys; G query heads share each of the K kv heads."""
    scores = jnp.einsum("BQKGd,BTKd->BKGQT", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(sees[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGQT,BTKd->BQKGd", weights, v)


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
