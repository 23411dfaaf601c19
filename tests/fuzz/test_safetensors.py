"""Safetensors and their index: a header that lies is refused in a sentence, and costs no memory."""

import json
import os
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import save

from fuzzing import JSON, altered, damaged, in_little_memory, refused_in_a_sentence, settings
from meap_jax.errors import DataError
from meap_jax.hf import safetensors

WHOLE = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)})
LENGTH = int.from_bytes(WHOLE[:8], "little")
HEADER = json.loads(WHOLE[8 : 8 + LENGTH])


def with_header(header, body=WHOLE[8 + LENGTH :], length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + body


def read_all(folder):
    tensors = safetensors.Tensors(pathlib.Path(folder))
    for name in sorted(tensors.names()):
        shape = tensors._where[name].shape
        tensors.check(name, shape)
        if 1 <= len(shape) <= 2:
            tensors.read(name, slice(0, shape[0]), slice(0, shape[1]) if len(shape) == 2 else None)
    return tensors.names()


def read_file(data):
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, safetensors.FILE).write_bytes(data)
        return read_all(folder)


A = HEADER["a"]
LIES = {
    "a terabyte": with_header({"a": A | {"shape": [2**38]}}),
    "a terabyte with offsets": with_header({"a": A | {"shape": [2**38], "data_offsets": [0, 2**40]}}),
    "more than any number": with_header({"a": A | {"shape": [2**40, 2**40], "data_offsets": [0, 24]}}),
    "a negative size": with_header({"a": A | {"shape": [-2, -3]}}),
    "offsets behind the end": with_header({**HEADER, "a": A | {"data_offsets": [2**50, 2**50 + 24]}}),
    "offsets that overlap": with_header({**HEADER, "b": HEADER["b"] | {"data_offsets": [0, 8]}}),
    "offsets backwards": with_header({**HEADER, "a": A | {"data_offsets": [24, 0]}}),
    "a hole": with_header({"a": A | {"data_offsets": [8, 32]}}),
    "an unheard-of dtype": with_header({**HEADER, "a": A | {"dtype": "F31"}}),
    "another dtype": with_header({**HEADER, "a": A | {"dtype": "F16"}}),
    "integers": with_header({"a": A | {"dtype": "I32"}, "b": HEADER["b"]}),
    "a header of 2^60 bytes": with_header(HEADER, length=2**60),
    "a header of 2^64 bytes": with_header(HEADER, length=2**64 - 1),
    "a header behind the end": with_header(HEADER, length=len(WHOLE)),
    "no header": b"\1",
    "nothing": b"",
    "a header that is no JSON": with_header(b"{" * 100),
    "a header that is nested": with_header(b'{"a":' + b"[" * 100_000),
    "a header that is a list": with_header([1]),
    "more bytes than it says": WHOLE + b"\0",
    "fewer": WHOLE[:-1],
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused_in_a_sentence(name):
    with pytest.raises(DataError, match=safetensors.FILE) as error:
        read_file(LIES[name])
    assert "\n" not in str(error.value)


def test_a_name_that_is_there_twice_is_one_tensor_of_the_file():
    twice = json.dumps(HEADER)[:-1] + ', "a": ' + json.dumps(A) + "}"
    with refused_in_a_sentence():
        assert read_file(with_header(twice.encode())) == {"a", "b"}


def test_a_header_of_a_terabyte_costs_no_memory(tmp_path):
    for i, data in enumerate(LIES.values()):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / safetensors.FILE).write_bytes(data)
    script = """
import pathlib
from meap_jax.errors import DataError
from meap_jax.hf import safetensors
allowed()
for folder in pathlib.Path(sys.argv[1]).iterdir():
    try:
        safetensors.Tensors(folder)
    except DataError:
        pass
report()
"""
    in_little_memory(script, tmp_path, megabytes=50)


@settings
@given(damaged(WHOLE) | altered(HEADER).map(with_header))
def test_a_damaged_file_is_read_or_refused(data):
    with refused_in_a_sentence():
        read_file(data)


INDEX = {"metadata": {"total_size": 32}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}


@settings
@given(altered(INDEX).map(lambda content: json.dumps(content).encode()) | damaged(json.dumps(INDEX).encode()))
def test_a_damaged_index_is_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder, refused_in_a_sentence():
        pathlib.Path(folder, "one.safetensors").write_bytes(WHOLE)
        pathlib.Path(folder, safetensors.INDEX).write_bytes(data)
        read_all(folder)


@pytest.mark.parametrize(
    "file", ["../outside", "/etc/passwd", "..", ".", "", "sub/one", "..\\x", "a\0b", None, 5, [], "pipe"]
)
def test_an_index_reaches_no_file_outside_its_folder(file, tmp_path):
    (tmp_path / "outside").write_bytes(WHOLE)
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "one").write_bytes(WHOLE)
    os.mkfifo(folder / "pipe")
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(DataError, match="is damaged|lacks"):
        read_all(folder)


@settings
@given(JSON)
def test_an_index_of_any_form_is_refused(content):
    with tempfile.TemporaryDirectory() as folder, refused_in_a_sentence():
        pathlib.Path(folder, safetensors.INDEX).write_text(json.dumps(content))
        assert not read_all(folder)
