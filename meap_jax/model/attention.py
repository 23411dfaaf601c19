"""Who sees whom, and attention under it.

Callers describe visibility once, by positions, segments, window and branches; how it is computed is this file's business.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERY_BLOCK = 512  # Longer sequences go block by block, so that memory grows as T, not as T squared.


class Visibility(NamedTuple):
    """Who sees whom in each row. A query sees a key if all of these hold.

    - same segment (document);
    - the key's position is not after the query's (causal; by position, so that a permuted sequence works too);
    - the distance in positions is below `window`, if there is one;
    - the key is on the trunk (branch 0) or on the query's own branch, if there are branches.
    """

    segment_ids: jax.Array  # [B, T] int32; 0 is padding by convention.
    positions: jax.Array  # [B, T] int32, from 0 in each segment; also RoPE's.
    window: int | None = None  # Positions, the query's own included.
    branch_ids: jax.Array | None = None  # [B, T] int32; 0 is the trunk.

    def mask(self, queries: slice = slice(None)) -> jax.Array:
        """Which keys each of these queries sees: [B, Q, T] bool."""
        q_pos, k_pos = self.positions[:, queries, None], self.positions[:, None, :]
        sees = (self.segment_ids[:, queries, None] == self.segment_ids[:, None, :]) & (k_pos <= q_pos)
        if self.window is not None:
            sees &= q_pos - k_pos < self.window
        if self.branch_ids is not None:
            k_branch = self.branch_ids[:, None, :]
            sees &= (k_branch == 0) | (k_branch == self.branch_ids[:, queries, None])
        return sees


def attention(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
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

    def block(q_BQKGd, sees_BQT):
        scores = jnp.einsum("BQKGd,BTKd->BKGQT", q_BQKGd, k, preferred_element_type=jnp.float32) * d**-0.5
        scores = jnp.where(sees_BQT[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("BKGQT,BTKd->BQKGd", weights, v)

    if T <= QUERY_BLOCK:
        return block(q_BTKGd, visibility.mask()).reshape(B, T, H, d)
    # The weights of a block are recomputed in the backward pass: they are what would not fit.
    starts = range(0, T, QUERY_BLOCK)
    slices = [slice(start, min(start + QUERY_BLOCK, T)) for start in starts]
    out = [jax.checkpoint(lambda q, s=s: block(q, visibility.mask(s)))(q_BTKGd[:, s]) for s in slices]
    return jnp.concatenate(out, axis=1).reshape(B, T, H, d)


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
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
