"""The log of requests to a judge: each is a JSON object a line, with what came of it.

So it is both the cache of replies and the count of what was spent. A process that is killed loses the requests that are
under way, and may leave half a line, which the next drops.
"""

import json
import os
import threading
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from meap_jax.errors import DataError
from meap_jax.files import parse_json


class RequestLog:
    """Requests to all judges, in a file; threads may share it."""

    def __init__(self, file: Path):
        """Reads what an earlier process left, if it left the file.

        Raises:
          DataError: a line is no request; the file stays as it is.
        """
        self._file, self._lock = file, threading.Lock()
        self._replies: dict[str, list[str]] = defaultdict(list)
        self._counts: Counter[str] = Counter()
        if file.exists():
            self._read()

    def _read(self) -> None:
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = parse_json(line)
                if not isinstance(record, dict):
                    raise ValueError("it is no object")
                for name in ("judge", "request", "reply" if "reply" in record else "error"):
                    if not isinstance(record.get(name), str):
                        raise ValueError(f"it has no text {name}")
            except ValueError as error:
                raise DataError(
                    f"{self._file}, line {number} is no request to a judge ({error}): delete that line."
                ) from error
            self._take(record)
        if len(whole) < len(data):
            with self._file.open("r+b") as half_written:
                half_written.truncate(len(whole))

    def _take(self, record: dict[str, Any]) -> None:
        self._counts[record["judge"]] += 1
        if "reply" in record:
            self._replies[record["request"]].append(record["reply"])

    def count(self, judge: str) -> int:
        """The requests to this model, whatever came of them."""
        return self._counts[judge]

    def replies(self, request: str) -> list[str]:
        """The replies to the request with this hash, in order."""
        with self._lock:
            return list(self._replies.get(request, ()))

    def add(self, judge: str, request: str, *, reply: str | None = None, error: str | None = None) -> None:
        """Appends a request with its reply, or with the error that came in place of one."""
        record = {"judge": judge, "request": request} | ({"error": error} if reply is None else {"reply": reply})
        with self._lock:
            self._take(record)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
