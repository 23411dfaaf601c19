"""Attention under a `Visibility`, by the backend that suits the device, on any mesh.

Four backends compute the same function: "plain", the definition, which holds [Q, T] scores; "xla", blocks that leave
out what no query sees, for CPUs and wherever the kernels don't go; "splash", the Pallas kernel for TPUs; "cudnn", the
flash attention of NVIDIA's library. What a kernel can't express goes to "xla", with a line in the log.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from meap_jax import sharding
from meap_jax.model import attention_cudnn, attention_splash, attention_xla
from meap_jax.model.visibility import Visibility

_log = logging.getLogger(__name__)


def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    visibility: Visibility,
    implementation: str = "plain",
) -> Float[Array, "B T H d"]:
    """Grouped-query attention with float32 scores and softmax.

    On a mesh, rows lie over (data, fsdp), heads over `tensor` and the sequence of q, k, v and of the result over
    `context`, in zig-zag order (`sharding.zigzag`); `visibility` is always in the order of the text.

    Args:
      q: [B, T, H, d], any float dtype.
      k, v: [B, T, K, d]; K divides H, and kv head i serves the query heads i * H / K ... (i + 1) * H / K - 1.
      visibility: who sees whom; every query must see at least one key (its own position does).
      implementation: plain, xla, splash or cudnn.

    Returns:
      [B, T, H, d] in the dtype of q.
    """
    _check_rows(q, *visibility)
    mesh = jax.sharding.get_abstract_mesh()
    shards = sharding.shards_of(mesh, "context")
    reason = _why_not(implementation, q, visibility, shards)
    if reason:
        _log_once(f"attention: {implementation} does not take {reason}; xla does it")
        implementation = "xla"
    if sharding.is_trivial(mesh):
        out = _local(implementation, q, k, v, visibility)
    else:
        out = _sharded(implementation, mesh, q, k, v, visibility)
    return checkpoint_name(out, "attention")


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


def _check_rows(
    q: Float[Array, "B T H d"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    window: int | None,
    branch_ids: Int[Array, "B T"] | None,
) -> None:
    """The fields of a visibility as arguments, whose shapes are checked in tests as those of fields are not."""


def _local(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """On one device that has it all."""
    if implementation == "splash":
        kernel = attention_splash.kernel(q.shape[1], q.shape[2], visibility.window)
        return attention_splash.attend(kernel, q, k, v, visibility, visibility)
    if implementation == "cudnn":
        return attention_cudnn.attend(q, k, v, visibility)
    if implementation == "xla":
        return attention_xla.attend(q, k, v, visibility, visibility, start=0)
    return plain(q, k, v, visibility, visibility)


def _sharded(
    implementation: str, mesh: AbstractMesh, q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility
) -> jax.Array:
    """Every device attends with its own rows, heads and queries; keys and values are gathered over `context`."""
    T, H, K = q.shape[1], q.shape[2], k.shape[2]
    context, tensor = (sharding.shards_of(mesh, axis) for axis in ("context", "tensor"))
    rows = sharding.RULES["batch"]
    splits_kv = K % tensor == 0
    q_spec = PartitionSpec(rows, "context", "tensor")
    kv_spec = PartitionSpec(rows, "context", "tensor" if splits_kv else None)
    # A window is no array: it goes around the shard_map, not through it.
    arrays = visibility._replace(window=None)

    kernel, kernel_spec = None, None
    if implementation == "splash":
        kernel = attention_splash.kernel(T, H // tensor, visibility.window, context)
        kernel_spec = attention_splash.kernel_spec(kernel, mesh)

    def on_device(q: jax.Array, k: jax.Array, v: jax.Array, rows: Visibility, kernel: Any) -> jax.Array:
        visible = rows._replace(window=visibility.window)
        if not splits_kv:
            k, v = (_own_kv_heads(x, H, tensor) for x in (k, v))
        if context == 1 and kernel is None:
            return _local(implementation, q, k, v, visible)
        if context > 1:
            gathered = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
            k, v = (sharding.unzigzag(x, context) for x in gathered)
        if kernel is not None:
            return attention_splash.attend(kernel, q, k, v, _own_queries(visible, context), visible)
        # The two parts of the zig-zag: one lies in the front half of the text and sees no more than that, one behind.
        half = T // (2 * context)
        front, back = _parts(visible, context)
        keys = visible.part(0, T // 2)
        out = [
            _attend_part(implementation, q[:, :half], k[:, : T // 2], v[:, : T // 2], front, keys),
            _attend_part(implementation, q[:, half:], k, v, back, visible),
        ]
        return jnp.concatenate(out, axis=1)

    row_spec = jax.tree.map(lambda _: PartitionSpec(rows), arrays)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, row_spec, kernel_spec),
        out_specs=q_spec,
        check_vma=False,
    )(q, k, v, arrays, kernel)


def _attend_part(
    implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, queries: Visibility, keys: Visibility
) -> jax.Array:
    if implementation == "plain":
        return plain(q, k, v, queries, keys)
    return attention_xla.attend(q, k, v, queries, keys, start=None)


def _parts(visibility: Visibility, context: int) -> tuple[Visibility, Visibility]:
    """Of this device's queries, the front part and the back part of the zig-zag."""
    size = visibility.positions.shape[1] // (2 * context)
    own = jax.lax.axis_index("context")
    return visibility.part(own * size, size), visibility.part((2 * context - 1 - own) * size, size)


def _own_queries(visibility: Visibility, context: int) -> Visibility:
    """Both parts, one after the other."""
    if context == 1:
        return visibility
    front, back = _parts(visibility._replace(window=None), context)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), front, back)
    return both._replace(window=visibility.window)


def _own_kv_heads(x: jax.Array, num_heads: int, tensor: int) -> jax.Array:
    """The kv heads that this device's query heads need, where `tensor` doesn't divide the kv heads."""
    K, own_heads = x.shape[2], num_heads // tensor
    per_kv_head = num_heads // K
    first = jax.lax.axis_index("tensor") * own_heads
    if per_kv_head % own_heads == 0:  # All of them share one.
        return jax.lax.dynamic_slice_in_dim(x, first // per_kv_head, 1, axis=2)
    return jnp.take(x, (first + np.arange(own_heads)) // per_kv_head, axis=2)


def _why_not(implementation: str, q: jax.Array, visibility: Visibility, context: int) -> str | None:
    """What keeps a kernel from doing this, in words; None if nothing does."""
    checks: dict[str, Callable[..., str | None]] = {
        "splash": attention_splash.why_not,
        "cudnn": attention_cudnn.why_not,
    }
    return checks[implementation](q, visibility, context) if implementation in checks else None


@functools.cache
def _log_once(text: str) -> None:
    _log.warning(text)
