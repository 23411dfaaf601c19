"""Held-out rows in batches of one shape, on the mesh."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from meap_jax import sharding
from meap_jax.data.prepare import Blocks


def batches(blocks: Blocks, mesh: Mesh, batch_size: int, max_rows: int) -> Iterator[dict[str, jax.Array]]:
    """The first `max_rows` rows in order; the last batch is filled up with padding rows (segment 0).

    Yields:
      `tokens` and `segment_ids`, [batch_size, T + 1] int32.
    """
    num_rows = min(max_rows, len(blocks.tokens))
    for start in range(0, num_rows, batch_size):
        stop = min(start + batch_size, num_rows)
        missing = batch_size - (stop - start)

        def filled(array: np.ndarray, start=start, stop=stop, missing=missing) -> jax.Array:
            rows = np.pad(np.asarray(array[start:stop], np.int32), ((0, missing), (0, 0)))
            return sharding.put_whole(sharding.batch_sharding(mesh), rows)

        yield {"tokens": filled(blocks.tokens), "segment_ids": filled(blocks.segment_ids)}
