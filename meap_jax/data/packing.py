"""Documents of many lengths become blocks of one length.

A block has seq_len + 1 ids, so that inputs `block[:-1]` and targets `block[1:]` both have seq_len.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from meap_jax.data.documents import DataError, EncodedDocument, encode_documents
from meap_jax.data.sources import SPLITS, Source
from meap_jax.data.tokenizers import Tokenizer

# One record an answer: block[row, start : start + length] are its ids, and `distance` counts the
# tokens from the first one of the value where its fact states it to the first one of the answer.
ANSWER_DTYPE = np.dtype([
    ("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("depth", "<f4"), ("distance", "<i4")
])  # fmt: skip

# How many blocks may wait for a document that still fits. With short documents nearly all padding
# is gone at a few; without a bound the search is quadratic in the number of documents.
_OPEN_BLOCKS = 64


class Packed(NamedTuple):
    """Blocks of ids and the documents that they belong to."""

    tokens: np.ndarray  # [N, block_len]
    segment_ids: np.ndarray  # [N, block_len] 1, 2, ... for a block's documents, 0 for padding
    answers: np.ndarray  # [num_answers] of ANSWER_DTYPE, ordered by row and start
    num_dropped: int  # ids that did not fill a last block


def smallest_dtype(largest: int) -> np.dtype:
    """The narrowest of uint8, uint16 and uint32 that holds `largest`."""
    return np.min_scalar_type(largest)


def pack_concat(documents: Iterable[Sequence[int]], block_len: int, dtype: DTypeLike = np.int32) -> Packed:
    """Lets documents run on across blocks, without a mask between them.

    This is how the official pre-training code packs (bos + text + eos, one stream cut into 4,097
    ids). The ids that don't fill a last block are dropped.

    Args:
      documents: ids of each document with its bos and eos; read once, never held.
      block_len: ids in a block, seq_len + 1.
      dtype: an integer type that holds every id.

    Returns:
      tokens [N, block_len] of `dtype`, segment_ids all 1, no answers.
    """
    dtype = np.dtype(dtype)
    stream = array(dtype.char)
    for ids in documents:
        stream.extend(ids)
    num_blocks = len(stream) // block_len
    num_kept = num_blocks * block_len
    tokens = np.frombuffer(stream, dtype, num_kept).reshape(num_blocks, block_len)
    # A view of a single 1: no memory for what is the same everywhere.
    segment_ids = np.broadcast_to(np.int32(1), tokens.shape)
    return Packed(tokens, segment_ids, np.zeros(0, ANSWER_DTYPE), len(stream) - num_kept)


def pack_whole(
    documents: Iterable[EncodedDocument],
    block_len: int,
    pad_id: int,
    dtype: DTypeLike = np.int32,
) -> Packed:
    """Puts whole documents, never cut, each into the first block that has room for it.

    Args:
      documents: ids with bos and eos, and the spans of the answers.
      block_len: ids in a block, seq_len + 1.
      pad_id: fills the end of each block.
      dtype: an integer type that holds every id.

    Returns:
      tokens [N, block_len] of `dtype`, segment_ids [N, block_len] int32, the answers.

    Raises:
      DataError: a document is longer than a block; names both lengths.
    """
    rows: list[list[EncodedDocument]] = []
    room: dict[int, int] = {}  # ids that are free in each open block, oldest block first
    for index, document in enumerate(documents):
        length = len(document.ids)
        if length > block_len:
            raise DataError(
                f"Document {index} has {length} ids with bos and eos, more than the "
                f"{block_len} of a block (seq_len + 1), and must not be cut: raise seq_len, or lower "
                "num_facts, questions_per_fact (for training) or num_eval_facts (held out) of data.retrieval."
            )
        row = next((row for row, free in room.items() if free >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            if len(room) == _OPEN_BLOCKS:
                del room[min(room, key=room.__getitem__)]
            room[row] = block_len
        rows[row].append(document)
        room[row] -= length
    tokens = np.full((len(rows), block_len), pad_id, np.dtype(dtype))
    segment_ids = np.zeros((len(rows), block_len), np.int32)
    answers = []
    for row, packed in enumerate(rows):
        end = 0
        for segment, document in enumerate(packed, start=1):
            start, end = end, end + len(document.ids)
            tokens[row, start:end] = document.ids
            segment_ids[row, start:end] = segment
            for span in document.answers:
                distance = span.start - span.fact_start
                answers.append((row, start + span.start, span.length, span.depth, distance))
    return Packed(tokens, segment_ids, np.array(answers, ANSWER_DTYPE), 0)


def pack_source(
    source: Source, tokenizer: Tokenizer, *, block_len: int, holdout: float
) -> tuple[dict[str, Packed], str]:
    """Packs all splits of a source, each split by itself.

    Where that leaves a split of a text source without one full block, as a single book does, the
    whole source is packed as one stream, and the share `holdout` of its blocks, at least one, is
    cut off the end for test and again for validation. Then neighbours of held-out text are trained
    on, which is why the second result says so.

    Args:
      source: the documents.
      tokenizer: gives the ids.
      block_len: ids in a block, seq_len + 1.
      holdout: share of validation and of test; only read when splitting by block.

    Returns:
      {split: Packed}, and "document" or "block": what the splits are made of.

    Raises:
      DataError: too little for a block in every split, or a document too long to be packed whole.
    """
    dtype = smallest_dtype(tokenizer.num_tokens - 1)

    def encoded(*splits: str) -> Iterable[EncodedDocument]:
        documents = chain.from_iterable(map(source.documents, splits))
        return encode_documents(documents, tokenizer)

    if source.whole:
        packs = {s: pack_whole(encoded(s), block_len, tokenizer.pad_id, dtype) for s in SPLITS}
        for split, packed in packs.items():
            if not len(packed.tokens):
                raise DataError(
                    f"The source {source.name} has no document left for {split}: all of them stand "
                    "in another split; raise num_keys, num_values or num_facts."
                )
        return packs, "document"
    packs = {split: pack_concat((document.ids for document in encoded(split)), block_len, dtype) for split in SPLITS}
    if all(len(packed.tokens) for packed in packs.values()):
        return packs, "document"
    # Documents that were to be held out come last: they fill the end that is cut off.
    packed = pack_concat((document.ids for document in encoded(*SPLITS)), block_len, dtype)
    num_blocks = len(packed.tokens)
    if num_blocks < len(SPLITS):
        raise DataError(
            f"The source {source.name} has {packed.tokens.size + packed.num_dropped} tokens, too "
            f"few for one block of {block_len} (seq_len + 1) in each of {', '.join(SPLITS)}: give "
            "more text or lower seq_len."
        )
    held = max(1, int(holdout * num_blocks))
    cuts = (0, num_blocks - 2 * held, num_blocks - held, num_blocks)
    return {
        split: Packed(
            packed.tokens[start:end],
            packed.segment_ids[start:end],
            packed.answers,
            packed.num_dropped if end == num_blocks else 0,
        )
        for split, start, end in zip(SPLITS, cuts, cuts[1:], strict=False)
    }, "block"
