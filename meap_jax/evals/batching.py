"""Held-out rows in batches of one shape, on the mesh."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from meap_jax import sharding
from meap_jax.data.prepared import Blocks


def batches(blocks: Blocks, mesh: Mesh, batch_size: int, max_rows: int) -> Iterator[dict[str, jax.Array]]:
    """The first `max_rows` rows in order; the last batch is filled up with padding rows (segment 0).

    Yields:
      `tokens` and `segment_ids`, [batch_size, T + 1] int32.
    """
    num_rows = min(max_rows, len(blocks))
    for start in range(0, num_rows, batch_size):
        arrays = blocks.rows(start, min(start + batch_size, num_rows))
        yield {
            name: sharding.put_whole(sharding.batch_sharding(mesh), _filled(array, batch_size))
            for name, array in arrays.items()
        }


def _filled(rows: np.ndarray, batch_size: int) -> np.ndarray:
    return np.pad(np.asarray(rows, np.int32), ((0, batch_size - len(rows)), (0, 0)))
