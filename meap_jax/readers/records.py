"""The text of a record, or why it has none."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from meap_jax.errors import ConfigError
from meap_jax.readers.parts import Skips

MARK = b"\xef\xbb\xbf"  # some editors put it in front of UTF-8
_MISSING = object()


class BadRecord(Exception):
    """A record that must be left out.

    Attributes:
      reason: goes on after a place, "is not JSON".
      within: where in the record, "column 3"; may be empty.
    """

    def __init__(self, reason: str, within: str = ""):
        super().__init__(reason, within)
        self.reason = reason
        self.within = within


class Selection(NamedTuple):
    """Which field is the text, and which records are taken."""

    field: tuple[str, ...]  # the names on the way to it
    where: tuple[str, ...] = ()  # the same; empty: all records are taken
    value: str = ""

    @classmethod
    def parse(cls, field: str, where: str = "") -> "Selection":
        """From `meta.text` and `meta.name=value`.

        Raises:
          ConfigError: a name is empty, or `where` has no `=`.
        """
        name, equals, value = where.partition("=")
        if not all(field.split(".")):
            raise ConfigError(f"field is {field!r}, but must be a field's name, such as text or meta.text.")
        if where and not (equals and all(name.split("."))):
            raise ConfigError(f"where is {where!r}, but must be FIELD=VALUE, such as meta.language=en.")
        return cls(tuple(field.split(".")), tuple(name.split(".")) if where else (), value)

    @property
    def columns(self) -> list[str]:
        """The dotted names of the fields that `text` looks at."""
        return [".".join(names) for names in (self.field, self.where) if names]

    def takes(self, record: Any) -> bool:
        """Whether `where` takes a record.

        Raises:
          BadRecord: it is no object.
        """
        if not isinstance(record, dict):
            raise BadRecord("is not an object")
        return not self.where or _as_string(_find(record, self.where)) == self.value

    def text(self, record: Any) -> str | None:
        """The text of a record, unchanged, or None if `where` leaves it out.

        Raises:
          BadRecord: it has no such text.
        """
        if not self.takes(record):
            return None
        text, name = _find(record, self.field), ".".join(self.field)
        if text is _MISSING:
            raise BadRecord(f"has no field `{name}`")
        if isinstance(text, bytes):
            text = decode(text)
        if not isinstance(text, str):
            raise BadRecord(f"has a field `{name}` that is not a string")
        return checked(text)


def select(
    records: Iterable[tuple[str, Any]], selection: Selection, skips: Skips, parse: Callable[[Any], Any] = lambda it: it
) -> Iterator[str]:
    """The texts of records, each given with its place; bad ones go to `skips`.

    Args:
      records: places and records, or what `parse` makes records of.
      selection: which of them, and which of their fields.
      skips: counts the bad ones.
      parse: may raise `BadRecord`.
    """
    for place, record in records:
        try:
            text = selection.text(parse(record))
        except BadRecord as bad:
            skips.add(bad.reason, f"{place}, {bad.within}" if bad.within else place)
        else:
            if text is not None:
                yield text


def parse_json(line: bytes) -> Any:
    """A line of JSON.

    Raises:
      BadRecord: it is none.
    """
    try:
        return json.loads(decode(line))
    except json.JSONDecodeError as error:
        raise BadRecord("is not JSON", f"column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise BadRecord("is JSON beyond what Python reads") from error


def decode(data: bytes) -> str:
    """UTF-8, without the mark that some editors put in front.

    Raises:
      BadRecord: it is no UTF-8.
    """
    try:
        return data.removeprefix(MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        mark = len(data) - len(error.object)
        raise BadRecord("is not UTF-8", f"byte {mark + error.start}") from error


def checked(text: str) -> str:
    """The text, if it is one.

    Raises:
      BadRecord: it is blank space alone, or UTF-8 can't hold it.
    """
    if not text or text.isspace():
        raise BadRecord("is blank")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecord("escapes half of a surrogate pair, which is no character") from error
    return text


def _find(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    found: Any = record
    for name in names:
        found = found.get(name, _MISSING) if isinstance(found, dict) else _MISSING
    return found


def _as_string(value: Any) -> str:
    """How `where` spells a value: as text has it, numbers in digits, true and false as JSON does."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value).lower() if isinstance(value, bool) else str(value)
