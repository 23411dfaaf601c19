"""Finding and opening files: folders of this machine with the standard library, URLs with fsspec."""

import glob
import os
from collections.abc import Iterator
from typing import IO, NamedTuple

import fsspec

from meap_jax.errors import ConfigError, DataError
from meap_jax.files import check_is_file
from meap_jax.paths import is_url
from meap_jax.readers.parts import Part

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}  # where fsspec finds these


class File(NamedTuple):
    """A file that is there."""

    path: str
    size: int  # bytes


def find_files(path: str, suffixes: tuple[str, ...]) -> list[File]:
    """The files with one of these suffixes at a path, in the order of their names, folder by folder.

    Args:
      path: a file, a folder (searched at every depth, names that begin with a dot are skipped), or a pattern for
        either with *, ? and [], where ** stands for folders at every depth; or the URL of one.
      suffixes: in lower case. They match names in upper case too.

    Raises:
      ConfigError: nothing is there, or a file with another suffix, or the URL is of an unknown kind.
      DataError: the folder has no such file, or can't be listed; or one of them is a named pipe or the like.
    """
    try:
        found = _find_in_bucket(path) if is_url(path) else _find_here(os.path.expanduser(path))
        if found is None:
            raise ConfigError(f"the path is {path!r}, which does not exist: give a file, a folder or a pattern.")
        files = []
        for name, size in found.items():
            if name.lower().endswith(suffixes):
                if size is None:
                    check_is_file(name)
                    size = os.path.getsize(name)
                files.append(File(name, size))
    except OSError as error:
        raise DataError(f"{error.filename or path} can't be read: {error.strerror or error}.") from error
    kinds = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
    if not files and [os.path.basename(name) for name in found] == [os.path.basename(path)]:
        raise ConfigError(f"the path is {path!r}, but must be a file that ends in {kinds}.")
    if not files:
        raise DataError(f"{path} holds no file that ends in {kinds}.")
    return sorted(files, key=lambda file: file.path.split("/"))


def open_part(part: Part) -> IO[bytes]:
    """Opens the file of a part.

    Raises:
      DataError: it has vanished, can't be read, or isn't as long as it was when the parts were made.
    """
    try:
        if is_url(part.path):
            system, path = _filesystem(part.path)
            size = system.info(path)["size"]
            file = system.open(path, "rb")
        else:
            check_is_file(part.path)
            size = os.stat(part.path).st_size
            file = open(part.path, "rb")
    except FileNotFoundError as error:
        raise DataError(f"{part.path} was there when the work was divided, but is gone.") from error
    except OSError as error:
        raise DataError(f"{part.path} can't be read: {error.strerror or error}.") from error
    expected = part.start + part.num_bytes
    if part.stop is None and size != expected:
        file.close()
        raise DataError(f"{part.path} has {size:,} bytes, but had {expected:,} when the work was divided.")
    return file


def _find_here(path: str) -> dict[str, int | None] | None:
    """The files at a path or pattern, whose sizes are still unknown; None if nothing is there."""
    roots = [path]
    if not os.path.exists(path):
        roots = glob.glob(path, recursive=True)  # [path] itself for a link to nowhere: the error comes when it is read
    found = (name for root in roots for name in (_walk(root, frozenset()) if os.path.isdir(root) else [root]))
    return dict.fromkeys(found) if roots else None


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
    """The files below a folder. Links are followed, but not to a folder that this one is in."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for name in os.listdir(folder):
        child = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(child):
            yield from _walk(child, above | {real})
        else:
            yield child


def _find_in_bucket(url: str) -> dict[str, int | None] | None:
    """The files at a URL or pattern and their sizes in bytes; None if nothing is there."""
    system, path = _filesystem(url)
    found = {}
    try:
        roots = [path]
        if not system.exists(path):
            roots = [root for root in system.glob(path) if not root.rpartition("/")[2].startswith(".")]
        for root in roots:
            if system.isfile(root):
                found[root] = system.size(root)
                continue
            for name, info in system.find(root, detail=True).items():
                if not any(below.startswith(".") for below in name.removeprefix(root).split("/")):
                    found[name] = info["size"]
    except Exception as error:  # each kind of store has its own errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{url} can't be listed: {reason}") from error
    return {system.unstrip_protocol(name): size for name, size in found.items()} if roots else None


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        kind = url.partition("://")[0]
        package = _PACKAGES.get(kind)
        command = f"pip install {package}" if package else " ".join(str(error).split())
        raise ConfigError(f"the path is {url!r}, and {kind}:// needs a package that isn't there: {command}") from error
    except ValueError as error:
        raise ConfigError(f"the path is {url!r}, and fsspec does not know its kind: {error}.") from error
