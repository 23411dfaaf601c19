"""TPU attention: JAX's Pallas splash kernel, which skips blocks that no query sees and never repeats a key."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from meap_jax import sharding
from meap_jax.model.visibility import Visibility

LANES = 128  # Of a TPU's vector unit: blocks are multiples of it.
LARGEST_BLOCK = 512  # As maxtext sets by default on v5e, v5p and v6e.
INTERPRET = False  # True: by Pallas' interpreter, where there is no TPU; tests set it.


def why_not(q: jax.Array, visibility: Visibility, context: int) -> str | None:
    """What this kernel can't express of a call, in words; None if it can do it."""
    if visibility.branch_ids is not None:
        return "branches"
    if visibility.forgotten is not None:
        return "forgotten keys"
    if (q.shape[1] // context) % LANES:
        return f"{q.shape[1] // context} queries a device, which is no multiple of {LANES}"
    return None


def kernel(seq_len: int, num_heads: int, window: int | None, context: int = 1) -> SplashAttentionKernel:
    """The kernel for causal attention over `seq_len` keys, its queries split over `context` devices in zig-zag order.

    Args:
      seq_len: T, of all devices together.
      num_heads: query heads on a device.
      window: as in `Visibility`; by places in the row, which within a segment are those of positions.
      context: devices that share the queries.
    """
    shape = (seq_len, seq_len)
    mask: Any = masks.CausalMask(shape)
    if window is not None:
        mask = masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    if context > 1:
        mask.q_sequence = sharding.zigzag_order(seq_len, context).astype(np.int32)
    block = math.gcd(LARGEST_BLOCK, seq_len // context)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=context,
        residual_checkpoint_name="attention",
        interpret=INTERPRET,
    )  # fmt: skip


def kernel_spec(kernel: SplashAttentionKernel, mesh: AbstractMesh) -> object:
    """The sharding of the kernel's tables of blocks: each context shard has those of its own queries."""
    return kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "context")))


def attend(
    kernel: SplashAttentionKernel,
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    queries: Visibility,
    keys: Visibility,
) -> Float[Array, "B Q H d"]:
    """Attention by the kernel; the sides of the visibility give the segments."""
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    segments = None
    if queries.segment_ids is not None and keys.segment_ids is not None:
        segments = splash.SegmentIds(queries.segment_ids, keys.segment_ids)
    out: Any = jax.vmap(kernel)(q, k, v, segments)  # Any: with residuals it would be a tuple.
    return out.swapaxes(1, 2)
