"""A file of predictions: a JSON object a line, so that scores can be computed again and an evaluation can go on.

The first line names the model. Each other one is what a model made of one prompt. A process that is killed leaves whole
lines and perhaps half of a last one, which the next drops.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meap_jax.errors import DataError
from meap_jax.files import parse_json

Record = dict[str, Any]


def prompt_hash(tokens: Sequence[int], **settings: Any) -> str:
    """The SHA-256 of a prompt's tokens and of what else decides the output, such as max_new_tokens."""
    digest = hashlib.sha256(np.asarray(tokens, "<i4").tobytes())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


class Predictions:
    """The predictions of one model on one task, in a file or in memory only."""

    def __init__(self, file: Path | None, task: str, fingerprint: str):
        """Reads what an earlier process left.

        Args:
          file: of JSON lines, which may not exist yet; None: nothing is written.
          task: its name.
          fingerprint: of the model.

        Raises:
          DataError: the file is of another model or task, or damaged; it stays as it is.
        """
        self._file = file
        self._header = {"task": task, "model": fingerprint}
        self.records: dict[str, Record] = {}  # By the hash of the prompt.
        if file is not None and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = parse_json(line)
                key = "model" if number == 1 else "prompt"
                if not isinstance(record, dict) or key not in record:
                    raise ValueError(f"it has no field {key}")
            except ValueError as error:
                raise DataError(f"{file}, line {number} is no prediction ({error}): delete the file.") from error
            if number > 1:
                self.records[record["prompt"]] = record
            elif record != self._header:
                raise DataError(
                    f"{file}, line 1 says that it holds predictions of model {str(record['model'])[:12]} on "
                    f"{record.get('task')}, but this is model {self._header['model'][:12]} on {self._header['task']}: "
                    "choose another --out, or delete it."
                )
        if len(whole) < len(data):
            with file.open("r+b") as half_written:
                half_written.truncate(len(whole))

    def add(self, records: Iterable[Record]) -> None:
        """Appends records, and sees them onto the disk."""
        records = list(records)
        self.records |= {record["prompt"]: record for record in records}
        if self._file is None or not records:
            return
        is_new = not self._file.exists() or not self._file.stat().st_size
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            for record in [self._header] * is_new + records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_records(file: Path) -> tuple[Record, list[Record]]:
    """The first line of a file of predictions, and the records behind it.

    Raises:
      DataError: it is no such file.
    """
    try:
        header, *records = map(parse_json, file.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} holds no predictions ({error}).") from error
    return header, records
