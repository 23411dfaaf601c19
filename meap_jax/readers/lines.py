"""Lines of files that may be compressed, with memory for one chunk and one line at a time."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import zstandard

from meap_jax.readers.records import BadRecord

MAX_LINE = 2**25  # Bytes. What a line of JSON becomes in memory can be forty times as much.
_CHUNK = 2**20
# Small, since what comes out of it is held at once: of gzip at most a thousand times as much, of zst 32,000 times.
_COMPRESSED_CHUNK = {".gz": 2**14, ".zst": 2**10}
# What makes the decompressor of a stream, by the file's suffix; that of zst takes any window size, which is 2 GiB at
# most, of which it touches as much as comes out.
COMPRESSED: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
}
_ERRORS = (zlib.error, zstandard.ZstdError)


class TooLong:
    """What stands for a line of more than `MAX_LINE` bytes, which nobody keeps; it has the line's length."""

    def __init__(self, length: int):
        """Of the line, in bytes."""
        self._length = length

    def __len__(self) -> int:
        return self._length


def line_range(file: IO[bytes], start: int, stop: int | None) -> Iterator[tuple[int, bytes | TooLong]]:
    """The lines whose first byte is in `start <= byte < stop`, each with the position of that byte.

    So ranges that follow each other give each line once, wherever they were cut: in a line, in a character or just
    behind a newline. Lines come without their newline.
    """
    file.seek(max(0, start - 1))
    lines = split_lines(iter(lambda: file.read(_CHUNK), b""))
    # The line that byte start - 1 is in, or ends, began before this range.
    position = start + len(next(lines, b"")) if start else 0
    while stop is None or position < stop:
        line = next(lines, None)
        if line is None:
            return
        yield position, line
        position += len(line) + 1


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes | TooLong]:
    r"""The lines of a stream, without their "\n"."""
    begun: list[bytes] = []
    size = 0  # Of the line that has begun, of which no more is kept once it is too long.

    def line() -> bytes | TooLong:
        return b"".join(begun) if size <= MAX_LINE else TooLong(size)

    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        size += len(first)
        begun = [*begun, first] if size <= MAX_LINE else []
        if others:
            yield line()
            begun = [others.pop()]
            size = len(begun[0])
            yield from others
    if size:
        yield line()


def decompressed(file: IO[bytes], suffix: str) -> Iterator[bytes]:
    """Chunks of what a file of one or more compressed streams holds, of `_CHUNK` bytes at most.

    Args:
      file: opened.
      suffix: of its name, one of `COMPRESSED`.

    Raises:
      BadRecord: the file is cut off, or corrupt; with the byte of the compressed file that was reached. What came
        before has been given. A checksum is at the end of a stream: what it finds to be wrong has been given too.
    """
    stream, position = None, 0
    while data := file.read(_COMPRESSED_CHUNK[suffix]):
        length = len(data)
        while data:
            if stream is None:
                data = data.lstrip(b"\0")  # tapes and the like pad .gz files
                if not data:
                    break
                stream = COMPRESSED[suffix]()
            try:
                text = stream.decompress(data)
            except _ERRORS as error:
                raise BadRecord("is corrupt", f"byte {position}") from error
            yield from (text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK))
            data = stream.unused_data if stream.eof else b""
            stream = None if stream.eof else stream
        position += length
    if stream is not None:
        raise BadRecord("ends too early", f"byte {position}")
