"""Held-out rows in batches of one shape, on the mesh."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from meap_jax import sharding
from meap_jax.data.prepared import AnyBlocks
from meap_jax.rows import Row, stacked


def batches(blocks: AnyBlocks, mesh: Mesh, batch_size: int, max_rows: int) -> Iterator[Row]:
    """Yields the first `max_rows` rows in order, [batch_size, T + 1]; padding (segment 0) fills up the last batch."""
    num_rows = min(max_rows, len(blocks))
    for start in range(0, num_rows, batch_size):
        rows = stacked([blocks[i] for i in range(start, min(start + batch_size, num_rows))])
        yield jax.tree.map(lambda x: on_mesh(mesh, np.pad(x, ((0, batch_size - len(x)), (0, 0)))), rows)


def on_mesh(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Puts rows on the mesh, sharded as a training batch is."""
    return sharding.put_whole(sharding.batch_sharding(mesh), rows)
