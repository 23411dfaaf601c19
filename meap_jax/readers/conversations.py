"""Conversations in files, as Alpaca, ShareGPT or OpenAI write them: JSON in lines or in one array, or Parquet."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from meap_jax.errors import ConfigError, DataError
from meap_jax.readers import lines, parquet
from meap_jax.readers.files import SUFFIXES, FileCorpus, numbered_lines
from meap_jax.readers.parts import Part, Skips
from meap_jax.readers.records import MARK, BadRecord, Selection, checked, decode, parse_json
from meap_jax.readers.storage import open_part

_COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system", "system_prompt")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_BLANKS = re.compile(r"[ \t\r\n]*")
_PART_BYTES = 2**30  # Large, since what comes before a part is read for the number of its first line.
_MOST_DECOMPRESSED = 2**29  # Bytes of a compressed array.
_HEAD, _CHUNK = 2**14, 2**20  # Bytes that are read at once, to see how a file begins, and otherwise.


class Conversation(NamedTuple):
    """Messages, a user's and an assistant's by turns and an answer at the end, and where they come from."""

    messages: tuple[Mapping[str, str], ...]  # {"role": "system", "user" or "assistant", "content": text}.
    line: int  # Of its file, on which its record begins, from 1; in Parquet the number of the record.
    place: str  # For messages: "FILE, line 3".

    @property
    def turns(self) -> "Iterator[Conversation]":
        """Each question with its answer as a conversation, without what was said before, but the system's message."""
        system = self.messages[: self.messages[0]["role"] == "system"]
        for i in range(len(system), len(self.messages), 2):
            yield self._replace(messages=system + self.messages[i : i + 2])


def open_conversations(path: str, *, where: str = "") -> "ConversationCorpus":
    """The conversations at a path. Nothing is read yet.

    Args:
      path: as of `open_corpus`, but neither .txt nor tfds:. A .json file may hold one array of records too.
      where: only records in which a field has this value are taken: `language=en`.

    Raises:
      ConfigError: `where` names no field, or the path is one of TensorFlow Datasets.
    """
    if path.startswith("tfds:"):
        raise ConfigError(f"the path is {path!r}, but conversations are read from .json, .jsonl and .parquet files.")
    suffixes = tuple(suffix for suffix in SUFFIXES if suffix != ".txt")
    selection = Selection.parse("messages", where)
    return ConversationCorpus(FileCorpus(path, selection, part_bytes=_PART_BYTES, suffixes=suffixes))


@dataclass(frozen=True)
class ConversationCorpus:
    """Conversations in files, that can be read in parts as a `Corpus` can. An array is one part."""

    files: FileCorpus

    def parts(self) -> list[Part]:
        """See `Corpus`."""
        found: list[Part] = []
        for path, group in groupby(self.files.parts(), attrgetter("path")):
            parts = list(group)
            if len(parts) > 1 and _is_array(parts[0]):
                parts = [Part(path, num_bytes=sum(part.num_bytes for part in parts))]
            found += parts
        return found

    def read(self, part: Part, skips: Skips) -> Iterator[Conversation]:
        """The conversations of a part, in order.

        Raises:
          DataError: `skips` has reached its limit, the part has vanished or changed, or an array is broken.
        """
        selection = self.files.selection
        records: Iterable[tuple[str, int, Any]]
        parse: Callable[[Any], Any] = parse_json
        if part.path.lower().endswith(".parquet"):
            columns = [*_COLUMNS, *(".".join(names) for names in (selection.where,) if names)]
            records, parse = parquet.rows(part, columns, skips), parquet.as_dict
        elif not part.start and _is_array(part):
            records, parse = _elements(part), lambda element: element
        else:
            records = _lines(part, skips)
        for place, line, record in records:
            try:
                parsed = parse(record)
                if selection.takes(parsed):
                    yield Conversation(tuple(messages_of(parsed)), line, place)
            except BadRecord as bad:
                skips.add(bad.reason, f"{place}, {bad.within}" if bad.within else place)


