"""Freezes corpus, tokenizer and packed blocks once into a folder that many runs share.

- tokenizer.json or tokenizer.model
- SOURCE-SPLIT.tokens.npy: [N, seq_len + 1], the smallest unsigned type
- SOURCE-SPLIT.segments.npy: [N, seq_len + 1], the smallest unsigned type
- SOURCE-SPLIT.answers.npy: records of `packing.ANSWER_DTYPE`; held-out splits of retrieval only
- manifest.json: options, counts, the tokenizer's ids, a hash of every file, the fingerprint
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meap_jax.config import TOKENIZERS, ConfigError, is_path
from meap_jax.data import tokenizers
from meap_jax.data.documents import DataError
from meap_jax.data.packing import Packed, pack_source, smallest_dtype
from meap_jax.data.sources import Source, open_source
from meap_jax.data.tokenizers import Tokenizer

LAYOUT_VERSION = 1
_MANIFEST = "manifest.json"
# Enough for merges that no longer change, whatever the size of the corpus.
# Generated text repeats itself, so it gets about as much as the standard library has.
_BPE_CHARACTERS = {True: 2_500_000, False: 50_000_000}  # by Source.whole

# Options of `prepare` whose field of the config is not data.NAME.
_FIELDS = {"sources": "data.mixture", "seq_len": "seq_len", "vocab_size": "model.vocab_size"}

_log = logging.getLogger(__name__)


class Blocks(NamedTuple):
    """Blocks of one source and split."""

    tokens: np.ndarray  # [N, seq_len + 1] unsigned
    segment_ids: np.ndarray  # [N, seq_len + 1] unsigned; 0 is padding
    answers: np.ndarray | None  # records of packing.ANSWER_DTYPE


@dataclass(frozen=True)
class Prepared:
    """A prepared folder that was found to be complete."""

    folder: Path
    manifest: dict[str, Any]
    fingerprint: str  # of every file's content; not of paths, dates or the Python version
    tokenizer: Tokenizer

    @property
    def block_len(self) -> int:
        """Ids in a block, seq_len + 1."""
        return self.manifest["options"]["seq_len"] + 1

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's files: equal hashes, equal meaning of every id."""
        return tokenizers.fingerprint(self.tokenizer)

    def blocks(self, source: str, split: str) -> Blocks:
        """Maps the blocks of a source and split (train, validation, test) into memory, read-only.

        Raises:
          DataError: the folder was prepared without them.
        """
        stem = f"{source}-{split}"
        names = [f"{stem}.{kind}.npy" for kind in ("tokens", "segments", "answers")]
        if names[0] not in self.manifest["files"]:
            raise DataError(
                f"The prepared folder {self.folder} holds no {stem}, only {', '.join(self.manifest['sources'])}."
            )
        answers = self._map(names[2]) if names[2] in self.manifest["files"] else None
        return Blocks(self._map(names[0]), self._map(names[1]), answers)

    def _map(self, name: str) -> np.ndarray:
        return np.load(self.folder / name, mmap_mode="r")


def prepare(folder: str | os.PathLike[str], *, options: Mapping[str, Any]) -> Prepared:
    """Prepares data in a folder, or opens the folder if that was done before.

    Everything is written beside the folder (`.NAME.partial-*`, which a killed process leaves
    behind) and renamed at the end: a folder that exists is complete.

    Text is split by document (see `sources`). Where that leaves a split without one full block, as
    a single book does, the whole source is packed and the share `holdout` of its blocks, at least
    one, is cut off the end for test and again for validation; the manifest says `split_by: block`.

    Args:
      folder: a local folder; made with its parents.
      options: `sources` (names), `path` (for the source text), `tokenizer` (a word or path, see `tokenizers`),
        `vocab_size` (rows of the model's embedding: ids at most), `seq_len`, `seed` (of what is
        generated), `retrieval` (the fields of RetrievalSpec, num_documents and
        num_eval_documents), `holdout`.

    Returns:
      The folder, opened.

    Raises:
      ConfigError: impossible options, or a folder that was prepared with others.
      DataError: the sources cannot be read or give too little, or the folder is damaged.
    """
    folder = Path(folder)
    if "://" in str(folder) or str(folder).startswith("gs:/"):
        raise ConfigError(
            f"data.prepared is {folder}, but must be a local folder, since its blocks are mapped into memory."
        )
    folder = folder.expanduser().absolute()
    wanted = _relevant(options)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _reuse(folder, wanted)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"data.prepared is {folder}, but must be a folder that can be made: {error.strerror}."
        ) from error
    try:
        _write(partial, wanted)
        partial.chmod(0o755)  # mkdtemp shuts others out
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / _MANIFEST).exists():
                raise
            return _reuse(folder, wanted)  # another process was faster
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_prepared(folder)


