"""Writes down what all Python threads of this process are doing."""

import faulthandler
import logging
import sys
import tempfile

from etils import epath

_log = logging.getLogger(__name__)


def dump_stacks(folder: epath.Path, index: int) -> None:
    """Writes the stacks of all threads of this process to stderr and to `folder/host-<index>.txt`.

    Any thread can call it, also while the main thread hangs. A folder that can't be written is passed over with a
    warning.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)  # Writes to a descriptor, past Python's buffers.
        file.seek(0)
        text = file.read().decode(errors="replace")
    print(f"stacks of host {index}:\n{text}", file=sys.stderr, flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"host-{index}.txt").write_text(text)
    except (OSError, ImportError) as error:  # ImportError: a bucket whose file system is not installed.
        _log.warning("the stacks can't be written to %s: %s", folder, error)
