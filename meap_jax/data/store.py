"""Tokenized documents in ArrayRecord shards, read in any order.

A store is a folder. Shard i is `{i:05}.arrayrecord`, whose record j is the ids of its document j, bos and eos
included, as little-endian uint16, or uint32 for a vocabulary that needs it. `index.npy` has the length and the split
of each document. `spans.ROLE.npy` has a record for each span of a role, of every split: SPAN_DTYPE, and behind it the
columns that spans of this role have, as float64.
"""

import contextlib
import functools
import hashlib
import os
import threading
import uuid
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from numpy.lib.recfunctions import unstructured_to_structured

from meap_jax.errors import DataError, UserError

SPLITS = ("train", "validation", "test")  # A document's split is its place here.
MAX_DOCUMENTS = 2**32  # Of a store: plans and spans number them so.
INDEX_DTYPE = np.dtype([("length", "<u4"), ("split", "u1")])
SPAN_DTYPE = np.dtype([("document", "<u4"), ("start", "<u4"), ("length", "<u4")])

# Blocks take runs of documents, which are neighbours on disk; compressed (zstd:1) they would take two thirds of the
# disk and blocks twice the time to read.
_WRITER_OPTIONS = "group_size:16,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # What array_record advises for random access.
_OPEN_FILES = 256  # Of a thread; many systems allow 1,024 a process.


class TokenSpan(NamedTuple):
    """The tokens `ids[start : start + length]` of a document, and what they are."""

    start: int
    length: int
    role: str
    columns: Mapping[str, float] = {}  # The same names in every span of a role.


class EncodedDocument(NamedTuple):
    """Token ids of a document, bos and eos included, and its spans."""

    ids: list[int]
    spans: tuple[TokenSpan, ...] = ()


class ShardSummary(NamedTuple):
    """What a shard holds."""

    documents: int
    tokens: int
    largest_id: int  # 0 in an empty shard.
    sha256: str  # Of the documents' ids and splits, whatever the compression.


def ids_dtype(num_tokens: int) -> np.dtype:
    """The type that ids below `num_tokens` are stored in."""
    return np.dtype("<u2" if num_tokens <= 2**16 else "<u4")


def shard_file(folder: Path, shard: int) -> Path:
    """The records of a shard."""
    return folder / f"{shard:05}.arrayrecord"


