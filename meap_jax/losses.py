"""Token cross-entropy from hidden states, without ever holding all logits."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from meap_jax import sharding

_ROWS = PartitionSpec(sharding.RULES["batch"], "context")


def linear_cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    loss_weights: Float32[Array, "B T"],
    *,
    chunk_size: int = 2_048,
    z_loss: float = 0.0,
    num_tokens: int = 0,
) -> Float32[Array, ""]:
    """The weighted sum of cross-entropies of `x @ head`, `chunk_size` positions at a time.

    No more than [chunk_size, V] logits exist at once on a device, in float32. Where a gradient is asked for, that of a
    chunk is taken while its logits are there: the loss is a sum, so that its gradient is known up to one factor that
    comes later. That takes three products with the head where recomputing would take four.

    On a mesh, rows are split over (data, fsdp), positions over `context`, and the head over `fsdp` and, its vocabulary,
    over `tensor`; it is gathered over `fsdp` in the compute dtype. Positions may come in any order.

    Args:
      x: [B, T, D] hidden states, in the compute dtype.
      head: [D, V]; cast to the dtype of x. Its gradient is summed in float32.
      targets: [B, T] int, in [0, V).
      loss_weights: [B, T] float32, 0 where a target does not count; no gradient flows to them.
      chunk_size: positions of a device at a time; 0: all of them.
      z_loss: adds this times the square of log Z (PaLM, https://arxiv.org/abs/2204.02311, section 5: 1e-4).
      num_tokens: columns of the head from here on are padding and no part of Z; 0: all are part of it.

    Returns:
      float32 scalar in nats: sum of weights * (log Z - logit of the target + z_loss * log Z ** 2).
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_sharded, shards = not sharding.is_trivial(mesh), sharding.shards_of(mesh, "tensor")

    def on_device(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        how = _How(chunk_size, z_loss, num_tokens, is_sharded)
        loss = _summed(_flat(x), head, targets.ravel(), weights.ravel(), how)
        return loss[None] / shards if is_sharded else loss  # Every tensor shard has the loss of its rows.

    arrays = x, head, targets, loss_weights
    return _map_devices(on_device, PartitionSpec(sharding.AXES), *arrays).sum() if is_sharded else on_device(*arrays)


def token_losses(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk_size: int = 2_048,
    num_tokens: int = 0,
) -> Float32[Array, "B T"]:
    """The cross-entropy of every position of `x @ head`, in nats, `chunk_size` positions at a time.

    For evaluation: its gradient would hold all logits. Arguments and the mesh are as in `linear_cross_entropy`.
    """
    is_sharded = not sharding.is_trivial(jax.sharding.get_abstract_mesh())

    def on_device(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        flat = _token_losses(_flat(x), head, targets.ravel(), _How(chunk_size, 0.0, num_tokens, is_sharded))
        return flat.reshape(targets.shape)

    return _map_devices(on_device, _ROWS, x, head, targets) if is_sharded else on_device(x, head, targets)


def _map_devices(function: Callable, out_specs: PartitionSpec, *arrays: jax.Array) -> jax.Array:
    """Calls the function on every device of the mesh, with its own shards of hidden states, head, targets, ..."""
    in_specs = (_ROWS, PartitionSpec("fsdp", "tensor"), _ROWS, _ROWS)[: len(arrays)]
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


class _How(NamedTuple):
    """The options of a loss, and whether the head is sharded."""

    chunk_size: int
    z_loss: float
    num_tokens: int
    is_sharded: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(
    x: Float[Array, "N D"],
    head: Float[Array, "d v"],
    targets: Int[Array, " N"],
    weights: Float32[Array, " N"],
    how: _How,
) -> Float32[Array, ""]:
    """On one device, which holds d rows and v columns of the head: all of it, or a shard over (fsdp, tensor)."""
    return jnp.sum(_token_losses(x, head, targets, how) * weights)


def _token_losses(x: jax.Array, head: jax.Array, targets: jax.Array, how: _How) -> Float32[Array, " N"]:
    """Of every position [N], on one device as in `_summed`."""
    weight = _gathered(head.astype(x.dtype), how.is_sharded)

    def losses(chunk: tuple[jax.Array, ...]) -> jax.Array:
        x, targets = chunk
        return _losses(_logits(x, weight, how), targets, how)[0]

    return jax.lax.map(losses, _chunks(how.chunk_size, x, targets)).ravel()[: len(x)]


def _summed_fwd(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, how: _How
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    weight = _gathered(head.astype(x.dtype), how.is_sharded)

    def add(total: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        (loss, d_weight), (x, targets, weights) = total, chunk
        logits = _logits(x, weight, how)
        losses, log_z, is_target = _losses(logits, targets, how)
        probabilities = jnp.exp(logits - log_z[:, None])
        d_logits = (probabilities * (1 + 2 * how.z_loss * log_z)[:, None] - is_target) * weights[:, None]
        d_logits = d_logits.astype(x.dtype)
        d_x = d_logits @ weight.T
        d_weight += jnp.matmul(x.T, d_logits, preferred_element_type=jnp.float32)
        return (loss + jnp.sum(losses * weights), d_weight), d_x

    zero = jnp.float32(0), jnp.zeros(weight.shape, jnp.float32)
    (loss, d_head), d_x = jax.lax.scan(add, zero, _chunks(how.chunk_size, x, targets, weights))
    if how.is_sharded:
        d_head = jax.lax.psum_scatter(d_head, "fsdp", tiled=True)
    return loss, (_flat(d_x)[: len(x)], d_head.astype(head.dtype))


def _summed_bwd(how: _How, residuals: tuple[jax.Array, jax.Array], d_loss: jax.Array) -> tuple[jax.Array | None, ...]:
    d_x, d_head = residuals
    if how.is_sharded:  # Every shard of the vocabulary returned the loss, so their gradients add up.
        d_loss = jax.lax.psum(d_loss, "tensor")
    return (d_loss * d_x).astype(d_x.dtype), (d_loss * d_head).astype(d_head.dtype), None, None


_summed.defvjp(_summed_fwd, _summed_bwd)


def _gathered(head: Float[Array, "d v"], is_sharded: bool) -> Float[Array, "D v"]:
    return jax.lax.all_gather(head, "fsdp", tiled=True) if is_sharded else head


def _logits(x: Float[Array, "N D"], weight: Float[Array, "D v"], how: _How) -> Float32[Array, "N v"]:
    logits = jnp.matmul(x, weight, preferred_element_type=jnp.float32)
    if not how.num_tokens:
        return logits
    return jnp.where(_first(logits, how) + jnp.arange(logits.shape[-1]) < how.num_tokens, logits, -jnp.inf)


def _first(logits: Float32[Array, "N v"], how: _How) -> Int[Array, ""]:
    """The id of this device's first column."""
    return jax.lax.axis_index("tensor") * logits.shape[-1] if how.is_sharded else jnp.int32(0)


def _losses(
    logits: Float32[Array, "N v"], targets: Int[Array, " N"], how: _How
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [N], log Z [N], and [N, v] where the targets are; sums go over the shards of the vocabulary."""
    first, largest = _first(logits, how), logits.max(axis=-1)
    if how.is_sharded:
        largest = jax.lax.pmax(largest, "tensor")
    total = jnp.exp(logits - largest[:, None]).sum(axis=-1)
    # A comparison instead of a gather: it stays local where the vocabulary is sharded.
    is_target = (targets - first)[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    chosen = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    if how.is_sharded:
        total, chosen = jax.lax.psum((total, chosen), "tensor")
    log_z = largest + jnp.log(total)
    return log_z - chosen + how.z_loss * jnp.square(log_z), log_z, is_target


def _flat(x: Float[Array, "A B D"]) -> Float[Array, "A*B D"]:
    return x.reshape(-1, x.shape[-1])


def _chunks(chunk_size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[N, ...] as [number of chunks, size, ...], filled up with zeros (weight 0)."""
    N = len(arrays[0])
    num = math.ceil(N / chunk_size) if chunk_size else 1
    size = math.ceil(N / num)
    padded = (jnp.pad(x, ((0, num * size - N), *((0, 0),) * (x.ndim - 1))) for x in arrays)
    return tuple(x.reshape(num, size, *x.shape[1:]) for x in padded)
