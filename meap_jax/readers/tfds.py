"""Texts that TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow."""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from meap_jax.errors import ConfigError, DataError
from meap_jax.paths import is_url
from meap_jax.readers.parts import PART_BYTES, Part, Skips
from meap_jax.readers.records import Selection, select

_BATCH = 256  # records that are asked for at once
_NAME = re.compile(r"(?P<builder>\w+(/[\w.+-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(frozen=True)
class TfdsCorpus:
    """One split of a data set (see `open_corpus` for how `path` names it), as a `Corpus` in ranges of records.

    Data sets are looked for in TFDS_DATA_DIR, or else in ~/tensorflow_datasets, and read from their files alone: the
    code that made them isn't needed. Without a version the newest one is read; the parts name it.
    """

    path: str
    selection: Selection
    part_bytes: int = PART_BYTES

    def parts(self) -> list[Part]:
        """See `Corpus`."""
        data = _open(self.path)
        record_bytes = max(1.0, data.num_bytes / max(1, len(data.source)))
        size = max(1, round(self.part_bytes / record_bytes))
        cuts = [*range(0, len(data.source), size), len(data.source)]
        return [
            Part(data.path, start, stop, round((stop - start) * record_bytes))
            for start, stop in itertools.pairwise(cuts)
        ]

    def read(self, part: Part, skips: Skips) -> Iterator[str]:
        """See `Corpus`."""
        return select(_records(part, skips), self.selection, skips)


class _Data(NamedTuple):
    path: str  # tfds:..., with the version and the split
    source: Any  # a sequence of dicts, with __getitems__
    files: list[tuple[str, int, int]]  # in order: name, first record of the split, and how many of its own are skipped
    num_bytes: int  # about


def _records(part: Part, skips: Skips) -> Iterator[tuple[str, Any]]:
    data = _open(part.path)
    stop = len(data.source) if part.stop is None else part.stop
    if stop > len(data.source):
        raise DataError(f"{part.path} has {len(data.source):,} records, but had more when the work was divided.")
    for start in range(part.start, stop, _BATCH):
        batch = range(start, min(start + _BATCH, stop))
        try:
            records = data.source.__getitems__(batch)
        except RuntimeError:
            records = [_record_or_none(data, index, skips) for index in batch]
        for index, record in zip(batch, records, strict=True):
            if record is not None:
                yield f"{part.path}, record {index}", record


def _record_or_none(data: _Data, index: int, skips: Skips) -> Any:
    try:
        return data.source[index]
    except RuntimeError as error:
        name, first, skipped = max((file for file in data.files if file[1] <= index), key=lambda file: file[1])
        if "() failed" in str(error):  # a call of the operating system: open() failed, pread() failed
            raise DataError(f"{name} can't be read: {str(error).split(';')[0]}.") from error
        at = re.search(r"at byte (\d+)", str(error))
        byte = f", byte {at[1]}" if at else ""
        skips.add("is corrupt", f"{name}, record {index - first + skipped}{byte}")
        return None


def _open(path: str) -> _Data:
    name, _, query = path.removeprefix("tfds:").partition("?")
    split = query.removeprefix("split=") if query else "train"
    if not split or (query and not query.startswith("split=")):
        raise ConfigError(f"the path is {path!r}, but behind the ? must be split=SPLIT, such as split=validation.")
    try:
        import tensorflow_datasets as tfds  # here, since it takes a second and few runs need it
    except ImportError as error:
        raise ConfigError(
            f"the path is {path!r}, which needs a package: pip install tensorflow-datasets ({error})."
        ) from error

    folder, full_name = _folder(path, name)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # whatever its parsers of JSON, protocol buffers and features raise
        reason = " ".join(str(error).split("\n")[0].split())
        raise DataError(f"{folder} has a dataset_info.json or features.json that can't be used: {reason}") from error
    if "array_record" not in {kind.value for kind in builder.info.available_file_formats()}:
        raise ConfigError(
            f"the path is {path!r}, but {folder} isn't there as ArrayRecord: prepare it again, into another folder, "
            "with tfds build --file_format=array_record."
        )
    try:
        source = builder.as_data_source(split, file_format="array_record")
        instructions = builder.info.splits[split].file_instructions
    except ValueError as error:
        splits = ", ".join(builder.info.splits)
        raise ConfigError(f"the path is {path!r}, but the split must be of {splits}, and hold records.") from error
    starts = itertools.accumulate((each.take for each in instructions), initial=0)
    files = [(str(each.filename), first, each.skip) for each, first in zip(instructions, starts, strict=False)]
    # A split such as train[:10%] doesn't know its bytes: all splits together do.
    everything = builder.info.splits.values()
    record_bytes = sum(one.num_bytes for one in everything) / max(1, sum(one.num_examples for one in everything))
    return _Data(f"tfds:{full_name}?split={split}", source, files, round(record_bytes * len(source)))


def _folder(path: str, name: str) -> tuple[str, str]:
    """The folder of one version of a data set, and what names it in a part."""
    if name.startswith("/") or is_url(name):
        folder, full_name = name, name
    else:
        match = _NAME.fullmatch(name)
        if not match:
            raise ConfigError(f"the path is {path!r}, but must be like tfds:c4/en:3.1.0?split=train or tfds:/folder.")
        root = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
        folder = os.path.join(root, match["builder"])
        version = match["version"] or _newest(folder)
        folder, full_name = os.path.join(folder, version), f"{match['builder']}:{version}"
    if is_url(folder):
        raise ConfigError(f"the path is {path!r}, but ArrayRecord is read from disks alone: copy or mount {folder}.")
    if not os.path.exists(os.path.join(folder, "dataset_info.json")):
        raise ConfigError(
            f"the path is {path!r}, but there is no such data set in {folder}: prepare it with "
            "tfds build NAME --file_format=array_record, or set TFDS_DATA_DIR to where it is."
        )
    return folder, full_name


def _newest(folder: str) -> str:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    versions = [name for name in names if _VERSION.fullmatch(name)]
    return max(versions, key=lambda name: [int(number) for number in name.split(".")], default="")
