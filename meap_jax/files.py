"""Files that others wrote: what is no file is refused, and JSON is parsed with every fault as a ValueError."""

import json
import os
import stat
from typing import Any

from meap_jax.errors import DataError


def parse_json(text: str | bytes) -> Any:
    """Parses JSON that anybody may have written.

    Raises:
      ValueError: it is none, or is beyond what Python reads: nested thousands deep, a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Stops before a named pipe, a socket, a device or a folder is opened, from which reading may never end.

    Args:
      path: of something that is there, on this machine.

    Raises:
      DataError: it is none of a file.
      OSError: nothing is there, or it can't be looked at.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}
    kind = next((name for is_it, name in kinds.items() if is_it(mode)), "a device")
    raise DataError(f"{os.fspath(path)} is {kind}, but must be a file.")
