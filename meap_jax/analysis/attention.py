"""Attention weights of a decoder, reduced to numbers a layer and a block of queries at a time.

What is held at once is [B, H, block, T] of one layer: weights of all its queries, [H, T, T], never are, let alone those
of all layers. Names carry shapes: B rows, T keys, q queries of a block, H heads, K kv heads, G = H / K, d head_dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from meap_jax import sharding
from meap_jax.model.decoder import Definition, Look, Params
from meap_jax.model.layers import Block, HasWindow
from meap_jax.model.visibility import Visibility, causal

BLOCK = 128  # Queries whose weights exist at a time.

# How the first token of a row is treated; an axis [2] of every result. A trained decoder lets many heads rest on it (an
# attention sink), so that it can decide a mean or a variance by itself.
# with: as the model computes.
# without: it is no key at all. The other weights of a query are divided by their sum; a query that saw no other key
# (the first token's own) takes part in nothing.
FIRST_TOKEN = ("with", "without")

# What `masked_key_statistics` gives of each head. "A key's attention" is the mean of the weights that it gets from all
# queries that see it: under a causal mask the key at j is seen by T - j of T queries.
QUANTITIES = {
    "masked_per_key": "mean over masked keys of a key's attention",
    "masked_pooled": "mean weight over all pairs of a query and a masked key that it sees",
    "unmasked_per_key": "mean over unmasked keys of a key's attention",
    "unmasked_pooled": "mean weight over all pairs of a query and an unmasked key that it sees",
    "variance_between_keys": "variance, over unmasked keys, of a key's attention",
    "variance_pooled": "variance of the weights over all pairs of a query and an unmasked key that it sees",
    "variance_within_query": "variance of a query's weights over the unmasked keys that it sees, mean over the "
    "queries that see two or more",
    "first_token": "the first token's attention; 0 without it",
}

# Which keys each query of a block sees: (the first query, their number) -> [B, q, T].
Sees = Callable[[Any, int], Bool[Array, "B q T"]]


# -------------------------------------------------------------------------------------------------------------- weights


def attention_weights(
    q_BqHd: Float[Array, "B q H d"], k_BTKd: Float[Array, "B T K d"], sees_BqT: Bool[Array, "B q T"]
) -> Float32[Array, "B H q T"]:
    """Softmax of q k / sqrt(d) over the keys that are seen, in float32; all 0 for a query that sees none.

    Args:
      q_BqHd: queries with RoPE; kv head i serves the query heads i * G ... (i + 1) * G - 1.
      k_BTKd: keys with RoPE.
      sees_BqT: which keys each query sees.
    """
    B, q, H, d = q_BqHd.shape
    K = k_BTKd.shape[2]
    grouped = q_BqHd.reshape(B, q, K, H // K, d)
    scores = jnp.einsum("BqKGd,BTKd->BKGqT", grouped, k_BTKd, preferred_element_type=jnp.float32) * d**-0.5
    scores_BHqT = jnp.where(sees_BqT[:, None], scores.reshape(B, H, q, -1), -jnp.inf)
    largest = scores_BHqT.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores_BHqT - jnp.where(jnp.isfinite(largest), largest, 0))
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1)  # A sum is 0, or 1 (of the largest) and more.


def look_of(visibility: Visibility, window: int, reduce: Callable[[jax.Array, jax.Array, Sees], Any]) -> Look:
    """What `Decoder.observe` takes: calls `reduce` with a layer's queries, keys and who sees whom.

    Args:
      visibility: of the rows, without a window.
      window: of the layers that have one.
      reduce: (q [B, T, H, d], k [B, T, K, d], sees) -> a pytree of arrays.
    """

    def look(layer: Block, x_BTD: jax.Array, has_window: HasWindow) -> Any:
        q_BTHd, k_BTKd = layer.attn.queries_and_keys(layer.attn_norm(x_BTD), visibility.angles_at)
        q_BTHd = sharding.constrain(q_BTHd, "batch", None, "heads", None)

        def sees(start: Any, size: int) -> Bool[Array, "B q T"]:
            queries = visibility.slice(start, size)
            if has_window is False:
                return queries.mask(visibility)
            near = dataclasses.replace(queries, window=window).mask(visibility)
            return near if has_window is True else jnp.where(has_window, near, queries.mask(visibility))

        return reduce(q_BTHd, k_BTKd, sees)

    return look


def over_blocks(
    q_BTHd: Float[Array, "B T H d"],
    k_BTKd: Float[Array, "B T K d"],
    sees: Sees,
    views_BVT: Bool[Array, "B V T"],
    block: int,
    keep: Callable[[jax.Array, jax.Array], Any] = lambda weights, sees: None,
) -> list[tuple[Float32[Array, "B H V T"], Float32[Array, "B V T"], Any]]:
    """Walks through the queries block by block, once for each case of `FIRST_TOKEN`.

    Args:
      q_BTHd, k_BTKd: of one layer.
      sees: who sees whom.
      views_BVT: V sets of queries from whose side keys are looked at.
      block: queries at a time.
      keep: (weights [B, H, q, T], sees [B, q, T]) -> what is kept of each query, [..., q] each.

    Returns:
      For each case: each key's attention in each view, which is its mean weight over the view's queries that see it, 0
      if none does; how many do; and what is kept of the queries, [..., N * block], where a query that a block shares
      with the block before it sees nothing the second time.
    """
    B, T, H, _ = q_BTHd.shape
    V, block = views_BVT.shape[1], min(block, T)
    begins = jnp.arange(0, T, block)
    starts = jnp.minimum(begins, T - block)  # The last block is whole, too: it may start before it begins.

    def step(sums: list[Any], at: tuple[jax.Array, jax.Array]) -> tuple[list[Any], list[Any]]:
        start, begin = at
        q_BqHd = jax.lax.dynamic_slice_in_dim(q_BTHd, start, block, axis=1)
        views_BVq = jax.lax.dynamic_slice_in_dim(views_BVT, start, block, axis=2).astype(jnp.float32)
        is_new = start + jnp.arange(block) >= begin
        with_BqT = sees(start, block) & is_new[:, None]
        kept = []
        for case, sees_BqT in enumerate((with_BqT, with_BqT.at[:, :, 0].set(False))):
            weights_BHqT = attention_weights(q_BqHd, k_BTKd, sees_BqT)
            received_BHVT, queries_BVT = sums[case]
            received_BHVT += _sum_of("BVq,BHqT->BHVT", views_BVq, weights_BHqT)
            queries_BVT += _sum_of("BVq,BqT->BVT", views_BVq, sees_BqT.astype(jnp.float32))
            sums[case] = received_BHVT, queries_BVT
            kept.append(keep(weights_BHqT, sees_BqT))
        return sums, kept

    nothing = jnp.zeros((B, H, V, T)), jnp.zeros((B, V, T))
    sums, kept = jax.lax.scan(step, [nothing for _ in FIRST_TOKEN], (starts, begins))
    return [
        (ratio(received_BHVT, queries_BVT[:, None]), queries_BVT, jax.tree.map(_joined, of_queries))
        for (received_BHVT, queries_BVT), of_queries in zip(sums, kept, strict=True)
    ]


def _sum_of(product: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(product, a, b, precision=jax.lax.Precision.HIGHEST)


def _joined(blocks: Float32[Array, "N *lead q"]) -> Float32[Array, "*lead Nq"]:
    """What is kept of the queries of N blocks, side by side."""
    x = jnp.moveaxis(blocks, 0, -2)
    return x.reshape(*x.shape[:-2], -1)


def ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    """Total over count, 0 where there is nothing to count."""
    return total / jnp.maximum(count, 1)


# ---------------------------------------------------------------------------------------------------------- masked keys


class OfQueries(NamedTuple):
    """What is kept of each query: its weights at masked and at unmasked keys."""

    masked_sum: Float32[Array, "B H q"]
    num_masked: Float32[Array, "B 1 q"]
    mean: Float32[Array, "B H q"]  # Over the unmasked keys that it sees, as the next two.
    variance: Float32[Array, "B H q"]
    num_unmasked: Float32[Array, "B 1 q"]


def reduce_masked_keys(
    q_BTHd: Float[Array, "B T H d"],
    k_BTKd: Float[Array, "B T K d"],
    sees: Sees,
    is_masked_BT: Bool[Array, "B T"],
    block: int = BLOCK,
) -> dict[str, Float32[Array, "B H 2"]]:
    """The numbers of `QUANTITIES` of one layer; the last axis is `FIRST_TOKEN`. Variances are those of a population."""

    def keep(weights_BHqT: Float32[Array, "B H q T"], sees_BqT: Bool[Array, "B q T"]) -> OfQueries:
        masked, unmasked = ((sees_BqT & keys_BT[:, None])[:, None] for keys_BT in (is_masked_BT, ~is_masked_BT))
        num = unmasked.sum(axis=-1, dtype=jnp.float32)
        mean = ratio(jnp.where(unmasked, weights_BHqT, 0).sum(axis=-1), num)
        squares = jnp.where(unmasked, jnp.square(weights_BHqT - mean[..., None]), 0)
        return OfQueries(
            masked_sum=jnp.where(masked, weights_BHqT, 0).sum(axis=-1),
            num_masked=masked.sum(axis=-1, dtype=jnp.float32),
            mean=mean,
            variance=ratio(squares.sum(axis=-1), num),
            num_unmasked=num,
        )

    every_B1T = jnp.ones_like(is_masked_BT)[:, None]
    cases = over_blocks(q_BTHd, k_BTKd, sees, every_B1T, block, keep)
    found = [_numbers(attention[:, :, 0], queries > 0, kept, is_masked_BT) for attention, queries, kept in cases]
    return {name: jnp.stack([case[name] for case in found], axis=-1) for name in QUANTITIES}


def _numbers(
    attention_BHT: Float32[Array, "B H T"],
    is_key_B1T: Bool[Array, "B 1 T"],
    kept: OfQueries,
    is_masked_BT: Bool[Array, "B T"],
) -> dict[str, Float32[Array, "B H"]]:
    masked, unmasked = (is_key_B1T & keys[:, None] for keys in (is_masked_BT, ~is_masked_BT))

    def over(keys: jax.Array, values: jax.Array) -> jax.Array:
        return ratio(jnp.where(keys, values, 0).sum(axis=-1), keys.sum(axis=-1))

    per_key = over(unmasked, attention_BHT)
    num = kept.num_unmasked.sum(axis=-1)
    pooled = ratio((kept.num_unmasked * kept.mean).sum(axis=-1), num)
    # The law of total variance: within queries, and between their means.
    around = kept.variance + jnp.square(kept.mean - pooled[..., None])
    return {
        "masked_per_key": over(masked, attention_BHT),
        "masked_pooled": ratio(kept.masked_sum.sum(axis=-1), kept.num_masked.sum(axis=-1)),
        "unmasked_per_key": per_key,
        "unmasked_pooled": pooled,
        "variance_between_keys": over(unmasked, jnp.square(attention_BHT - per_key[..., None])),
        "variance_pooled": ratio((kept.num_unmasked * around).sum(axis=-1), num),
        "variance_within_query": over(kept.num_unmasked >= 2, kept.variance),
        "first_token": attention_BHT[..., 0],
    }


def observe(definition: Definition, params: Params, tokens_BT: jax.Array, look: Look) -> Any:
    """What a look finds in every layer of causal rows, stacked [num_layers, ...], whole on every device."""
    found = definition.decoder(params).observe(tokens_BT, causal(tokens_BT), look)
    return jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), found)


@functools.partial(jax.jit, static_argnames=("definition", "block"))
def masked_key_statistics(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    is_masked_BT: Bool[Array, "B T"],
    *,
    definition: Definition,
    block: int = BLOCK,
) -> dict[str, Float32[Array, "L B H 2"]]:
    """Attention at masked and at unmasked keys, for Table 10 of the paper, of every layer and head.

    Args:
      params: of a decoder whose layers are stacked.
      tokens_BT: int32, clean or with [MASK] in the gaps.
      is_masked_BT: the gaps; the same for the clean row and the masked one.
      definition: of the decoder.
      block: queries whose weights exist at a time.

    Returns:
      {name in `QUANTITIES`: [num_layers, B, H, 2]}, float32; the last axis is `FIRST_TOKEN`.
    """
    look = look_of(
        causal(tokens_BT),
        definition.config.window,
        lambda q, k, sees: reduce_masked_keys(q, k, sees, is_masked_BT, block),
    )
    return observe(definition, params, tokens_BT, look)
