"""Plans: which slices of which documents make up each block.

A block has seq_len + 1 ids, so that inputs `block[:-1]` and targets `block[1:]` both have seq_len. A plan is computed
once from the lengths of documents, and then gives any block at once, which is what makes the order of blocks a matter
of numbers: shuffled, mixed, and shared out over any number of hosts.

Documents come in ranges, each of which gives a plan of its own, so that memory doesn't grow with the corpus.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

SLICE_DTYPE = np.dtype([("document", "<u4"), ("start", "<u4"), ("length", "<u4")])

# Best fit searches among this many open blocks: with documents of web length 0.6 % of all ids are padding, with 8 bins
# 3 %, with 1,024 0.4 %.
_BINS = 256


class Plan(NamedTuple):
    """Block i is made of slices[bounds[i] : bounds[i + 1]], in order, and padding."""

    slices: np.ndarray  # [S] of SLICE_DTYPE: `length` ids of `document` from `start` on.
    bounds: np.ndarray  # [N + 1] int64.

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def between(self, start: int, stop: int) -> "Plan":
        """Blocks start ... stop - 1."""
        first, last = self.bounds[start], self.bounds[stop]
        return Plan(self.slices[first:last], self.bounds[start : stop + 1] - first)


def whole(documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Documents as slices of SLICE_DTYPE.

    Args:
      documents: [D] their numbers.
      lengths: [D] their ids.
    """
    slices = np.zeros(len(documents), SLICE_DTYPE)
    slices["document"], slices["length"] = documents, lengths
    return slices


def concat(ranges: Iterable[np.ndarray], block_len: int) -> Iterator[Plan]:
    """Lets documents run on across blocks: one stream, cut into blocks, without padding.

    This is how the official pre-training code packs (bos + text + eos, cut into 4,097 ids). The ids that don't fill a
    last block are left out.

    Args:
      ranges: slices of documents, in order.
      block_len: ids in a block, seq_len + 1.

    Yields:
      A plan a range; its blocks follow those of the plans before.
    """
    rest = np.zeros(0, SLICE_DTYPE)
    for slices in ranges:
        stream = np.concatenate([rest, slices])
        ends = np.cumsum(stream["length"], dtype=np.int64)
        cuts = np.arange(0, (ends[-1] if len(ends) else 0) + 1, block_len, dtype=np.int64)
        starts = _merged(cuts, ends[:-1])
        starts = starts[: np.searchsorted(starts, ends[-1])] if len(ends) else starts[:0]
        which = np.searchsorted(ends, starts, side="right")
        cut = stream[which]
        cut["start"] += (starts - (ends - stream["length"])[which]).astype(np.uint32)
        cut["length"] = np.diff(starts, append=ends[-1:])
        bounds = np.searchsorted(starts, cuts)
        yield Plan(cut[: bounds[-1]], bounds)
        rest = cut[bounds[-1] :]


