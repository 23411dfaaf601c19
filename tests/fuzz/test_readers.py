"""Data files of every form, damaged and malicious: a record is read, or counted as bad; memory has a bound."""

import gzip
import io
import json
import os
import pathlib
import socket
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import JSON, damaged, in_little_memory, refused_in_a_sentence, settings
from meap_jax.errors import UserError
from meap_jax.readers import Skips, open_conversations, open_corpus
from meap_jax.readers.objects import read_lines

RECORDS = [{"text": f"text {i} é"} for i in range(20)]
TALKS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}], "text": "t"}
    for i in range(20)
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
TALK_LINES = "".join(json.dumps(record) + "\n" for record in TALKS).encode()


def parquet(records):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), file, row_group_size=7)
    return file.getvalue()


WHOLE = {
    "a.txt": b"some text\n" * 9,
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.parquet": parquet(RECORDS),
    "talk.jsonl": TALK_LINES,
    "talk.json": json.dumps(TALKS).encode(),
    "talk.json.gz": gzip.compress(json.dumps(TALKS).encode()),
    "talk.parquet": parquet(TALKS),
}


def read_all(name, data):
    """Everything that a reader finds in a file of this name, and what it passes over."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        path.write_bytes(data)
        corpus = open_conversations(str(path)) if name.startswith("talk") else open_corpus(str(path))
        skips = Skips(1_000)
        return [record for part in corpus.parts() for record in corpus.read(part, skips)], skips


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_is_read_without_loss(name):
    found, skips = read_all(name, WHOLE[name])
    assert len(found) == (1 if name.endswith(".txt") else 20) and not skips.counts


@pytest.mark.parametrize("name", WHOLE)
@settings
@given(st.data())
def test_a_damaged_file_gives_texts_and_counts_or_one_sentence(name, data):
    with refused_in_a_sentence():
        found, _ = read_all(name, data.draw(damaged(WHOLE[name])))
        for text in found:
            text = text if isinstance(text, str) else text.messages[-1]["content"]
            assert text.strip() and text.encode()


@pytest.mark.parametrize("name", ["a.jsonl", "talk.jsonl", "talk.json"])
@settings
@given(st.lists(JSON | st.fixed_dictionaries({}, optional={"text": JSON, "messages": JSON, "conversations": JSON,
       "instruction": JSON, "output": JSON, "system": JSON}), max_size=5))  # fmt: skip
def test_records_of_any_form_are_read_or_counted(name, records):
    if name == "talk.jsonl" and records and isinstance(records[0], list):
        records[0] = {}  # A file that begins so is an array.
    lines = json.dumps(records) if name.endswith(".json") else "".join(json.dumps(record) + "\n" for record in records)
    with refused_in_a_sentence():
        found, skips = read_all(name, lines.encode())
        assert len(found) + skips.counts.total() == len(records)


@settings
@given(st.data())
def test_files_of_an_evaluation_are_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder, refused_in_a_sentence():
        name = data.draw(st.sampled_from(("a.jsonl", "a.jsonl.gz")))
        path = pathlib.Path(folder, name)
        path.write_bytes(data.draw(damaged(WHOLE[name])))
        list(read_lines(path, ["text"]))


# ----------------------------------------------------------------------------------------------- decompression, memory

READ = """
from meap_jax.readers import Skips, open_conversations, open_corpus
from meap_jax.errors import UserError
open_this = open_conversations if "talk" in sys.argv[1] else open_corpus
corpus, skips = open_this(sys.argv[1]), Skips(1_000_000)
list(open_corpus(sys.argv[2]).read(open_corpus(sys.argv[2]).parts()[0], skips))
allowed()
count, most = 0, int(sys.argv[3]) if len(sys.argv) > 3 else None
try:
    for part in corpus.parts():
        for record in corpus.read(part, skips):
            count += 1
            if count == most:
                break
except UserError as error:
    print(error)
print(count, dict(skips.counts))
report()
"""


@pytest.fixture
def small(tmp_path):
    """A file that is read first, so that what libraries take for themselves doesn't count."""
    path = tmp_path / "small.jsonl"
    path.write_bytes(LINES)
    return path


def bomb(suffix, head, piece, times, tail=b""):
    """A small file that a reader's decompressor makes gigabytes of: streams may follow each other."""
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    return compress(head) + compress(piece) * times + compress(tail)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("piece, times", [(b"a" * 2**20, 1_024), (b"\n" * 2**20, 6)], ids=["a line", "empty lines"])
def test_a_bomb_is_read_in_bounded_memory(suffix, piece, times, tmp_path, small):
    path = tmp_path / f"bomb.jsonl{suffix}"
    path.write_bytes(bomb(suffix, b'{"text": "', piece, times, b'"}\n' + LINES))
    assert path.stat().st_size < 2**21
    out = in_little_memory(READ, path, small, megabytes=200)
    assert out.startswith("20 ")  # The lines behind it are read.
    assert ("is longer than 32 MiB" in out) == (piece[:1] == b"a")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_array_that_becomes_gigabytes_is_refused_in_a_sentence(suffix, tmp_path, small):
    path = tmp_path / f"talk.json{suffix}"
    path.write_bytes(bomb(suffix, b'["', b"a" * 2**20, 600, b'"]'))
    out = in_little_memory(READ, path, small, megabytes=800)
    assert f"{path} holds an array of more than 512 MiB, and an array is read whole: write its records as lines" in out


@pytest.mark.parametrize("rows, size, read, megabytes", [(2_000, 2**20, 2_000, 200), (300, 2**27, 3, 1_500)])
def test_a_parquet_file_of_a_few_kilobytes_is_read_in_bounded_memory(rows, size, read, megabytes, tmp_path, small):
    path = tmp_path / "bomb.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["a" * size]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd", use_dictionary=True)
    assert path.stat().st_size < 2**16
    out = in_little_memory(READ, path, small, read, megabytes=megabytes)
    assert out.startswith(f"{read} ")


# ------------------------------------------------------------------------------------------------- what is no file


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("place", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_what_is_no_file_is_refused_and_never_waited_for(kind, place, tmp_path):
    path = tmp_path / place
    made = {
        "pipe": lambda: os.mkfifo(path),
        "socket": lambda: socket.socket(socket.AF_UNIX).bind(str(path)),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
    }
    made[kind]()
    with pytest.raises(UserError, match="but must be a file|holds no file that ends in"):
        for where in (path, tmp_path):
            corpus = open_corpus(str(where))
            list(corpus.read(corpus.parts()[0], Skips(0)))
    with pytest.raises(UserError, match="but must be a file"):
        list(read_lines(path))
