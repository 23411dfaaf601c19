"""Paths of this machine and URLs of buckets."""

import os
import pathlib

from etils import epath


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this names a place in a bucket, such as gs://bucket/run, rather than on a disk of this machine."""
    return "://" in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """A local path from the root; a bucket's as it is."""
    return path if is_url(path) else path.expanduser().resolve()


def write_whole(path: epath.Path | pathlib.Path, content: str | bytes) -> None:
    """Replaces a file as a whole: whoever reads it, whenever this is interrupted, finds the old content or the new."""
    content = content.encode() if isinstance(content, str) else content
    if is_url(path):
        path.write_bytes(content)  # Buckets replace objects as a whole.
        return
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # Else the name may be on disk before the content.
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
