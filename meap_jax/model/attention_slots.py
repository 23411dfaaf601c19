"""Attention of few queries to the filled slots of a cache, block by block, and its sum over devices.

What is held of the scores is [B, K, G, Q, BLOCK], however many slots there are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from meap_jax.model.visibility import Visibility

BLOCK = 1_024  # Slots at a time.

Parts = tuple[Float32[Array, "B Q H d"], Float32[Array, "B Q H"], Float32[Array, "B Q H"]]


def attend_to_slots(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    queries: Visibility,
    slots: Visibility,
    num_filled: Int[Array, ""],
) -> Parts:
    """The weighted sum of values that each query sees, to be divided by the sum of the weights.

    The softmax is built up over blocks of slots, its largest score so far subtracted (Milakov and Gimelshein,
    https://arxiv.org/abs/1805.02867). Blocks in which nothing is filled are left out.

    Args:
      q: [B, Q, H, d].
      k, v: [B, K, S, d]; K divides H.
      queries, slots: visibility of both, with positions and segments, as `Visibility.mask` compares them.
      num_filled: slots from the first on that may be seen.

    Returns:
      float32: weighted sums [B, Q, H, d], sums of weights [B, Q, H] and largest scores [B, Q, H]. A query that sees
      none of these slots has weight 0 and the score -inf.
    """
    B, Q, H, d = q.shape
    K, S = k.shape[1], k.shape[2]
    G, block = H // K, min(BLOCK, S)
    q_BKNd = q.reshape(B, Q, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * Q, d)

    def add(start: jax.Array, total: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values, weights, largest = total
        # The last block begins early enough to be whole; slots of the block before it count there only.
        first = jnp.minimum(start * block, S - block)
        k_BKsd, v_BKsd = (jax.lax.dynamic_slice_in_dim(x, first, block, axis=2) for x in (k, v))
        sees_BQs = queries.mask(slots.slice(first, block)) & (first + jnp.arange(block) >= start * block)
        scores = jnp.einsum("BKNd,BKsd->BKNs", q_BKNd, k_BKsd, preferred_element_type=jnp.float32) * d**-0.5
        scores = jnp.where(sees_BQs[:, None, None], scores.reshape(B, K, G, Q, block), -jnp.inf)
        scores = scores.reshape(B, K, G * Q, block)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        shift = jnp.where(new_largest == -jnp.inf, 0, new_largest)  # -inf less itself is no number.
        fade, weight = jnp.exp(largest - shift), jnp.exp(scores - shift[..., None])
        added = jnp.einsum("BKNs,BKsd->BKNd", weight.astype(v.dtype), v_BKsd, preferred_element_type=jnp.float32)
        return values * fade[..., None] + added, weights * fade + weight.sum(axis=-1), new_largest

    zeros = jnp.zeros((B, K, G * Q, d), jnp.float32), jnp.zeros((B, K, G * Q), jnp.float32)
    start = (*zeros, jnp.full((B, K, G * Q), -jnp.inf))
    total = add(jnp.int32(0), start) if block == S else jax.lax.fori_loop(0, -(-num_filled // block), add, start)
    values, weights, largest = (x.reshape(B, K, G, Q, *x.shape[3:]) for x in total)
    weights, largest = (x.transpose(0, 3, 1, 2).reshape(B, Q, H) for x in (weights, largest))
    return values.transpose(0, 3, 1, 2, 4).reshape(B, Q, H, d), weights, largest


def combine(
    values: Float32[Array, "B Q H d"],
    weights: Float32[Array, "B Q H"],
    largest: Float32[Array, "B Q H"],
    over: str | None = None,
    scatter: bool = False,
) -> Float32[Array, "B q H d"]:
    """The output of attention from what the devices along an axis have of it.

    Args:
      values, weights, largest: as `attend_to_slots` returns them, of the slots of this device.
      over: the axis of the mesh; None: this device has all slots.
      scatter: each device gets its own Q / devices queries; else all get all.
    """
    if over is None:
        return values / weights[..., None]
    all_largest = jax.lax.pmax(largest, over)
    fade = jnp.exp(largest - all_largest)
    values, weights = values * fade[..., None], weights * fade
    if scatter:
        values, weights = (jax.lax.psum_scatter(x, over, scatter_dimension=1, tiled=True) for x in (values, weights))
    else:
        values, weights = jax.lax.psum((values, weights), over)
    return values / weights[..., None]
