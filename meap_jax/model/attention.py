"""Attention under a `Visibility`, by the backend that suits the device, on any mesh.

Four backends compute the same function: "plain", the definition, which holds [Q, T] scores; "xla", blocks that leave
out what no query sees, for CPUs and wherever the kernels don't go; "splash", the Pallas kernel for TPUs; "cudnn", the
flash attention of NVIDIA's library. What a kernel can't express goes to "xla", with a line in the log.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from meap_jax import sharding
from meap_jax.model import attention_cudnn, attention_splash, attention_xla
from meap_jax.model.visibility import Visibility

_log = logging.getLogger(__name__)


def attention(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    queries: Visibility,
    keys: Visibility | None = None,
    implementation: str = "plain",
) -> Float[Array, "B Q H d"]:
    """Grouped-query attention with float32 scores and softmax.

    On a mesh, rows are split over (data, fsdp) and heads over `tensor`. Where queries and keys are the same row, the
    sequence of q, k, v and of the result is split over `context`, in zig-zag order (`sharding.zigzag`); where keys are
    given, every device of `context` holds it whole. A visibility is always whole and in the order of the text.

    Args:
      q: [B, Q, H, d], any float dtype.
      k, v: [B, T, K, d]; K divides H, and kv head i serves the query heads i * H / K ... (i + 1) * H / K - 1.
      queries: the queries' side of the visibility; every query must see at least one key.
      keys: the keys' side; the queries' window holds. None: queries and keys are the same row, and T is Q.
      implementation: plain, xla, splash or cudnn; the last two take no keys apart.

    Returns:
      [B, Q, H, d] in the dtype of q.
    """
    _check_side(q, **vars(queries))
    _check_side(k, **vars(queries if keys is None else keys))
    mesh = jax.sharding.get_abstract_mesh()
    reason = _why_not(implementation, q, queries, keys, sharding.shards_of(mesh, "context"))
    if reason:
        _log_once(f"attention: {implementation} does not take {reason}; xla does it")
        implementation = "xla"
    attend = _local if sharding.is_trivial(mesh) else _sharded
    return checkpoint_name(attend(implementation, q, k, v, queries, keys), "attention")


def plain(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    queries: Visibility,
    keys: Visibility,
) -> Float[Array, "B Q H d"]:
    """The definition: all scores at once, in float32."""
    B, Q, H, d = q.shape
    K = k.shape[2]
    q_BQKGd = q.reshape(B, Q, K, H // K, d)
    scores = jnp.einsum("BQKGd,BTKd->BKGQT", q_BQKGd, k, preferred_element_type=jnp.float32) * d**-0.5
    scores = jnp.where(queries.mask(keys)[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGQT,BTKd->BQKGd", weights, v).reshape(B, Q, H, d)


def _check_side(
    x: Float[Array, "B T N d"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    window: int | None,
    branch_ids: Int[Array, "B T"] | None,
    rope_positions: Int[Array, "B T"] | None,
    forgotten: Bool[Array, "B T"] | None,
) -> None:
    """The fields of a visibility as arguments, whose shapes are checked in tests as those of fields are not."""


def _local(
    implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, queries: Visibility, keys: Visibility | None
) -> jax.Array:
    """Attention of arrays that are whole on this device."""
    if implementation == "splash":
        kernel = attention_splash.kernel(q.shape[1], q.shape[2], queries.window)
        return attention_splash.attend(kernel, q, k, v, queries, queries)
    if implementation == "cudnn":
        return attention_cudnn.attend(q, k, v, queries)
    start, keys = (0, queries) if keys is None else (None, keys)
    if implementation == "xla":
        return attention_xla.attend(q, k, v, queries, keys, start=start)
    return plain(q, k, v, queries, keys)


def _sharded(
    implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, queries: Visibility, keys: Visibility | None
) -> jax.Array:
    """Every device attends with its own rows, heads and queries; keys and values are gathered over `context`."""
    mesh, T, H, K = jax.sharding.get_abstract_mesh(), q.shape[1], q.shape[2], k.shape[2]
    tensor = sharding.shards_of(mesh, "tensor")
    sequence = "context" if keys is None else None
    context = sharding.shards_of(mesh, sequence) if sequence else 1
    rows = sharding.RULES["batch"]
    splits_kv = K % tensor == 0
    q_spec = PartitionSpec(rows, sequence, "tensor")
    kv_spec = PartitionSpec(rows, sequence, "tensor" if splits_kv else None)
    kernel, kernel_spec = None, None
    if implementation == "splash":
        kernel = attention_splash.kernel(T, H // tensor, queries.window, context)
        kernel_spec = attention_splash.kernel_spec(kernel, mesh)

    def on_device(
        q: jax.Array, k: jax.Array, v: jax.Array, queries: Visibility, keys: Visibility | None, kernel: Any
    ) -> jax.Array:
        if not splits_kv:
            k, v = (own_kv_heads(x, H, tensor) for x in (k, v))
        if context == 1 and kernel is None:
            return _local(implementation, q, k, v, queries, keys)
        if context > 1:
            gathered = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
            k, v = (sharding.unzigzag(x, context) for x in gathered)
        if kernel is not None:
            return attention_splash.attend(kernel, q, k, v, _own_queries(queries, context), queries)
        # A device has a chunk of the front half of the text, which sees no more than that half, and one of the back.
        half = T // (2 * context)
        front, back = _chunks(queries, context)
        first = queries.slice(0, T // 2)
        out = [
            _local(implementation, q[:, :half], k[:, : T // 2], v[:, : T // 2], front, first),
            _local(implementation, q[:, half:], k, v, back, queries),
        ]
        return jnp.concatenate(out, axis=1)

    side_specs = jax.tree.map(lambda _: PartitionSpec(rows), (queries, keys))
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, *side_specs, kernel_spec),
        out_specs=q_spec,
        check_vma=False,
    )(q, k, v, queries, keys, kernel)


def _chunks(visibility: Visibility, context: int) -> tuple[Visibility, Visibility]:
    """The two chunks of this device's queries in the zig-zag: one of the front half of the text, one of the back."""
    size = visibility.positions.shape[1] // (2 * context)
    own = jax.lax.axis_index("context")
    return visibility.slice(own * size, size), visibility.slice((2 * context - 1 - own) * size, size)


