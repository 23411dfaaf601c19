"""Token cross-entropy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def token_cross_entropy(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float32[Array, "..."]:
    """-log p(target) of every position, in float32, natural units (nats).

    Args:
      logits: [..., V], any float dtype; the sums run in float32.
      targets: [...] int, in [0, V).

    Returns:
      [...] float32.

    Raises:
      ValueError: if the leading axes differ.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {logits.shape} and targets {targets.shape} must agree in all axes but the vocabulary")
    logits = logits.astype(jnp.float32)
    # A comparison with the target instead of a gather: it stays local where the vocabulary is sharded.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - target_logit
