"""Manifests: JSON with the contents of a folder of prepared data and the options it was made with."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from meap_jax.config import flatten
from meap_jax.data.store import completed
from meap_jax.errors import ConfigError, DataError
from meap_jax.files import parse_json

LAYOUT_VERSION = 4  # Raise when a folder's files change their meaning.
MANIFEST = "manifest.json"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_name(value: Any) -> bool:
    """Whether it is the name of a file in its folder, and no path to somewhere else."""
    return isinstance(value, str) and value not in ("", ".", "..") and "\0" not in value and Path(value).name == value


def _has(*counts: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_is_count(value.get(name)) for name in counts)


_SPLITS = frozenset(("train", "validation", "test"))
# What the values of a manifest must be, where it has them: those on which reading depends.
_FORMS: dict[str, Callable[[Any], bool]] = {
    "options": lambda value: isinstance(value, dict),
    "tokenizer": lambda value: isinstance(value, str) or _has("num_tokens")(value),
    "tokenizer_hash": lambda value: isinstance(value, str),
    "fingerprint": lambda value: isinstance(value, str),
    "chat_template": lambda value: isinstance(value, str),
    "num_tokens": _is_count,
    "documents": lambda value: isinstance(value, dict) and _has(*_SPLITS)(value),
    "files": lambda value: all(map(_is_name, value)) and (type(value) is list or all(map(_is_count, value.values()))),
    "shards": lambda value: type(value) is list and all(map(_has("documents", "tokens", "bytes"), value)),
    "splits": lambda value: value.keys() == _SPLITS and all(map(_has("blocks", "tokens"), value.values())),
}


class _Manifest(dict):
    """A manifest; what should be in it and isn't is damage."""

    def __init__(self, content: Mapping[str, Any], path: Path):
        super().__init__(content)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise damaged(self._path)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes a manifest, which marks its folder as complete."""
    with completed(folder / MANIFEST) as partial:
        partial.write_text(json.dumps({"layout_version": LAYOUT_VERSION, **content}, indent=2), encoding="utf-8")


def damaged(path: Path) -> DataError:
    """The error about a file of prepared data that is missing, or isn't what was written."""
    return DataError(
        f"{path} is {'damaged' if path.is_file() else 'missing'}: delete {path.parent} to prepare it again."
    )


def check_options(group: str, folder: Path, wanted: Mapping[str, Any]) -> None:
    """Stops a config that wants something else than what was made.

    Raises:
      ConfigError: naming the fields that differ, with both values.
    """
    frozen = flatten(read_manifest(folder)["options"])
    new = flatten(json.loads(json.dumps(wanted)))
    for name in [name for name, value in new.items() if value is None and name.rpartition(".")[2] == "path"]:
        # Without a path the config takes what was prepared, wherever it came from, and what was held out beside it.
        new[name] = frozen.get(name)
        validation = name.removesuffix("path") + "validation"
        new[validation] = new.get(validation) or frozen.get(validation)
    changed = [
        f"{_field(group, name)} = {frozen.get(name)!r}, but the config wants {new.get(name)!r}"
        for name in sorted(frozen.keys() | new.keys())
        if frozen.get(name) != new.get(name)
    ]
    if changed:
        raise ConfigError(
            f"The data in {folder} was prepared with {'; '.join(changed)}: set data.prepared to another folder, or "
            "delete this one if no run needs it."
        )


def _field(group: str, name: str) -> str:
    """The config's name of an option."""
    if name == "vocab_size":
        return "model.vocab_size"
    if (option := name.rpartition(".")[2]) in ("template", "template_hash", "system", "turns"):
        return f"sft.{option}"
    field = f"{group}.{name}"
    for long, short in (
        ("data.sources.text.path", "data.path"),
        ("data.sources.retrieval.seed", "data.seed"),
        ("data.sources.retrieval.", "data.retrieval."),
    ):
        field = field.replace(long, short)
    return "data.holdout" if field.endswith(".holdout") else field


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder, of a source in it or of a plan.

    Raises:
      DataError: it is missing, damaged, or of another layout.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not a prepared data folder: it holds no {MANIFEST}.")
    try:
        manifest = parse_json(path.read_bytes())
        layout = manifest["layout_version"]
        wrong = [name for name, is_right in _FORMS.items() if name in manifest and not is_right(manifest[name])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path) from error
    if layout != LAYOUT_VERSION:
        raise DataError(
            f"{folder} has layout {layout}, but this code reads {LAYOUT_VERSION}: delete it to prepare it again."
        )
    if wrong:
        raise damaged(path)
    return _Manifest(manifest, path)


def hash_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of files that may be large."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_of(files: Mapping[str, bytes]) -> str:
    """SHA-256 of files' names and contents."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