def _merged(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two ascending arrays as one, without what comes twice."""
    both = np.sort(np.concatenate([a, b]), kind="stable")  # Timsort: linear in two runs.
    return both[np.diff(both, prepend=-1) != 0]


def best_fit(ranges: Iterable[np.ndarray], block_len: int, each: Callable[..., Iterator[Plan]] = map) -> Iterator[Plan]:
    """Puts each document whole into the fullest block that has room for it, by grain's best-fit packing.

    A document longer than a block is cut into blocks and a rest. What stays empty is padding. Ranges are packed by
    themselves.

    Args:
      ranges: slices of documents, in order.
      block_len: ids in a block, seq_len + 1.
      each: maps a function over the ranges, in order; it may do so in other processes.

    Returns:
      A plan a range.
    """
    return each(functools.partial(_fit, block_len), ranges)


def one_each(ranges: Iterable[np.ndarray], block_len: int) -> Iterator[Plan]:
    """Puts each document into a block of its own; none is longer than a block. Arguments and result as of `concat`."""
    for slices in ranges:
        yield Plan(slices, np.arange(len(slices) + 1, dtype=np.int64))


def _fit(block_len: int, documents: np.ndarray) -> Plan:
    slices = _cut(documents, block_len)
    blocks = list(_packed(slices["length"], block_len))
    order = np.concatenate([np.zeros(0, np.int64), *blocks])
    return Plan(slices[order], np.cumsum([0, *map(len, blocks)], dtype=np.int64))


def _cut(documents: np.ndarray, block_len: int) -> np.ndarray:
    """Cuts slices that are longer than a block."""
    lengths = documents["length"].astype(np.int64)
    counts = -(-lengths // block_len)
    which = np.repeat(np.arange(len(documents)), counts)
    nth = np.arange(len(which)) - (np.cumsum(counts) - counts)[which]
    slices = documents[which]
    slices["start"] += (nth * block_len).astype(np.uint32)
    slices["length"] = np.minimum(lengths[which] - nth * block_len, block_len)
    return slices


def _packed(lengths: np.ndarray, block_len: int) -> Iterator[np.ndarray]:
    """The numbers of the slices of each block; grain packs slices that hold nothing but their own number."""
    import grain  # Here, since it imports JAX, which workers do without.
    from grain.experimental import BestFitPackIterDataset

    repeated = grain.MapDataset.range(len(lengths)).map(lambda i: {"slice": np.full(lengths[i], i, np.int32)})
    elements = repeated.to_iter_dataset(grain.ReadOptions(0, 0))
    for row in BestFitPackIterDataset(elements, length_struct={"slice": block_len}, num_packing_bins=_BINS):
        segments = row["slice_segment_ids"]
        yield row["slice"][np.flatnonzero((np.diff(segments, prepend=0) != 0) & (segments != 0))].astype(np.int64)


def first_tokens(ranges: Iterable[np.ndarray], max_tokens: int) -> Iterator[np.ndarray]:
    """The first documents that hold `max_tokens` together, the one that reaches it included; 0: all."""
    room = max_tokens
    for slices in ranges:
        before = np.cumsum(slices["length"], dtype=np.int64) - slices["length"]
        yield slices[before < room] if max_tokens else slices
        room -= int(slices["length"].sum(dtype=np.int64))
        if max_tokens and room <= 0:
            return


def keep_long(ranges: Iterable[np.ndarray], *, long_from: int, keep_shorter: float, seed: int) -> Iterator[np.ndarray]:
    """Drops short documents at random, so that long ones have a larger share of the source.

    Fu et al. (https://arxiv.org/abs/2402.10171) keep a tenth of what is shorter than 4,096 tokens, in each source by
    itself, so that the shares of sources in the mixture stay what they were.

    Args:
      ranges: documents, in order.
      long_from: documents of this many ids or more all stay.
      keep_shorter: the probability that another one does.
      seed: of the draw.
    """
    for i, slices in enumerate(ranges):
        draws = np.random.default_rng((seed, i)).random(len(slices))
        yield slices[(slices["length"] >= long_from) | (draws < keep_shorter)]


# --------------------------------------------------------------------------------------------------------------- files


def save(folder: Path, name: str, plans: Iterable[Plan], lengths: np.ndarray, block_len: int) -> dict[str, float]:
    """Writes the plans of consecutive ranges as one, and returns its counts.

    Args:
      folder: that is there.
      name: of the plan.
      plans: as `concat` and `best_fit` yield them.
      lengths: of every document of the store, by number.
      block_len: ids in a block.
    """
    num_blocks = num_slices = num_tokens = num_whole = num_documents = 0
    with (folder / f"{name}.slices").open("wb") as slices_file, (folder / f"{name}.bounds").open("wb") as bounds_file:
        bounds_file.write(np.zeros(1, "<i8").tobytes())
        for slices, bounds in plans:
            slices_file.write(slices.tobytes())
            bounds_file.write((num_slices + bounds[1:]).astype("<i8").tobytes())
            num_blocks += len(bounds) - 1
            num_slices += len(slices)
            num_tokens += int(slices["length"].sum(dtype=np.int64))
            num_documents += int(np.count_nonzero(slices["start"] == 0))
            num_whole += int(np.count_nonzero(slices["length"] == lengths[slices["document"]]))
    return {
        "blocks": num_blocks,
        "tokens": num_tokens,
        "documents": num_documents,
        "cut_documents": num_documents - num_whole,
        "padding_share": round(1 - num_tokens / (num_blocks * block_len), 4) if num_blocks else 0.0,
    }


def load(folder: Path, name: str) -> Plan:
    """Maps a plan that was saved into memory.

    Raises:
      OSError, ValueError: its files are not there, or are none of a plan.
    """

    def mapped(kind: str, dtype: np.dtype) -> np.ndarray:
        path = folder / f"{name}.{kind}"
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    plan = Plan(mapped("slices", SLICE_DTYPE), mapped("bounds", np.dtype("<i8")))
    if not len(plan.bounds):
        raise ValueError("it has no bounds of blocks")
    return plan
