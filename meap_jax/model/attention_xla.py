"""Attention in plain XLA that never does the work of keys that no query sees, and holds one block of scores at a time.

For CPUs, where it beats `jax.nn.dot_product_attention` several times over (docs/performance.md), and for what the
kernels of TPU and GPU don't express.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meap_jax.model.visibility import Visibility

SMALLEST_BLOCK = 128  # Queries a block: fewer would leave the matrix units idle.
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
    k_BKTd, v_BKTd = k.swapaxes(1, 2), v.swapaxes(1, 2)

    # A window is no array: it goes around the maps, not through them.
    attend_head = functools.partial(_attend_head, window=queries.window, start=start)

    # Row by row and kv head by kv head: what is alive fits into caches.
    def row(item: tuple) -> Float[Array, "K G Q d"]:
        q_KGQd, k_KTd, v_KTd, *sides = item
        return jax.lax.map(lambda head: attend_head(*head, *sides), (q_KGQd, k_KTd, v_KTd))

    sides = (side._replace(window=None) for side in (queries, keys))
    out_BKGQd = jax.lax.map(row, (q_BKGQd, k_BKTd, v_BKTd, *sides))
    return out_BKGQd.transpose(0, 3, 1, 2, 4).reshape(B, Q, H, d)


def _attend_head(
    q_GQd: jax.Array,
    k_Td: jax.Array,
    v_Td: jax.Array,
    queries: Visibility,
    keys: Visibility,
    *,
    window: int | None,
    start: int | None,
) -> jax.Array:
    """G query heads of one row that share one kv head; the visibility has no axis B."""
    Q, T = q_GQd.shape[1], k_Td.shape[0]
    size = max(SMALLEST_BLOCK, -(-Q // MOST_BLOCKS))
    out = []
    for first in range(0, Q, size):
        last = min(first + size, Q)
        reach = T if start is None else start + last
        ours, theirs = _row(queries, first, last), _row(keys, 0, reach)
        out.append(_attend_block(q_GQd[:, first:last], k_Td[:reach], v_Td[:reach], ours, theirs, window))
    return jnp.concatenate(out, axis=1)


@functools.partial(jax.checkpoint, static_argnums=5)
def _attend_block(
    q_Gqd: jax.Array, k_Td: jax.Array, v_Td: jax.Array, queries: Visibility, keys: Visibility, window: int | None
) -> jax.Array:
    """Q queries of G heads over T keys; its weights are computed again in the backward pass, block by block."""
    G, Q, d = q_Gqd.shape
    sees_qT = queries._replace(window=window).mask(keys)[0]
    scores = jnp.einsum("gd,td->gt", q_Gqd.reshape(-1, d), k_Td, preferred_element_type=jnp.float32)
    scores = jnp.where(sees_qT, scores.reshape(G, Q, -1) * d**-0.5, -jnp.inf)
    # Softmax times values. The sum of the weights comes in last, where a query has d numbers and not T, and as a
    # factor: XLA turns a quotient into one in the program for one device, but not everywhere in that for several.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    inverse = 1 / weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v_Td.dtype).reshape(G * Q, -1)
    weighted = jnp.matmul(weights, v_Td, preferred_element_type=jnp.float32).reshape(q_Gqd.shape)
    return (weighted * inverse).astype(v_Td.dtype)


def _row(side: Visibility, first: int, last: int) -> Visibility:
    """Positions first ... last - 1 of a visibility without an axis B, as one of a single row."""
    return jax.tree.map(lambda x: x[None, first:last], side)
