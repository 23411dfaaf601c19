"""Chooses the next token from logits: greedy, or drawn after temperature, top-k and top-p."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Key

from meap_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the names and their meaning are those of transformers' `generate`.

    Raises:
      ConfigError: a value that can't be.
    """

    temperature: float = 0.0  # Logits are divided by it; 0: the most likely token is taken.
    top_k: int = 0  # Only so many of the most likely tokens; 0: all.
    top_p: float = 1.0  # Of these the most likely ones that come to this probability together.

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}, but must be 0 (greedy) or more.")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}, but must be a number of tokens, or 0 for all.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, but must be in (0, 1].")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError(
                f"temperature is 0, which takes the most likely token, but top_k is {self.top_k} and top_p "
                f"{self.top_p}: set temperature, such as 1."
            )


def choose(
    logits: Float32[Array, "B V"], never: Bool[Array, " V"], keys: Key[Array, " B"], sampling: Sampling
) -> Int32[Array, " B"]:
    """The next token of each row.

    Args:
      logits: of the model.
      never: tokens that are not chosen, such as [MASK].
      keys: of each row; greedy ignores them.
      sampling: static.
    """
    logits = jnp.where(never, -jnp.inf, logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits / sampling.temperature, sampling)).astype(jnp.int32)


def filtered(logits: Float32[Array, "B V"], sampling: Sampling) -> Float32[Array, "B V"]:
    """Logits with -inf in the place of tokens that top-k, and after it top-p, leave out.

    As transformers' TopKLogitsWarper and TopPLogitsWarper: top-p keeps tokens, the least likely first looked at, as
    long as what is left out comes to no more than 1 - top_p; the most likely one always stays.
    """
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1)  # The least likely first.
        ascending = jnp.take_along_axis(logits, order, axis=-1)
        is_out = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - sampling.top_p
        is_out = is_out.at[:, -1].set(False)
        is_out = jnp.take_along_axis(is_out, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(is_out, -jnp.inf, logits)
    return logits


def log_probability(logits: Float32[Array, "B V"], tokens: Int32[Array, " B"]) -> Float32[Array, " B"]:
    """The natural logarithm of the probability that the model itself gives each row's token."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=-1)[:, 0]
