"""A corpus in files: .txt, lines of JSON, compressed or not, and Parquet."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

from meap_jax.readers import lines, parquet
from meap_jax.readers.parts import PART_BYTES, Part, Skips
from meap_jax.readers.records import BadRecord, Selection, checked, decode, parse_json, select
from meap_jax.readers.storage import File, find_files, open_part

SUFFIXES = (".txt", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
TOO_LONG = f"is longer than {lines.MAX_LINE // 2**20} MiB"  # A record.
_OPENERS = 16  # threads that look into files while the work is divided; each waits for its disk or bucket


@dataclass(frozen=True)
class FileCorpus:
    """The files at a path (see `open_corpus`), as a `Corpus`.

    Uncompressed lines are divided by bytes, Parquet by row groups; other files are one part each.
    """

    path: str
    selection: Selection
    part_bytes: int = PART_BYTES
    suffixes: tuple[str, ...] = SUFFIXES

    def parts(self) -> list[Part]:
        """See `Corpus`."""
        with ThreadPoolExecutor(_OPENERS) as pool:
            return [part for parts in pool.map(self._divide, find_files(self.path, self.suffixes)) for part in parts]

    def _divide(self, file: File) -> list[Part]:
        whole = Part(file.path, 0, None, file.size)
        name = file.path.lower()
        if file.size < 1.5 * self.part_bytes or not name.endswith((".jsonl", ".json", ".parquet")):
            return [whole]
        if name.endswith(".parquet"):
            return parquet.divide(whole, self.part_bytes)
        number = round(file.size / self.part_bytes)
        cuts = [file.size * index // number for index in range(number + 1)]
        parts = [Part(file.path, start, stop, stop - start) for start, stop in pairwise(cuts)]
        return [*parts[:-1], parts[-1]._replace(stop=None)]

    def read(self, part: Part, skips: Skips) -> Iterator[str]:
        """See `Corpus`."""
        name = part.path.lower()
        if name.endswith(".parquet"):
            return parquet.read(part, self.selection, skips)
        if name.endswith(".txt"):
            return _read_txt(part, skips)
        return select(_lines(part, skips), self.selection, skips, parse_json)


def _read_txt(part: Part, skips: Skips) -> Iterator[str]:
    with open_part(part) as file:
        data = file.read()
    try:
        yield checked(decode(data))
    except BadRecord as bad:
        skips.add(bad.reason, f"{part.path}, {bad.within}" if bad.within else part.path)


def _lines(part: Part, skips: Skips) -> Iterator[tuple[str, bytes]]:
    """The lines of a part that aren't blank, with their places."""
    for number, position, line in numbered_lines(part, skips):
        # Only in the first part of a file are the lines before known.
        yield f"{part.path}, line {f'at byte {position}' if part.start else number}", line


def numbered_lines(part: Part, skips: Skips) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a part that aren't blank; a damaged file is skipped from the damage on.

    Returns:
      Of each line its number in the part, from 1, the position of its first byte in a file that isn't compressed, and
      its bytes.
    """
    number = 0
    with open_part(part) as file:
        try:
            for number, (position, line) in enumerate(_positioned(part, file), start=1):
                if isinstance(line, lines.TooLong):
                    skips.add(TOO_LONG, f"{part.path}, line {number}")
                elif line and not line.isspace():
                    yield number, position, line
        except BadRecord as damage:
            skips.add(damage.reason, f"{part.path}, {damage.within}, after line {number}")


def _positioned(part: Part, file: IO[bytes]) -> Iterator[tuple[int, bytes | lines.TooLong]]:
    suffix = os.path.splitext(part.path.lower())[1]
    if suffix in lines.COMPRESSED:
        # Positions mean nothing here.
        return ((0, line) for line in lines.split_lines(lines.decompressed(file, suffix)))
    return lines.line_range(file, part.start, part.stop)
