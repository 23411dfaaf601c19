"""Texts in Parquet files, read row group by row group and batch by batch."""

from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from meap_jax.errors import DataError
from meap_jax.readers.parts import Part, Skips
from meap_jax.readers.records import BadRecord, Selection, select
from meap_jax.readers.storage import open_part

_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
_BUFFER = 2**20  # bytes of a column that are read at once, instead of all it has in a row group
_BATCH_BYTES = 2**24  # what a batch of rows may come to, by the average of what is read of its row group ...
_BATCH_ROWS = 16  # ... and the rows that it has at most; larger ones are slower, since each takes fresh memory ...
_REPEATED_BYTES = 2**29  # ... and what it may come to if all its rows repeat one value, which a column stores once


def divide(whole: Part, part_bytes: int) -> list[Part]:
    """Runs of row groups of about `part_bytes` bytes; the whole file where its footer can't be read.

    Raises:
      DataError: the file can't be opened.
    """
    parts: list[Part] = []
    with open_part(whole) as file:
        try:
            footer = _open(file).metadata
        except _DAMAGE as error:
            _raise_if_not_damage(error)
            return [whole]  # `read` is who can skip it
    start = num_bytes = 0
    for group in range(footer.num_row_groups):
        num_bytes += _group_bytes(footer, group)
        if num_bytes >= part_bytes or group == footer.num_row_groups - 1:
            parts.append(Part(whole.path, start, group + 1, num_bytes))
            start, num_bytes = group + 1, 0
    return parts


def read(part: Part, selection: Selection, skips: Skips) -> Iterator[str]:
    """The texts of a part. A row group is skipped from a damaged page on, a file whose footer is damaged as one record.

    Raises:
      DataError: the file has vanished or changed, or the limit of `skips` is reached.
    """
    records = ((place, record) for place, _, record in rows(part, selection.columns, skips))
    return select(records, selection, skips, as_dict)


def rows(
    part: Part, columns: Sequence[str], skips: Skips
) -> Iterator[tuple[str, int, dict[str, Any] | pa.RecordBatch]]:
    """The rows of a part, what can't be read left out as `read` says.

    Args:
      part: of a file.
      columns: those that are read, all that are within them too; others need not be there.
      skips: counts what is left out.

    Returns:
      Of each row its place, its number in the file, from 1, and what `as_dict` makes a record of.

    Raises:
      DataError: as `read`.
    """
    with open_part(part) as file:
        try:
            parquet = _open(file)
        except _DAMAGE as error:
            _raise_if_not_damage(error)
            if part.stop is not None:
                raise DataError(f"{part.path} had a footer when the work was divided, but is damaged now.") from error
            skips.add("has no footer that can be read", f"{part.path}, byte {part.num_bytes}")
            return
        footer = parquet.metadata
        groups = range(part.start, footer.num_row_groups if part.stop is None else part.stop)
        if part.stop is not None and (
            part.stop > footer.num_row_groups or part.num_bytes != sum(_group_bytes(footer, group) for group in groups)
        ):
            raise DataError(f"{part.path} has other row groups than when the work was divided.")
        before = sum(footer.row_group(group).num_rows for group in range(part.start))
        for group in groups:
            for row, record in _rows_of_group(parquet, group, f"{part.path}, row group {group}", columns, skips):
                yield f"{part.path}, row group {group}, row {row}", before + row + 1, record
            before += footer.row_group(group).num_rows


def _rows_of_group(
    parquet: pq.ParquetFile, group: int, place: str, columns: Sequence[str], skips: Skips
) -> Iterator[tuple[int, dict[str, Any] | pa.RecordBatch]]:
    about = parquet.metadata.row_group(group)
    if not about.num_rows:
        return
    size, row = _rows_of_a_batch(about, columns), 0
    batches = parquet.iter_batches(size, row_groups=[group], columns=list(columns), use_threads=False)
    while row < about.num_rows:
        try:
            batch = next(batches)
        except (StopIteration, *_DAMAGE) as error:  # fewer rows than the footer says, or a page that can't be read
            _raise_if_not_damage(error)
            skips.add("is corrupt", f"{place}, row {row}", about.num_rows - row)
            return
        yield from enumerate(_records(batch), start=row)
        row += batch.num_rows


def _rows_of_a_batch(group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    """How many rows of these columns are read at once: so many that their batch has a bounded size."""
    chunks = (group.column(index) for index in range(group.num_columns))
    names = tuple(f"{column}." for column in columns)  # A list's elements are in a column within its own.
    sizes = [chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(names)]
    average, longest = max(1, sum(sizes) // group.num_rows), max([1, *sizes])
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // average, _REPEATED_BYTES // longest))


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | pa.RecordBatch]:
    """The rows; as batches of one where the UTF-8 of some is bad, which Arrow doesn't check before it makes a `str`."""
    try:
        records = batch.to_pylist()
    except UnicodeDecodeError:
        records = [batch.slice(row, 1) for row in range(batch.num_rows)]
    yield from records


def as_dict(record: dict[str, Any] | pa.RecordBatch) -> dict[str, Any]:
    """A row as a record.

    Raises:
      BadRecord: a text in it is not UTF-8.
    """
    if isinstance(record, dict):
        return record
    try:
        return record.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise BadRecord("is not UTF-8", f"byte {error.start}") from error


def _open(file: IO[bytes]) -> pq.ParquetFile:
    # Columns are read in buffers: a file whose rows are all in one group would else be in memory as a whole.
    return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


def _group_bytes(footer: pq.FileMetaData, group: int) -> int:
    about = footer.row_group(group)
    return sum(about.column(index).total_compressed_size for index in range(about.num_columns))


def _raise_if_not_damage(error: Exception) -> None:
    """Arrow reports damage by its own errors and in bare OSErrors; any other OSError is about a disk or a network."""
    bare = type(error) is OSError and error.errno is None
    if isinstance(error, OSError) and not bare and not isinstance(error, pa.ArrowException):
        raise error
