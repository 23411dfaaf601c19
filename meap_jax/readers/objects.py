"""Records of evaluation data: a JSON object a line, compressed or not, each with the fields that it must have."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from meap_jax.errors import DataError
from meap_jax.files import check_is_file, parse_json
from meap_jax.readers import lines
from meap_jax.readers.records import BadRecord, decode


def read_lines(file: Path, texts: Collection[str] = (), field: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, object) of each line that isn't blank; the place is for messages, "FILE, line 3".

    Args:
      file: .jsonl, or .jsonl.gz.
      texts: fields that each object must have, as texts that aren't blank; with them, no others are returned.
      field: of the config, that names the file.

    Raises:
      DataError: naming file and line.
    """
    name = f"{field} is {file}, which" if field else str(file)
    number = 0
    try:
        check_is_file(file)
        with file.open("rb") as opened:
            found = lines.decompressed(opened, ".gz") if file.suffix == ".gz" else iter(lambda: opened.read(2**20), b"")
            for number, line in enumerate(lines.split_lines(found), start=1):
                place = f"{file}, line {number}"
                if isinstance(line, lines.TooLong):
                    raise DataError(f"{place} is longer than {lines.MAX_LINE // 2**20} MiB.")
                if not line.strip():
                    continue
                try:
                    record = parse_json(decode(line))
                except ValueError as error:
                    raise DataError(f"{place} is not JSON ({error}).") from error
                if not isinstance(record, dict):
                    raise DataError(f"{place} is no object, but {type(record).__name__}.")
                yield place, {key: text_of(record, key, place) for key in texts} if texts else record
    except (OSError, BadRecord) as error:
        reason = f"it {error.reason}, {error.within}" if isinstance(error, BadRecord) else error.strerror or error
        raise DataError(f"{name} can't be read{f' after line {number}' if number else ''} ({reason}).") from error
    if not number:
        raise DataError(f"{name} holds nothing.")


def text_of(record: dict[str, Any], key: str, place: str) -> str:
    """A field of a record that must be a text.

    Raises:
      DataError: it is missing, blank or something else.
    """
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "no field" if key not in record else "no text in the field"
        raise DataError(f"{place} has {found} {key!r}.")
    return value
