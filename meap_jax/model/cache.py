"""The interface of a cache of keys and values; the caller brings the cache."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the tokens so far, in one layer.

    A pytree. The decoder is given one whose arrays have an axis [num_layers] in front, as its parameters do, and
    returns the same with the new tokens in it. The caller says which keys each query sees, by a `Visibility` of all S
    places, and must hide those without a key.
    """

    def extend(
        self, k: Float[Array, "B T K d"], v: Float[Array, "B T K d"]
    ) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"], "Cache"]:
        """Adds the keys and values of T tokens; returns all S of both, and the cache that holds them.

        Args:
          k: [B, T, K, d], turned by RoPE.
          v: [B, T, K, d].
        """
        ...
