"""GPU attention: cuDNN's flash attention by `jax.nn.dot_product_attention`, which takes kv heads as they are."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meap_jax.model.visibility import Visibility

DTYPES = (jnp.bfloat16, jnp.float16)
LARGEST_HEAD = 128
LONGEST_MASKED = 8_192  # Segments and branches go in as a mask of T x T, which must fit.


def why_not(q: jax.Array, visibility: Visibility, context: int) -> str | None:
    """What this kernel can't express of a call, in words; None if it can do it."""
    T, d = q.shape[1], q.shape[-1]
    if visibility.forgotten is not None:
        return "forgotten keys"
    if q.dtype not in DTYPES:
        return f"{q.dtype} arrays"
    if d % 8 or d > LARGEST_HEAD:
        return f"a head_dim of {d}, which is no multiple of 8 up to {LARGEST_HEAD}"
    if context > 1:
        return "a sequence that is split over context devices"
    if _needs_mask(visibility) and T > LONGEST_MASKED:
        return f"segments or branches in rows of {T}, more than {LONGEST_MASKED}"
    return None


def attend(
    q: Float[Array, "B T H d"], k: Float[Array, "B T K d"], v: Float[Array, "B T K d"], visibility: Visibility
) -> Float[Array, "B T H d"]:
    """Attention by the kernel: causal by place in the row, or by the mask where there are segments or branches."""
    kernel = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if _needs_mask(visibility):
        return kernel(q, k, v, mask=visibility.mask()[:, None])
    window = None if visibility.window is None else (visibility.window - 1, 0)
    return kernel(q, k, v, is_causal=True, local_window_size=window)


def _needs_mask(visibility: Visibility) -> bool:
    return visibility.segment_ids is not None or visibility.branch_ids is not None
