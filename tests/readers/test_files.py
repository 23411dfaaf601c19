"""Corpora in text files and lines of JSON."""

import gzip
import json
import pickle
import random
from collections import Counter

import fsspec
import pytest
import zstandard

from corpus_reader import read
from meap_jax.errors import DataError
from meap_jax.readers import Skips, open_corpus
from meap_jax.readers.files import FileCorpus
from meap_jax.readers.parts import PART_BYTES
from meap_jax.readers.records import Selection


def jsonl(texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


TEXTS = [f"document {number} é😀" * (1 + number % 7) for number in range(500)]
WRITERS = {
    "a.jsonl": lambda data: data,
    "a.json": lambda data: data,
    "a.jsonl.gz": gzip.compress,
    "A.JSON.GZ": gzip.compress,
    "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    "a.json.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("where", ["here", "memory"])
def test_each_kind_gives_its_texts_in_order(tmp_path, name, where):
    data = WRITERS[name](jsonl(TEXTS))
    path = f"memory://{tmp_path.name}/{name}" if where == "memory" else f"{tmp_path}/{name}"
    fsspec.open(path, "wb")
    with fsspec.open(path, "wb") as file:
        file.write(data)
    assert read(open_corpus(path)) == TEXTS
    assert [part.num_bytes for part in open_corpus(path).parts()] == [len(data)]


def test_a_folder_of_all_kinds(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_bytes(b"\xef\xbb\xbfdeep \xc3\xa9\nand long\n")
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "one\\ntwo"}\n\n \t\r\n{"text":"é"}\r\n{"text": "3"}'.encode())
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b'\n{"text": "4"}', mtime=0))
    (tmp_path / "notes.md").write_text("not read")
    assert read(open_corpus(str(tmp_path))) == ["one\ntwo", "é", "3", "deep é\nand long\n", "4"]
    parts = FileCorpus(str(tmp_path), Selection.parse("text"), part_bytes=5).parts()
    names = Counter(part.path.rpartition("/")[2] for part in parts)
    assert names["x.txt"] == names["z.jsonl.gz"] == 1 < names["a.jsonl"]  # Only the last can be entered in the middle.


def test_parts_are_the_same_texts_in_the_same_order(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    size = path.stat().st_size
    for part_bytes in (17, 1_000, size // 2, size, PART_BYTES):
        corpus = pickle.loads(pickle.dumps(FileCorpus(str(tmp_path), Selection.parse("text"), part_bytes)))
        parts = corpus.parts()
        assert len(parts) == max(1, round(size / part_bytes))
        assert sum(part.num_bytes for part in parts) == size and parts == corpus.parts()
        assert [text for part in parts for text in corpus.read(part, Skips(0))] == TEXTS
        shuffled = random.Random(0).sample(parts, len(parts))  # whoever reads them, and when
        texts = {part: list(corpus.read(part, Skips(0))) for part in shuffled}
        assert [text for part in parts for text in texts[part]] == TEXTS


BAD = [
    ("a.jsonl", b'{"text": "x"}\n\n{"text"', "is not JSON", "a.jsonl, line 3, column 8"),
    ("a.jsonl", b'{"body": "x"}', "has no field `text`", "a.jsonl, line 1"),
    ("a.jsonl", b'{"text": 5}', "has a field `text` that is not a string", "a.jsonl, line 1"),
    ("a.jsonl", b"[1]", "is not an object", "a.jsonl, line 1"),
    ("a.jsonl", b'{"text": "\\ud800"}', "escapes half of a surrogate pair", "a.jsonl, line 1"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "is not UTF-8", "a.jsonl, line 2, byte 10"),
    ("a.jsonl", b'{"text": "a"}\n{"text": " \\n"}', "is blank", "a.jsonl, line 2"),
    ("a.jsonl", b'{"text": "a"}\n\xef\xbb\xbf{"a": "b\xff"}', "is not UTF-8", "a.jsonl, line 2, byte 11"),
    ("a.jsonl", b'{"a": ' + b"9" * 5_000 + b"}", "is JSON beyond what Python reads", "a.jsonl, line 1"),
    ("a.jsonl", b"[" * 200_000, "is JSON beyond what Python reads", "a.jsonl, line 1"),
    ("a.json", b'{"text":\n "pretty"}', "is not JSON", "a.json, line 1, column 9"),
    ("a.jsonl.gz", gzip.compress(b'\n\n{"text"', mtime=0), "is not JSON", "a.jsonl.gz, line 3, column 8"),
    ("a.txt", b"caf\xe9", "is not UTF-8", "a.txt, byte 3"),
    ("a.txt", b" \n\t", "is blank", "a.txt"),
]


@pytest.mark.parametrize(("name", "content", "reason", "place"), BAD)
def test_a_bad_record_is_skipped_or_one_sentence_with_file_and_line(tmp_path, name, content, reason, place):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(open_corpus(str(tmp_path)))
    assert str(error.value).startswith(f"{tmp_path}/{place} {reason}") and "\n" not in str(error.value)

    (tmp_path / "b.jsonl").write_bytes(b'{"text": "goes on"}')
    skips = Skips(2)
    assert read(open_corpus(str(tmp_path)), skips)[-1] == "goes on"
    assert list(skips.first.values())[0] == f"{tmp_path}/{place}"


def test_a_bad_line_in_a_later_part_is_reported_by_its_byte(tmp_path):
    data = jsonl(TEXTS)
    broken = data.index(b'{"text": "document 400')
    (tmp_path / "a.jsonl").write_bytes(data[:broken] + b"#" + data[broken + 1 :])
    skips = Skips(1)
    texts = read(FileCorpus(str(tmp_path), Selection.parse("text"), part_bytes=2_000), skips)
    assert texts == TEXTS[:400] + TEXTS[401:]
    assert skips.first == {"is not JSON": f"{tmp_path}/a.jsonl, line at byte {broken}, column 1"}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_is_read_up_to_where_it_is_cut_off(tmp_path, name):
    texts = [f"{random.Random(number).getrandbits(4_000):x}" for number in range(300)]
    data = WRITERS[name](jsonl(texts))
    half = len(data) // 2
    (tmp_path / name).write_bytes(data[:half])
    (tmp_path / "b.txt").write_text("goes on")
    skips = Skips(1)
    *found, last = read(open_corpus(str(tmp_path)), skips)
    assert last == "goes on" and found == texts[: len(found)] and len(found) > 50
    assert skips.first == {"ends too early": f"{tmp_path}/{name}, byte {half}, after line {len(found)}"}


def test_a_file_that_changes_between_dividing_and_reading_stops_the_work(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    corpus = FileCorpus(str(path), Selection.parse("text"), part_bytes=5_000)
    parts = corpus.parts()
    path.write_bytes(jsonl(TEXTS + ["more"]))
    with pytest.raises(DataError, match=r"a\.jsonl has .* bytes, but had"):
        [text for part in parts for text in corpus.read(part, Skips(0))]


def test_lines_are_read_one_at_a_time(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\nbroken')
    corpus = open_corpus(str(tmp_path))
    (part,) = corpus.parts()
    assert next(corpus.read(part, Skips(0))) == "good"