def _own_queries(visibility: Visibility, context: int) -> Visibility:
    """The visibility of this device's queries."""
    if context == 1:
        return visibility
    return jax.tree.map(lambda *chunks: jnp.concatenate(chunks, axis=1), *_chunks(visibility, context))


def own_kv_heads(x: jax.Array, num_heads: int, tensor: int, axis: int = 2) -> jax.Array:
    """The kv heads that this device's query heads need, where `tensor` doesn't divide the kv heads."""
    K, own_heads = x.shape[axis], num_heads // tensor
    per_kv_head = num_heads // K
    first = jax.lax.axis_index("tensor") * own_heads
    if per_kv_head % own_heads == 0:  # All of them share one.
        return jax.lax.dynamic_slice_in_dim(x, first // per_kv_head, 1, axis=axis)
    return jnp.take(x, (first + np.arange(own_heads)) // per_kv_head, axis=axis)


def _why_not(
    implementation: str, q: jax.Array, queries: Visibility, keys: Visibility | None, context: int
) -> str | None:
    """What keeps a kernel from doing this, in words; None if nothing does."""
    kernels = {"splash": attention_splash, "cudnn": attention_cudnn}
    if implementation in kernels and keys is not None:
        return "keys apart from the queries"
    return kernels[implementation].why_not(q, queries, context) if implementation in kernels else None


@functools.cache
def _log_once(text: str) -> None:
    _log.warning(text)
