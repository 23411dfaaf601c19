"""Paths of this machine and URLs of buckets."""

import os

from etils import epath


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this names a place in a bucket, such as gs://bucket/run, rather than on a disk of this machine."""
    return "://" in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """A local path from the root; a bucket's as it is."""
    return path if is_url(path) else path.expanduser().resolve()
