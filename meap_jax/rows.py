"""The row: the fields that training, evaluation and fine-tuning read from data, declared here and nowhere else."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32

AnyArray = jax.Array | np.ndarray


class Row(NamedTuple):
    """A row of L = T + 1 tokens, or a batch of rows with one axis more in front.

    Inputs are the first T tokens, targets the last T. A field that is None is not used, and costs nothing: it is no
    leaf of the pytree. On the host fields are numpy arrays, [L] each; in a step they are jax arrays, [B, L].
    """

    tokens: Int32[AnyArray, "*B L"]
    segment_ids: Int32[AnyArray, "*B L"] | None = None  # Of each token's document; 0 is padding. None: one document.
    positions: Int32[AnyArray, "*B L"] | None = None  # For RoPE and causality. None: from 0 in each segment.
    rope_positions: Int32[AnyArray, "*B L"] | None = None  # For RoPE alone. None: positions.
    branch_ids: Int32[AnyArray, "*B L"] | None = None  # 0 is the trunk, which all branches see. None: no branches.
    loss_weights: Float32[AnyArray, "*B L"] | None = None  # Of each token as a target. None: 1, and 0 for padding.
    maskable: Bool[AnyArray, "*B L"] | None = None  # Where a mask may fall. None: everywhere but on padding.
    is_copy: Bool[AnyArray, "*B L"] | None = None  # Of a copy of answers, where masked targets alone count. None: none.

    def only(self, fields: Collection[str]) -> "Row":
        """The row with these fields and no others."""
        unused: dict[str, Any] = dict.fromkeys(set(self._fields) - set(fields))
        return self._replace(**unused)

    def behind(self, start: int) -> "Row":
        """The tokens of a row from `start` on."""
        return jax.tree.map(lambda x: x[start:], self)


def joined(rows: Sequence[Row]) -> Row:
    """Rows of numpy arrays one behind the other, as one row."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)


def stacked(rows: Sequence[Row]) -> Row:
    """Rows of numpy arrays [L] as a batch [B, L]."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


DTYPES = dict.fromkeys(Row._fields, jnp.int32) | {
    "loss_weights": jnp.float32,
    "maskable": jnp.bool_,
    "is_copy": jnp.bool_,
}


def abstract_rows(fields: Collection[str], shape: tuple[int, int], sharding: jax.sharding.Sharding) -> Row:
    """A batch of rows as ShapeDtypeStructs.

    Args:
      fields: which of them rows have.
      shape: [B, L].
      sharding: of each field.
    """
    rows: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, DTYPES[name], sharding=sharding) for name in fields}
    return Row(**rows)
