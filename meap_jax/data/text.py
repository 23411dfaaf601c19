"""The user's own text files."""

import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from meap_jax.config import ConfigError
from meap_jax.data.documents import DataError

_SUFFIXES = (".txt", ".jsonl")


def read_text(path: str) -> Iterator[str]:
    """Reads documents from a file or a folder, one after the other, in the order of sorted paths.

    Args:
      path: a .txt file (one document), a .jsonl file (one document a line, in its field `text`),
        or a folder that is searched for both at every depth; names that begin with a dot are
        skipped. Local, or a bucket's URL that `etils.epath` knows (gs://...).

    Yields:
      The documents, unchanged; those of blank space alone are left out.

    Raises:
      ConfigError: the path doesn't exist or is no such file.
      DataError: there is no such file or no text at all, a line is no JSON object with a string
        `text`, or bytes are not UTF-8; names the file and the line.
    """
    root = epath.Path(path)
    if not root.exists():
        raise ConfigError(f"data.path is {path!r}, which does not exist: give a folder of .txt or .jsonl files.")
    if not root.is_dir() and root.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"data.path is {path!r}, a file that is neither .txt nor .jsonl.")
    files, documents = 0, 0
    for file in _files(root):
        files += 1
        for text in _jsonl(file) if file.suffix.lower() == ".jsonl" else _txt(file):
            if text.strip():
                documents += 1
                yield text
    if not files:
        raise DataError(f"The folder {path} holds no .txt or .jsonl file.")
    if not documents:
        raise DataError(f"The files in {path} hold no text, only blank space.")


def _files(path: epath.Path) -> Iterator[epath.Path]:
    if not path.is_dir():
        if path.suffix.lower() in _SUFFIXES:
            yield path
        return
    for child in sorted(path.iterdir(), key=lambda child: child.name):
        if not child.name.startswith("."):
            yield from _files(child)


def _txt(file: epath.Path) -> Iterator[str]:
    yield _decode(file.read_bytes(), str(file))


def _jsonl(file: epath.Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                record: Any = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON: {error.msg}.") from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{where} is not an object with a field `text` that is a string.")
            if not _is_utf8(text):
                raise DataError(f"{where} escapes half of a surrogate pair, which is no character.")
            yield text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # without the mark that some editors put in front
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}.") from error


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