@contextlib.contextmanager
def completed(path: Path) -> Iterator[Path]:
    """Where to write a file that gets the name `path` once it is complete and on the disk.

    So a file under its name is complete, even after a power cut, and no other process or machine writes the same one.
    What an error leaves is removed.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception:
        partial.unlink(missing_ok=True)
        raise


def write_shard(
    folder: Path, shard: int, documents: Iterable[tuple[int, EncodedDocument]], dtype: np.dtype
) -> ShardSummary:
    """Writes a shard's records, index and spans; a file that is there under its name is complete.

    Args:
      folder: of the store.
      shard: its number.
      documents: (split, document) in order.
      dtype: `ids_dtype` of the tokenizer.

    Raises:
      OSError: the disk is full or can't be written; and whatever `documents` raises.
      TypeError: two spans of a role have different columns.
    """
    lengths, splits = array("I"), array("B")  # Not lists: a shard may hold millions of documents.
    spans: dict[str, tuple[tuple[str, ...], array]] = {}  # Of each role the names of its columns, and all records.
    digest, largest = hashlib.sha256(), 0
    path = shard_file(folder, shard)
    try:
        with completed(path) as partial:
            writer = array_record_module.ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
            for split, document in documents:
                ids = np.asarray(document.ids, dtype)
                digest.update(len(ids).to_bytes(8, "little") + bytes([split]))
                digest.update(ids.tobytes())
                largest = max(largest, int(ids.max(initial=0)))
                for span in document.spans:
                    names, values = spans.setdefault(span.role, (tuple(span.columns), array("d")))
                    if names != tuple(span.columns):
                        raise TypeError(f"{span} has other columns than the spans of its role before: {names}.")
                    values.extend((len(lengths), span.start, span.length, *span.columns.values()))
                lengths.append(len(ids))
                splits.append(split)
                writer.write(ids.tobytes())
            writer.close()
    except UserError:  # What the documents raise, such as too many bad records.
        raise
    except (RuntimeError, ValueError) as error:  # What array_record raises for a write that failed.
        raise OSError(f"{path} can't be written: {' '.join(str(error).split())[:300]}") from error
    index = np.empty(len(lengths), INDEX_DTYPE)
    index["length"], index["split"] = lengths, splits
    save_array(path.with_suffix(".index.npy"), index)
    for role, (names, values) in spans.items():
        dtype = np.dtype(SPAN_DTYPE.descr + [(name, "<f8") for name in names])
        records = unstructured_to_structured(np.reshape(values, (-1, len(dtype.descr))), dtype)
        save_array(path.with_suffix(f".spans.{role}.npy"), records)
    return ShardSummary(len(index), int(index["length"].sum(dtype=np.int64)), largest, digest.hexdigest())


def save_array(path: Path, array: np.ndarray) -> None:
    """`np.save` of a file that is complete once it is there."""
    with completed(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def merge_indices(folder: Path, num_shards: int) -> None:
    """Joins the indices of all shards, and the spans of each role, into those of the store."""
    indices, spans, first = [np.zeros(0, INDEX_DTYPE)], defaultdict[str, list[np.ndarray]](list), 0
    for shard in range(num_shards):
        for path in sorted(folder.glob(f"{shard:05}.spans.*.npy")):
            records = np.load(path)
            records["document"] += first
            spans[path.name.partition(".")[2]].append(records)
        indices.append(np.load(shard_file(folder, shard).with_suffix(".index.npy")))
        first += len(indices[-1])
    save_array(folder / "index.npy", np.concatenate(indices))
    for name, arrays in spans.items():
        save_array(folder / name, np.concatenate(arrays))


def index_files(folder: Path) -> list[Path]:
    """What a store has beside its shards: the index, and the spans of each role."""
    return [folder / "index.npy", *sorted(folder.glob("spans.*.npy"))]


class Store:
    """Documents of ids by number, as numpy arrays. Reads from several threads are safe: each opens its own files."""

    def __init__(self, folder: Path, shard_sizes: Sequence[int], dtype: np.dtype):
        """Opens a store that is complete.

        Args:
          folder: of the store.
          shard_sizes: documents of each shard.
          dtype: of the ids.
        """
        self.folder, self.dtype = folder, dtype
        self.index: np.ndarray = np.load(folder / "index.npy", mmap_mode="r")
        self._ends = np.cumsum(np.asarray(shard_sizes, np.int64))
        self._open = threading.local()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, document: int) -> np.ndarray:
        return self.read([document])[0]

    def spans(self, role: str) -> np.ndarray:
        """[number of spans] of SPAN_DTYPE and the role's columns, ordered by document; SPAN_DTYPE if there are none."""
        path = self.folder / f"spans.{role}.npy"
        return np.load(path, mmap_mode="r") if path.exists() else np.zeros(0, SPAN_DTYPE)

    def roles(self) -> list[str]:
        """The roles that any span of this store has."""
        return [path.name.split(".")[1] for path in index_files(self.folder)[1:]]

    def documents(self, split: str) -> np.ndarray:
        """The numbers of a split's documents, in order."""
        return np.flatnonzero(self.index["split"] == SPLITS.index(split))

    def read(self, documents: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The ids of some documents, in the order asked for; neighbours together are fastest.

        Raises:
          DataError: a record can't be read; names the file and the record.
        """
        documents = np.asarray(documents, np.int64)
        shards = np.searchsorted(self._ends, documents, side="right")
        out: list[np.ndarray] = []
        for shard, run in groupby(zip(shards.tolist(), documents.tolist(), strict=True), itemgetter(0)):
            start = int(self._ends[shard - 1]) if shard else 0
            out += self._read_shard(shard, [document - start for _, document in run])
        return out

    def _read_shard(self, shard: int, records: list[int]) -> list[np.ndarray]:
        path = shard_file(self.folder, shard)
        try:
            read = self._reader(shard).read(records)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{path} is damaged at one of the records {records[0]} to {records[-1]} ({reason}): prepare "
                f"{self.folder} again."
            ) from error
        return [np.frombuffer(record, self.dtype) for record in read]

    def _reader(self, shard: int) -> Any:
        if not hasattr(self._open, "reader"):
            self._open.reader = functools.lru_cache(_OPEN_FILES)(functools.partial(_open_shard, self.folder))
        return self._open.reader(shard)


def _open_shard(folder: Path, shard: int) -> Any:
    path = os.fspath(shard_file(folder, shard))
    return array_record_module.ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=32_768)
