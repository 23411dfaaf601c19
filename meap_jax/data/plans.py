"""Plans: which pieces of which documents make up each block.

A block has seq_len + 1 ids, so that inputs `block[:-1]` and targets `block[1:]` both have seq_len. A plan is computed
once from the lengths of documents, and then gives any block at once, which is what makes the order of blocks a matter
of numbers: shuffled, mixed, and shared out over any number of hosts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

PIECE_DTYPE = np.dtype([("document", "<u4"), ("start", "<u4"), ("length", "<u4")])

# Best fit searches among this many open blocks: with documents of web length 0.6 % of all ids are padding, with 8 bins
# 3 %, with 1,024 0.4 %. Ranges of documents are packed by themselves, which bounds what is held.
_BINS = 256
_RANGE = 1 << 17


class Plan(NamedTuple):
    """Block i is made of pieces[bounds[i] : bounds[i + 1]], in order, and padding."""

    pieces: np.ndarray  # [P] of PIECE_DTYPE: `length` ids of `document` from `start` on.
    bounds: np.ndarray  # [N + 1] int64.

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def part(self, start: int, stop: int) -> "Plan":
        """Blocks start ... stop - 1."""
        first, last = self.bounds[start], self.bounds[stop]
        return Plan(self.pieces[first:last], self.bounds[start : stop + 1] - first)


def concat(documents: np.ndarray, lengths: np.ndarray, block_len: int) -> Plan:
    """Lets documents run on across blocks: one stream, cut into blocks, without padding.

    This is how the official pre-training code packs (bos + text + eos, cut into 4,097 ids). The ids that don't fill a
    last block are left out.

    Args:
      documents: [D] their numbers, in order.
      lengths: [D] their ids.
      block_len: ids in a block, seq_len + 1.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    num_blocks = int(ends[-1]) // block_len if len(ends) else 0
    cuts = np.arange(num_blocks + 1, dtype=np.int64) * block_len
    starts = _merged(cuts[:-1], ends[ends < cuts[-1]])
    which = np.searchsorted(ends, starts, side="right")
    pieces = np.empty(len(starts), PIECE_DTYPE)
    pieces["document"] = np.asarray(documents)[which]
    pieces["start"] = starts - (ends - lengths)[which]
    pieces["length"] = np.diff(starts, append=cuts[-1])
    return Plan(pieces, np.searchsorted(starts, cuts))


def _merged(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two ascending arrays as one, without what comes twice."""
    both = np.sort(np.concatenate([a, b]), kind="stable")  # Timsort: linear in two runs.
    return both[np.diff(both, prepend=-1) != 0]


def best_fit(documents: np.ndarray, lengths: np.ndarray, block_len: int) -> Plan:
    """Puts each document whole into the fullest block that has room for it, by grain's best-fit packing.

    A document longer than a block is cut into blocks and a rest. What stays empty is padding.

    Args:
      documents: [D] their numbers, in order.
      lengths: [D] their ids.
      block_len: ids in a block, seq_len + 1.
    """
    pieces = _cut(np.asarray(documents), np.asarray(lengths, np.int64), block_len)
    packed, counts = [np.zeros(0, np.int64)], []
    for first in range(0, len(pieces), _RANGE):
        for block in _packed(pieces["length"][first : first + _RANGE], block_len):
            packed.append(first + block)
            counts.append(len(block))
    return Plan(pieces[np.concatenate(packed)], np.cumsum([0, *counts], dtype=np.int64))


def _cut(documents: np.ndarray, lengths: np.ndarray, block_len: int) -> np.ndarray:
    """Documents as pieces of `block_len` at most."""
    counts = -(-lengths // block_len)
    which = np.repeat(np.arange(len(documents)), counts)
    nth = np.arange(len(which)) - (np.cumsum(counts) - counts)[which]
    pieces = np.empty(len(which), PIECE_DTYPE)
    pieces["document"] = documents[which]
    pieces["start"] = nth * block_len
    pieces["length"] = np.minimum(lengths[which] - nth * block_len, block_len)
    return pieces


def _packed(lengths: np.ndarray, block_len: int) -> Iterator[np.ndarray]:
    """The numbers of the pieces of each block; grain packs pieces that hold nothing but their own number."""
    import grain  # Here, since it imports JAX, which workers do without.
    from grain.experimental import BestFitPackIterDataset

    elements = grain.MapDataset.source(_Numbers(lengths)).to_iter_dataset(grain.ReadOptions(0, 0))
    for row in BestFitPackIterDataset(elements, length_struct={"piece": block_len}, num_packing_bins=_BINS):
        segments = row["piece_segment_ids"]
        yield row["piece"][np.flatnonzero((np.diff(segments, prepend=0) != 0) & (segments != 0))].astype(np.int64)


class _Numbers:
    """Element i is {"piece": [i, i, ...]}, as long as piece i."""

    def __init__(self, lengths: np.ndarray):
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]
        return {"piece": np.full(int(self._lengths[index]), index, np.int32)}


def first_tokens(documents: np.ndarray, lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """The first of the documents that hold `max_tokens` together, the one that reaches it included; 0: all."""
    if not max_tokens:
        return documents
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    return documents[before < max_tokens]


def keep_long(
    documents: np.ndarray, lengths: np.ndarray, *, long_from: int, keep_shorter: float, seed: int
) -> np.ndarray:
    """Drops short documents at random, so that long ones have a larger share of the source.

    Fu et al. (https://arxiv.org/abs/2402.10171) keep a tenth of what is shorter than 4,096 tokens, in each source by
    itself, so that the shares of sources in the mixture stay what they were.

    Args:
      documents: [D] their numbers, in order.
      lengths: [D] their ids.
      long_from: documents of this many ids or more all stay.
      keep_shorter: the probability that another one does.
      seed: of the draw; a document's own depends on its number alone.
    """
    draws = np.random.default_rng(seed).random(int(documents.max(initial=-1)) + 1)[documents]
    return documents[(lengths >= long_from) | (draws < keep_shorter)]


def statistics(plan: Plan, documents: np.ndarray, lengths: np.ndarray, block_len: int) -> dict[str, float]:
    """What is logged of a plan over these documents."""
    pieces = plan.pieces
    tokens = int(pieces["length"].sum(dtype=np.int64))
    available = int(lengths.sum(dtype=np.int64))
    uncut = np.count_nonzero(pieces["length"] == _lengths_of(pieces["document"], documents, lengths))
    return {
        "documents": len(documents),
        "blocks": len(plan),
        "tokens": tokens,
        "mean_document_tokens": round(available / max(len(documents), 1), 1),
        "padding_share": round(1 - tokens / max(len(plan) * block_len, 1), 4) if len(plan) else 0.0,
        "cut_documents": len(documents) - int(uncut),
        "dropped_tokens": available - tokens,
    }


def _lengths_of(wanted: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    order = np.argsort(documents)
    return lengths[order[np.searchsorted(documents, wanted, sorter=order)]]
