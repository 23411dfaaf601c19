"""From frozen blocks to global arrays on the mesh.

The order of blocks is one global sequence that depends on the data seed alone. Row r of step s is item s * B + r of
it, on any number of hosts; each process reads only the rows that its own devices hold, and the iterator's state is the
step.
"""

from collections.abc import Collection, Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from meap_jax.data.prepared import Blocks, Prepared
from meap_jax.rows import Row, stacked
from meap_jax.sharding import put

_ENDLESS = 2**40  # Steps; grain wants a length.


class _Training:
    """Training blocks as a grain source: item i is a `Row` with the fields that the run needs, [T + 1] each."""

    def __init__(self, blocks: Blocks, source: str, fields: Collection[str]):
        self._blocks, self._source, self._fields = blocks, source, fields

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: Any) -> Row:
        return self._blocks[index].only(self._fields)

    def __repr__(self) -> str:
        return f"_Training({self._source})"


class _Steps:
    """Item s is what this process needs of step s: rows `rows` of the global batch, in order."""

    def __init__(self, sequence: grain.MapDataset, rows: np.ndarray, batch_size: int):
        self._sequence, self._rows, self._batch_size = sequence, rows, batch_size

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: Any) -> Row:
        return stacked([self._sequence[int(step) * self._batch_size + int(row)] for row in self._rows])

    def __repr__(self) -> str:
        return f"_Steps(batch_size={self._batch_size})"


def global_sequence(prepared: Prepared, weights: dict[str, float], seed: int) -> grain.MapDataset:
    """The endless sequence of training blocks: each source shuffled anew every epoch, mixed by weight.

    Items are a `Row` each, of arrays [T + 1]: tokens and, where documents of the mixture are kept apart, segment_ids.
    """
    blocks = {source: prepared.blocks(source, "train") for source in weights}
    fields = prepared.spec.row_fields
    sources = [
        grain.MapDataset.source(_Training(b, source, fields)).seed(seed + i).shuffle().repeat()
        for i, (source, b) in enumerate(blocks.items())
    ]
    return sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, list(weights.values()))


class TrainBatches(Iterator[Row]):
    """Endless global batches: the rows of `global_sequence` as arrays [B, T + 1], laid out by `sharding`."""

    def __init__(
        self, prepared: Prepared, weights: dict[str, float], *, seed: int, batch_size: int, sharding: NamedSharding
    ):
        self._shape = (batch_size, prepared.block_len)
        self._sharding = sharding
        self._rows = _own_rows(sharding, self._shape)
        sequence = global_sequence(prepared, weights, seed)
        steps = grain.MapDataset.source(_Steps(sequence, self._rows, batch_size))
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

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state that `get_state` returned."""
        self._iterator.set_state(state)


def _own_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, in order."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in indices if index]))