def messages_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a record, whose fields show how it is written.

    - Alpaca: `instruction`, `output` and perhaps `input`, which goes on behind the instruction on a line of its own
      and is known to templates as `input` too;
    - ShareGPT: `conversations` of {from: human | gpt | system, value};
    - OpenAI: `messages` of {role: user | assistant | system, content}.

    A field `system` or `system_prompt` is a message of the system in front. Blank ones are none.

    Raises:
      BadRecord: it is no conversation that alternates between a user and an assistant, the latter at the end.
    """
    name = next((name for name in ("messages", "conversations") if record.get(name) is not None), None)
    if name is not None:
        said = _said(record[name], name)
    elif record.get("instruction") is not None:
        question = {"role": "user", "content": _text(record, "instruction")}
        if more := _text(record, "input", may_be_blank=True):
            question |= {"content": f"{question['content']}\n{more}", "instruction": question["content"], "input": more}
        said = [question, {"role": "assistant", "content": _text(record, "output")}]
    else:
        raise BadRecord("has none of the fields `messages`, `conversations` and `instruction`")

    first = int(said[0]["role"] == "system")
    for i, message in enumerate(said[first:]):
        if message["role"] != ("user", "assistant")[i % 2]:
            reason = "is out of order: behind a system's message, if there is one, users and assistants take turns"
            raise BadRecord(reason, f"message {first + i + 1} ({message['role']})")
    if said[-1]["role"] != "assistant":
        raise BadRecord("does not end with an answer")
    for name in () if first else ("system", "system_prompt"):
        if system := _text(record, name, may_be_blank=True):
            return [{"role": "system", "content": system}, *said]
    return said[1:] if first and not said[0]["content"] else said


def _said(entries: Any, name: str) -> list[dict[str, str]]:
    """The messages of a list, whose roles may come in any order."""
    if not isinstance(entries, list) or not entries:
        raise BadRecord(f"has no list of messages in `{name}`")
    said = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise BadRecord("is not an object", f"message {number}")
        who, what = ("from", "value") if entry.get("from") is not None else ("role", "content")
        role = _ROLES.get(str(entry.get(who)))
        if role is None:
            raise BadRecord(f"has a role that is none of {', '.join(_ROLES)}", f"message {number} ({entry.get(who)!r})")
        text = _text(entry, what, f"message {number}, ", may_be_blank=role == "system")
        said.append({"role": role, "content": text})
    return said


def _text(record: Mapping[str, Any], name: str, within: str = "", may_be_blank: bool = False) -> str:
    """A field that is a text; "" for one that may be blank, and is or isn't there."""
    text = record.get(name)
    if may_be_blank and (text is None or (isinstance(text, str) and not text.strip())):
        return ""
    if not isinstance(text, str):
        raise BadRecord("is not a string" if name in record else "is missing", f"{within}`{name}`")
    try:
        return checked(text)
    except BadRecord as bad:
        raise BadRecord(bad.reason, f"{within}`{name}`") from bad


def _lines(part: Part, skips: Skips) -> Iterator[tuple[str, int, bytes]]:
    """The place, the number in the file, and the bytes of each line that isn't blank."""
    before = 0
    if part.start:  # The line that the byte before is in, or ends, was begun before too: of it no newline is counted.
        with open_part(part) as file:
            left = part.start - 1
            before = 1
            while left and (chunk := file.read(min(left, _CHUNK))):
                before += chunk.count(b"\n")
                left -= len(chunk)
    for number, _, line in numbered_lines(part, skips):
        yield f"{part.path}, line {before + number}", before + number, line


def _is_array(part: Part) -> bool:
    """Whether the first character of a file of JSON that isn't blank is a bracket."""
    try:
        for chunk in _chunks(part, _HEAD):
            if begun := chunk.removeprefix(MARK).strip():
                return begun.startswith(b"[")
    except BadRecord:  # Damage: it is reported where the lines are read.
        pass
    return False


def _elements(part: Part) -> Iterator[tuple[str, int, Any]]:
    """The place, the line on which it begins, and the value of each element of an array.

    Raises:
      DataError: it is no array of JSON, the file is damaged, or it holds far more than its size on the disk.
    """
    try:
        pieces, room = [], max(part.num_bytes, _MOST_DECOMPRESSED)
        for piece in _chunks(part, _CHUNK):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise DataError(
                    f"{part.path} holds an array of more than {_MOST_DECOMPRESSED // 2**20} MiB, and an array is read "
                    "whole: write its records as lines of a .jsonl.gz or .jsonl.zst, or decompress it."
                )
        text = decode(b"".join(pieces))
    except BadRecord as bad:
        raise DataError(f"{part.path}, {bad.within} {bad.reason}.") from bad
    decoder = json.JSONDecoder()
    seen, line = 0, 1
    position = _behind_blanks(text, text.index("[") + 1)
    is_over = text.startswith("]", position)  # Nothing is in it.
    try:
        while not is_over:
            line += text.count("\n", seen, position)
            element, end = decoder.raw_decode(text, position)
            yield f"{part.path}, line {line}", line, element
            seen, end = position, _behind_blanks(text, end)
            is_over = text.startswith("]", end)
            if not is_over and not text.startswith(",", end):
                raise json.JSONDecodeError("a comma or a bracket is missing", text, end)
            position = end if is_over else _behind_blanks(text, end + 1)
        if (rest := _behind_blanks(text, position + 1)) < len(text):
            raise json.JSONDecodeError("something is behind the array", text, rest)
    except json.JSONDecodeError as error:
        place = f"{part.path}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{place} is not JSON as an array has it: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{part.path}, line {line} is JSON beyond what Python reads.") from error


def _behind_blanks(text: str, position: int) -> int:
    found = _BLANKS.match(text, position)
    assert found is not None
    return found.end()


def _chunks(part: Part, size: int) -> Iterator[bytes]:
    """What a file holds, from its beginning; decompressed.

    Raises:
      BadRecord: it is corrupt or cut off.
    """
    suffix = os.path.splitext(part.path.lower())[1]
    with open_part(part) as file:
        if suffix in lines.COMPRESSED:
            yield from lines.decompressed(file, suffix)
        else:
            yield from iter(lambda: file.read(size), b"")
