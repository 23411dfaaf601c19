"""The mask of attention, in the one description that every backend takes."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@no_type_check  # A transformation of JAX may hold anything in place of the arrays; `attention` checks them.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys each query of a row sees: those of which all of these hold.

    - same segment (document);
    - the key's position is not after the query's (causal);
    - the distance in positions is below `window`, if there is one;
    - the key is on the trunk (branch 0) or on the query's own branch, if there are branches;
    - the key is not forgotten, or it is the query's own.

    A row is in order: no query sees a later key. Backends skip those keys; "plain" alone compares all positions, so
    that it takes a permuted row too. Where queries and keys are described apart (a cache), all backends compare what
    is described, and the queries' window holds.
    """

    segment_ids: Int[Array, "B T"] | None  # 0 is padding by convention; None: a row is one segment.
    positions: Int[Array, "B T"]  # From 0 in each segment; also RoPE's, unless rope_positions are given.
    window: int | None = dataclasses.field(default=None, metadata={"static": True})  # With the query's own position.
    branch_ids: Int[Array, "B T"] | None = None  # 0 is the trunk.
    rope_positions: Int[Array, "B T"] | None = None  # RoPE's, where they are others than those of causality.
    forgotten: Bool[Array, "B T"] | None = None  # Keys that no later query sees; None: there are none.

    @property
    def angles_at(self) -> Int[Array, "B T"]:
        """The positions of RoPE."""
        return self.positions if self.rope_positions is None else self.rope_positions

    def mask(self, keys: "Visibility | None" = None) -> Bool[Array, "B Q T"]:
        """Which of the keys each query sees; by default queries and keys are the same row."""
        k = self if keys is None else keys
        distance = self.positions[:, :, None] - k.positions[:, None, :]
        sees = distance >= 0
        if self.window is not None:
            sees &= distance < self.window
        if self.segment_ids is not None and k.segment_ids is not None:
            sees &= self.segment_ids[:, :, None] == k.segment_ids[:, None, :]
        if self.branch_ids is not None and k.branch_ids is not None:
            of_keys = k.branch_ids[:, None, :]
            sees &= (self.branch_ids[:, :, None] == of_keys) | (of_keys == 0)
        if k.forgotten is not None:
            sees &= ~k.forgotten[:, None, :] | (distance == 0)
        return sees

    def slice(self, start: int | jax.Array, size: int) -> "Visibility":
        """Positions start ... start + size - 1 of every row; `start` may be traced."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), self)


def causal(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Visibility:
    """Visibility of ordinary documents: causal within a segment, positions from 0 in each.

    Args:
      tokens: only their shape is read.
      segment_ids: equal ids side by side. Default: a row is one segment.
    """
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return Visibility(None, index)
    starts = segment_ids != jnp.roll(segment_ids, 1, axis=1).at[:, 0].set(-1)
    return Visibility(segment_ids, index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1))