def open_prepared(folder: str | os.PathLike[str]) -> Prepared:
    """Opens a prepared folder and checks that it is complete.

    Raises:
      DataError: no manifest, another layout, or a file that is missing or damaged; names the file.
        Arrays are checked by size, the tokenizer by its hash.
    """
    folder = Path(folder).expanduser().absolute()
    path = folder / _MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not a prepared data folder: it holds no {_MANIFEST}.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, layout = manifest["files"], manifest["layout_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: delete {folder} to prepare it again.") from error
    if layout != LAYOUT_VERSION:
        raise DataError(
            f"{folder} has layout {layout}, but this code reads {LAYOUT_VERSION}: delete it to prepare it again."
        )
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file} is missing: delete {folder} to prepare it again.")
        damaged = file.stat().st_size != entry["bytes"] or (
            name.startswith("tokenizer.") and _sha256(file) != entry["sha256"]
        )
        if damaged:
            raise DataError(f"{file} is damaged: delete {folder} to prepare it again.")
    if manifest.get("fingerprint") != _fingerprint(files):
        raise DataError(f"{path} is damaged: delete {folder} to prepare it again.")
    return Prepared(folder, manifest, manifest["fingerprint"], tokenizers.load(folder))


def _relevant(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the data depends on, as JSON gives them back."""
    sources = list(options["sources"])
    kept = {name: options[name] for name in ("tokenizer", "seq_len")} | {"sources": sources}
    if options["tokenizer"] not in TOKENIZERS and not is_path(options["tokenizer"]):
        raise ConfigError(f"data.tokenizer is {options['tokenizer']!r}, but must be one of {', '.join(TOKENIZERS)}.")
    if "vocab_size" in options:
        kept["vocab_size"] = options["vocab_size"]
    if "retrieval" in sources:
        kept |= {"seed": options["seed"], "retrieval": dict(options["retrieval"])}
    if {"stdlib", "text"} & set(sources):
        kept["holdout"] = options["holdout"]
    if "text" in sources:
        kept["path"] = options.get("path")
    return kept


def _reuse(folder: Path, wanted: dict[str, Any]) -> Prepared:
    prepared = open_prepared(folder)
    frozen, new = _flatten(prepared.manifest["options"]), _flatten(wanted)
    changed = [
        f"{_FIELDS.get(name, f'data.{name}')} = {frozen.get(name)!r}, but the config wants {new.get(name)!r}"
        for name in sorted(frozen.keys() | new.keys())
        if frozen.get(name) != new.get(name)
    ]
    if changed:
        raise ConfigError(
            f"The data in {folder} was prepared with {'; '.join(changed)}: set data.prepared to another folder, or "
            "delete this one if no run needs it."
        )
    return prepared


def _flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _write(folder: Path, options: dict[str, Any]) -> None:
    """Fills a folder with all files of prepared data, the manifest last."""
    sources = [open_source(name, options) for name in options["sources"]]
    tokenizer = _tokenizer(sources, options)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    counts: dict[str, Any] = {}
    for source in sources:
        splits, split_by = pack_source(
            source, tokenizer, block_len=options["seq_len"] + 1, holdout=options.get("holdout", 0)
        )
        counts[source.name] = {"split_by": split_by}
        for split, packed in splits.items():
            counts[source.name][split] = _count(packed, tokenizer)
            _save(folder / f"{source.name}-{split}.tokens.npy", packed.tokens)
            _save(folder / f"{source.name}-{split}.segments.npy", packed.segment_ids)
            if source.whole and split != "train":
                np.save(folder / f"{source.name}-{split}.answers.npy", packed.answers)
            _log.info("Prepared %s-%s: %s", source.name, split, counts[source.name][split])
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    ids = ("name", "num_tokens", "vocab_size", "pad_id", "bos_id", "eos_id", "mask_id")
    manifest = {
        "layout_version": LAYOUT_VERSION,
        "fingerprint": _fingerprint(files),
        "options": options,
        "python": platform.python_version(),
        "tokenizer": {name: getattr(tokenizer, name) for name in ids},
        "sources": counts,
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _tokenizer(sources: list[Source], options: dict[str, Any]) -> Tokenizer:
    if options["tokenizer"] != "bpe":
        tokenizer = tokenizers.make(options["tokenizer"])
        if options["vocab_size"] < tokenizer.num_tokens:
            raise ConfigError(
                f"model.vocab_size is {options['vocab_size']}, but the tokenizer "
                f"{options['tokenizer']} has {tokenizer.num_tokens} ids: set "
                f"{tokenizer.vocab_size}."
            )
        return tokenizer

    def texts() -> Iterator[str]:
        for source in sources:
            room = _BPE_CHARACTERS[source.whole]
            for document in source.documents("train"):
                yield document.text[:room]
                room -= len(document.text)
                if room <= 0:
                    break

    return tokenizers.train_bpe(texts(), options["vocab_size"])


def _count(packed: Packed, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest says of a split; a document counts where its eos stands."""
    num_tokens = int(np.count_nonzero(packed.segment_ids))
    num_documents = int(np.count_nonzero(packed.tokens == tokenizer.eos_id))
    counts = {
        "documents": num_documents,
        "blocks": len(packed.tokens),
        "tokens": num_tokens,
        "mean_document_tokens": round(num_tokens / max(num_documents, 1), 1),
        "padding_share": round(1 - num_tokens / packed.tokens.size, 4),
        "dropped_tokens": packed.num_dropped,
    }
    if len(packed.answers):
        counts["answers"] = len(packed.answers)
        counts["mean_answer_tokens"] = round(float(packed.answers["length"].mean()), 3)
    return counts


def _save(path: Path, array: np.ndarray) -> None:
    np.save(path, array.astype(smallest_dtype(int(array.max())), copy=False))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    content = {
        "layout_version": LAYOUT_VERSION,
        "files": {name: files[name]["sha256"] for name in sorted(files)},
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
