"""From frozen blocks to global arrays on the mesh.

The order of blocks is one global sequence that depends on the data seed alone. Row r of step s is item s * B + r of
it, on any number of hosts; each process reads only the rows that its own devices hold, and the iterator's state is the
step.
"""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from meap_jax.data.prepared import Prepared
from meap_jax.rows import Row, stacked
from meap_jax.sharding import put

_ENDLESS = 2**40  # Steps; grain wants a length.


def global_sequence(prepared: Prepared, weights: dict[str, float], seed: int) -> grain.MapDataset:
    """The endless sequence of training blocks: each source shuffled anew every epoch, mixed by weight.

    Items are a `Row` each, of arrays [T + 1]: tokens and, where documents of the mixture are kept apart, segment_ids.
    """
    shuffled = [
        grain.MapDataset.source(prepared.blocks(name, "train")).seed(seed + i).shuffle().repeat()
        for i, name in enumerate(weights)
    ]
    mixed = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, list(weights.values()))
    return mixed.map(lambda row: row.only(prepared.spec.row_fields))


class TrainBatches(Iterator[Row]):
    """Endless global batches: the rows of `global_sequence` as arrays [B, T + 1], laid out by `sharding`."""

    def __init__(
        self, prepared: Prepared, weights: dict[str, float], *, seed: int, batch_size: int, sharding: NamedSharding
    ):
        self._shape = (batch_size, prepared.block_len)
        self._sharding = sharding
        self._rows = _own_rows(sharding, self._shape)
        sequence = global_sequence(prepared, weights, seed)
        steps = grain.MapDataset.range(_ENDLESS).map(
            lambda step: stacked([sequence[step * batch_size + row] for row in self._rows.tolist()])
        )
        # One reader thread, a few steps ahead: rows come from a memory map, and more threads would fight for the GIL.
        self._iterator = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def __next__(self) -> Row:
        local = next(self._iterator)
        place = {row: i for i, row in enumerate(self._rows)}

        def globally(rows: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(self._shape[0])
                return rows[place[start] : place[stop - 1] + 1]

            return put(self._sharding, self._shape, shard)

        return jax.tree.map(globally, local)

    def get_state(self) -> dict[str, Any]:
        """Where the sequence goes on; the same on every process."""
        return self._iterator.get_state()

    @staticmethod
    def state_at(step: int) -> dict[str, Any]:
        """The state of which `step` batches were taken."""
        return {"next_index": step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state that `get_state` returned."""
        self._iterator.set_state(state)


def _own_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, in order."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in indices if index]))
