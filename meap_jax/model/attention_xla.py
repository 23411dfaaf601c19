"""Attention in plain XLA that skips keys that no query sees, and holds one block of scores at a time.

For CPUs, where it beats `jax.nn.dot_product_attention` several times over (docs/performance.md), and for what the
kernels of TPU and GPU don't express.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32

from meap_jax.model.visibility import Visibility

SMALLEST_BLOCK = 64  # Queries a block: what is alive of it fits into a core's cache, and fewer gain nothing.
MOST_BLOCKS = 32  # Blocks are unrolled: more would take longer to compile than they save.


def attend(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    queries: Visibility,
    keys: Visibility,
    *,
    start: int | None,
) -> Float[Array, "B Q H d"]:
    """Attention of Q queries over T keys.

    Args:
      q, k, v: as in `meap_jax.model.attention.attention`.
      queries, keys: their sides of the visibility.
      start: the place of the first query among the keys; None if it is known only on the device, and then no key is
        left out.

    Returns:
      [B, Q, H, d] in the dtype of q.
    """
    B, Q, H, d = q.shape
    K = k.shape[2]
    q_BKGQd = q.reshape(B, Q, K, H // K, d).transpose(0, 2, 3, 1, 4)
    out_BKGQd = _attend(q_BKGQd, k.swapaxes(1, 2), v.swapaxes(1, 2), queries, keys, start)
    return out_BKGQd.transpose(0, 3, 1, 2, 4).reshape(B, Q, H, d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q_BKGQd: jax.Array, k_BKTd: jax.Array, v_BKTd: jax.Array, queries: Visibility, keys: Visibility, start: int | None
) -> Float[Array, "B K G Q d"]:
    """The gradient is written out: it computes the weights again, block by block, and nothing else.

    Left to JAX it multiplies the values again, too, to learn how the sum of the weights moves. That is known from the
    output (FlashAttention, https://arxiv.org/abs/2205.14135, appendix B.2).
    """
    return _attend_fwd(q_BKGQd, k_BKTd, v_BKTd, queries, keys, start)[0]


def _attend_fwd(
    q_BKGQd: jax.Array, k_BKTd: jax.Array, v_BKTd: jax.Array, queries: Visibility, keys: Visibility, start: int | None
) -> tuple[jax.Array, tuple]:
    def head(
        q_GQd: jax.Array, k_Td: jax.Array, v_Td: jax.Array, queries: Visibility, keys: Visibility
    ) -> tuple[jax.Array, jax.Array]:
        done = [
            _block(q_GQd[:, block], k_Td[:reach], v_Td[:reach], _mask(queries, keys, block, reach))
            for block, reach in _blocks(q_GQd.shape[1], k_Td.shape[0], start)
        ]
        out, inverse = zip(*done, strict=True)
        return jnp.concatenate(out, axis=1), jnp.concatenate(inverse, axis=1)

    out_BKGQd, inverse_BKGQ = _by_head(head, (q_BKGQd, k_BKTd, v_BKTd), (queries, keys))
    # Both have the name of attention's output, so that `decoder.remat` keeps both.
    out_BKGQd, inverse_BKGQ = (checkpoint_name(x, "attention") for x in (out_BKGQd, inverse_BKGQ))
    return out_BKGQd, (q_BKGQd, k_BKTd, v_BKTd, queries, keys, out_BKGQd, inverse_BKGQ)


def _attend_bwd(start: int | None, residuals: tuple, d_out_BKGQd: jax.Array) -> tuple:
    q_BKGQd, k_BKTd, v_BKTd, queries, keys, out_BKGQd, inverse_BKGQ = residuals
    # The gradient in the output before it was divided by the sum of the weights, and in that sum.
    d_weighted_BKGQd = d_out_BKGQd * inverse_BKGQ[..., None]
    d_sum_BKGQ = -jnp.sum(out_BKGQd * d_weighted_BKGQd, axis=-1)

    def head(
        q_GQd: jax.Array,
        k_Td: jax.Array,
        v_Td: jax.Array,
        d_weighted_GQd: jax.Array,
        d_sum_GQ: jax.Array,
        queries: Visibility,
        keys: Visibility,
    ) -> tuple[jax.Array, ...]:
        d_q, d_k, d_v = [], jnp.zeros(k_Td.shape, jnp.float32), jnp.zeros(v_Td.shape, jnp.float32)
        for block, reach in _blocks(q_GQd.shape[1], k_Td.shape[0], start):
            sees_qT = _mask(queries, keys, block, reach)
            d_q_block, d_k_block, d_v_block = _block_gradients(
                q_GQd[:, block], k_Td[:reach], v_Td[:reach], d_weighted_GQd[:, block], d_sum_GQ[:, block], sees_qT
            )
            d_q.append(d_q_block)
            d_k, d_v = d_k.at[:reach].add(d_k_block), d_v.at[:reach].add(d_v_block)
        return jnp.concatenate(d_q, axis=1), d_k.astype(k_Td.dtype), d_v.astype(v_Td.dtype)

    arrays = (q_BKGQd, k_BKTd, v_BKTd, d_weighted_BKGQd.astype(v_BKTd.dtype), d_sum_BKGQ)
    return (*_by_head(head, arrays, (queries, keys)), None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _by_head(
    function: Callable[..., tuple[jax.Array, ...]], arrays: tuple[jax.Array, ...], sides: tuple[Visibility, Visibility]
) -> tuple[jax.Array, ...]:
    """Row by row [B, ...] and kv head by kv head [K, ...]: what is alive fits into caches."""

    def row(item: tuple) -> tuple[jax.Array, ...]:
        arrays, sides = item
        return jax.lax.map(lambda head: function(*head, *sides), arrays)

    return jax.lax.map(row, (arrays, sides))


def _blocks(Q: int, T: int, start: int | None) -> list[tuple[slice, int]]:
    """Blocks of queries; with each, how many keys it reaches to."""
    size = max(SMALLEST_BLOCK, -(-Q // MOST_BLOCKS))
    blocks = [slice(first, min(first + size, Q)) for first in range(0, Q, size)]
    return [(block, T if start is None else start + block.stop) for block in blocks]


def _mask(queries: Visibility, keys: Visibility, block: slice, reach: int) -> Bool[Array, "q T"]:
    """Which of the first `reach` keys the queries of a block see, in a visibility without an axis B."""
    ours = jax.tree.map(lambda x: x[None, block], queries)
    theirs = jax.tree.map(lambda x: x[None, :reach], keys)
    return ours.mask(theirs)[0]


def _block(
    q_Gqd: jax.Array, k_Td: jax.Array, v_Td: jax.Array, sees_qT: jax.Array
) -> tuple[Float[Array, "G q d"], Float32[Array, "G q"]]:
    """Of q queries of G heads over T keys: their output, and 1 over the sum of their weights."""
    weights_GqT = _weights(q_Gqd, k_Td, sees_qT)
    # The sum comes in last, where a query has d numbers and not T, and as a factor: XLA turns a quotient into one in
    # the program for one device, but not everywhere in that for several.
    inverse_Gq = 1 / weights_GqT.sum(axis=-1)
    weighted = _product(_flat(weights_GqT).astype(v_Td.dtype), v_Td).reshape(q_Gqd.shape)
    return (weighted * inverse_Gq[..., None]).astype(v_Td.dtype), inverse_Gq


def _block_gradients(
    q_Gqd: jax.Array,
    k_Td: jax.Array,
    v_Td: jax.Array,
    d_weighted_Gqd: jax.Array,
    d_sum_Gq: jax.Array,
    sees_qT: jax.Array,
) -> tuple[Float[Array, "G q d"], Float32[Array, "T d"], Float32[Array, "T d"]]:
    """Gradients in q, k and v."""
    q_nd, d_weighted_nd = _flat(q_Gqd), _flat(d_weighted_Gqd)
    weights_GqT = _weights(q_Gqd, k_Td, sees_qT)
    d_weights_GqT = _product(d_weighted_nd, v_Td.T).reshape(weights_GqT.shape) + d_sum_Gq[..., None]
    d_scores_nT = _flat(weights_GqT * d_weights_GqT * _scale(q_Gqd)).astype(q_Gqd.dtype)
    d_q = _product(d_scores_nT, k_Td).reshape(q_Gqd.shape).astype(q_Gqd.dtype)
    d_v = _product(_flat(weights_GqT).astype(v_Td.dtype).T, d_weighted_nd)
    return d_q, _product(d_scores_nT.T, q_nd), d_v


def _weights(q_Gqd: jax.Array, k_Td: jax.Array, sees_qT: jax.Array) -> Float32[Array, "G q T"]:
    """exp(score - the query's largest): the softmax but for its sum."""
    scores_nT = _product(_flat(q_Gqd), k_Td.T)
    scores_GqT = jnp.where(sees_qT, scores_nT.reshape(-1, *sees_qT.shape) * _scale(q_Gqd), -jnp.inf)
    return jnp.exp(scores_GqT - scores_GqT.max(axis=-1, keepdims=True))


def _scale(q_Gqd: jax.Array) -> float:
    return q_Gqd.shape[-1] ** -0.5


def _flat(x: Float[Array, "G q x"]) -> Float[Array, "G*q x"]:
    return x.reshape(-1, x.shape[-1])


def _product(a: Float[Array, "n m"], b: Float[Array, "m k"]) -> Float32[Array, "n k"]:
    """As one 2-D matmul, XLA's fastest form on CPU; summed in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
