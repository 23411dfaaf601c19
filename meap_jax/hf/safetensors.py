"""Safetensors checkpoints: reads any part of any tensor, writes tensors one after another.

Memory stays at what is asked for: a file is mapped for the moment of a read only, so that its pages don't add up, and a
file is written as its tensors come. (The package safetensors writes files whole, from memory.)
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from meap_jax.errors import DataError
from meap_jax.files import parse_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Their name in files, and ours.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_MOST_BYTES_A_READ = 1 << 22
LARGEST_FILE = 5 * 10**9  # Bytes; what the hub recommends at most.


class _Where(NamedTuple):
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # As the file names it.


class Tensors:
    """The tensors of a folder, in one file or in several with an index."""

    def __init__(self, folder: Path):
        """Reads the headers of all files.

        Raises:
          DataError: there are none, one is missing, damaged, or lacks what the index says.
        """
        self.folder = folder
        self._where: dict[str, _Where] = {}
        for file, names in _files(folder).items():
            try:
                with safetensors.safe_open(file, "numpy") as opened:
                    for name in opened.keys():
                        part = opened.get_slice(name)
                        self._where[name] = _Where(file, tuple(part.get_shape()), part.get_dtype())
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                raise DataError(f"{file} can't be read as safetensors ({error}).") from error
            if lacking := sorted(set(names) - self._where.keys()):
                raise DataError(f"{file} lacks {lacking[0]}, which {INDEX} says is there.")

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._where)

    def dtype(self) -> str:
        """The one that holds all tensors exactly: theirs if they have the same, else float32."""
        found = {DTYPES.get(where.dtype, "float32") for where in self._where.values()}
        return found.pop() if len(found) == 1 else "float32"

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Compares a tensor with what it must be.

        Raises:
          DataError: it has another shape, or no dtype of floats.
        """
        where = self._where[name]
        if where.dtype not in DTYPES:
            raise DataError(
                f"{where.file} has {name} in {where.dtype}, but weights must be {', '.join(DTYPES)}: quantized ones "
                "can't be imported."
            )
        if where.shape != shape:
            raise DataError(f"{where.file} has {name} of shape {where.shape}, but config.json asks for {shape}.")

    def read(self, name: str, rows: slice, columns: slice | None = None) -> np.ndarray:
        """Reads a part of a tensor, a few megabytes at a time."""
        file, shape, dtype = self._where[name]
        width = 1 if columns is None else columns.stop - columns.start
        out = np.empty((rows.stop - rows.start, *([] if columns is None else [width])), _NUMPY[DTYPES[dtype]])
        whole_rows = max(1, _MOST_BYTES_A_READ // (out.itemsize * (shape[1] if columns is not None else 1)))
        for start in range(rows.start, rows.stop, whole_rows):
            stop = min(start + whole_rows, rows.stop)
            with safetensors.safe_open(file, "numpy") as opened:
                part = opened.get_slice(name)
                block = part[start:stop] if columns is None else part[start:stop, columns.start : columns.stop]
                out[start - rows.start : stop - rows.start] = block
        return out


def _files(folder: Path) -> dict[Path, list[str]]:
    """The files of a checkpoint, with the names that the index gives each."""
    index = folder / INDEX
    if index.is_file():
        try:
            names: dict[str, str] = parse_json(index.read_bytes())["weight_map"]
            files: dict[Path, list[str]] = {}
            for name, file in names.items():
                if Path(file).name != file:
                    raise ValueError(f"{file!r} is no name of a file beside it")
                files.setdefault(folder / file, []).append(name)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{index} is damaged ({error}).") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"{folder} lacks {', '.join(sorted(missing))}, which {INDEX} names: download it again.")
        return files
    if (folder / FILE).is_file():
        return {folder / FILE: []}
    pickles = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending))
    if pickles:
        raise DataError(
            f"{folder} holds {pickles[0]}, a pickle, which can run any code and is never opened: save the model with "
            "safe_serialization=True, or take the hub's safetensors of it."
        )
    raise DataError(f"{folder} holds neither {FILE} nor {INDEX}.")


def write(folder: Path, tensors: Sequence[Any], dtype: str, largest_file: int = LARGEST_FILE, file: str = FILE) -> None:
    """Writes tensors into as many files as needed, with an index if these are several.

    Args:
      folder: that holds none yet.
      tensors: with `name`, `shape` and `blocks()`, which yields them row by row or more, in the order of writing.
      dtype: of all: float32, float16 or bfloat16.
      largest_file: bytes; a larger tensor has a file by itself.
      file: its name, where one is enough.
    """
    itemsize = np.dtype(_NUMPY[dtype]).itemsize
    files: list[list[Any]] = [[]]
    size = 0
    for tensor in tensors:
        own = itemsize * int(np.prod(tensor.shape))
        if files[-1] and size + own > largest_file:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += own
    names = (
        [file]
        if len(files) == 1
        else [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    )
    for name, inside in zip(names, files, strict=True):
        _write_file(folder / name, inside, dtype, itemsize)
    if len(files) > 1:
        weight_map = {tensor.name: name for name, inside in zip(names, files, strict=True) for tensor in inside}
        total = itemsize * sum(int(np.prod(tensor.shape)) for tensor in tensors)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _write_file(path: Path, tensors: Sequence[Any], dtype: str, itemsize: int) -> None:
    """Writes one file: 8 bytes with the header's length, the header in JSON, and the tensors' bytes."""
    code = next(name for name, ours in DTYPES.items() if ours == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants to be told the framework.
    end = 0
    for tensor in tensors:
        start, end = end, end + itemsize * int(np.prod(tensor.shape))
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            written = 0
            for block in tensor.blocks():
                written += file.write(np.ascontiguousarray(block, _NUMPY[dtype]).reshape(-1).view(np.uint8).data)
            if written != itemsize * int(np.prod(tensor.shape)):
                raise ValueError(f"{tensor.name} came to {written} bytes, which are not {dtype}{tensor.shape}")
        file.flush()
        os.fsync(file.fileno())
