"""Corpora in Parquet files."""

import io
import pathlib
import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny_data
from corpus_reader import read
from meap_jax.errors import DataError
from meap_jax.readers import Skips, open_corpus
from meap_jax.readers.files import FileCorpus
from meap_jax.readers.records import Selection

TEXTS = [f"document {number} {random.Random(number).getrandbits(800):x}" for number in range(100)]
TABLE = pa.table(
    {"text": TEXTS, "meta": [{"set": "ab"[number % 2], "id": number} for number in range(100)], "n": list(range(100))}
)


def write(path, table=TABLE, rows=10, **options):
    pq.write_table(table, path, row_group_size=rows, **options)
    return str(path)


def in_parts(path, part_bytes=1):
    return FileCorpus(path, Selection.parse("text"), part_bytes)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_rows_come_in_order_whole_and_in_parts(tmp_path, compression):
    path = write(tmp_path / "a.parquet", compression=compression)
    assert read(open_corpus(path)) == TEXTS and len(open_corpus(path).parts()) == 1
    parts = in_parts(path).parts()
    assert [(part.start, part.stop) for part in parts] == [(group, group + 1) for group in range(10)]
    assert read(in_parts(path)) == TEXTS
    pairs = in_parts(path, parts[0].num_bytes * 1.5)
    assert [(part.start, part.stop) for part in pairs.parts()][:2] == [(0, 2), (2, 4)] and read(pairs) == TEXTS


def test_a_url_is_read_too(tmp_path):
    write(tmp_path / "a.parquet")
    fsspec.filesystem("memory").put_file(str(tmp_path / "a.parquet"), f"/{tmp_path.name}/a.parquet")
    assert read(in_parts(f"memory://{tmp_path.name}/*.parquet")) == TEXTS
    assert read(open_corpus(f"file://{tmp_path}")) == TEXTS


def test_fields_within_others_and_where(tmp_path):
    path = write(tmp_path / "a.parquet")
    assert read(open_corpus(path, where="meta.set=b")) == TEXTS[1::2]
    assert read(open_corpus(path, where="n=7")) == [TEXTS[7]]
    assert read(open_corpus(path, field="meta.set", where="meta.id=3")) == ["b"]
    assert read(open_corpus(path, where="meta.nosuch=3")) == []


@pytest.mark.parametrize("kind", [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_of_every_kind(tmp_path, kind):
    path = write(tmp_path / "a.parquet", pa.table({"text": pa.array(["é", "b"]).cast(pa.string()).cast(kind)}))
    assert read(open_corpus(path)) == ["é", "b"]


def test_rows_without_a_text_are_skipped(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"text": ["a", None, " ", "b"], "n": [1, 2, 3, 4]}), rows=3)
    skips = Skips(2)
    assert read(open_corpus(path), skips) == ["a", "b"]
    assert skips.counts == {"has a field `text` that is not a string": 1, "is blank": 1}
    assert skips.first["is blank"] == f"{path}, row group 0, row 2"
    skips = Skips(8)
    assert read(open_corpus(path, field="body"), skips) == [] and skips.counts == {"has no field `body`": 4}
    assert read(open_corpus(path, field="n"), skips) == []
    assert skips.counts["has a field `n` that is not a string"] == 4


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()])
def test_bad_utf8_costs_its_row_alone(tmp_path, kind):
    bad = pa.array([b"a", b"b\xff", b"c"]).cast(pa.binary()).view(kind)  # unchecked
    path = write(tmp_path / "a.parquet", pa.table({"text": bad}))
    skips = Skips(1)
    assert read(open_corpus(path), skips) == ["a", "c"]
    assert skips.first == {"is not UTF-8": f"{path}, row group 0, row 1, byte 1"}


def damage(path, group, column=0, share=0.5):
    """Flips bits in a column of a row group, `share` of the way through it."""
    about = pq.ParquetFile(path).metadata.row_group(group).column(column)
    start = about.dictionary_page_offset or about.data_page_offset
    first = start + int(about.total_compressed_size * share)
    tiny_data.flip(path, first, first + 20)


@pytest.mark.parametrize("share", [0, 0.5])  # the header of a page, and what is in it
@pytest.mark.parametrize("options", [dict(compression="gzip"), dict(compression="none", write_page_checksum=True)])
def test_a_corrupt_page_costs_the_rows_of_its_row_group(tmp_path, options, share):
    path = write(tmp_path / "a.parquet", **options)
    damage(path, 3, share=share)
    for corpus in (open_corpus(path), in_parts(path)):
        skips = Skips(10)
        assert read(corpus, skips) == TEXTS[:30] + TEXTS[40:]
        assert skips.counts == {"is corrupt": 10} and skips.first["is corrupt"] == f"{path}, row group 3, row 0"
        with pytest.raises(DataError, match="a.parquet, row group 3, row 0 is corrupt .*10, allowed: 9"):
            read(corpus, Skips(9))


def test_damage_in_a_column_that_nobody_reads_does_not_matter(tmp_path):
    path = write(tmp_path / "a.parquet", TABLE.select(["n", "text"]))
    damage(path, 3)
    assert read(open_corpus(path)) == TEXTS


def test_rows_before_a_corrupt_page_of_a_long_row_group_are_kept(tmp_path):
    texts = [f"{random.Random(number).getrandbits(40_000):x}" for number in range(3_000)]
    options = dict(rows=3_000, use_dictionary=False, data_page_size=2**16, compression="zstd")
    path = write(tmp_path / "a.parquet", pa.table({"text": texts}), **options)
    damage(path, 0)
    skips = Skips(3_000)
    found = read(open_corpus(path), skips)
    assert 1_000 <= len(found) < 1_600 and found == texts[: len(found)]
    assert skips.counts == {"is corrupt": 3_000 - len(found)}


@pytest.mark.parametrize("how", ["cut off", "footer", "not parquet", "empty"])
def test_a_file_without_a_footer_is_one_bad_record(tmp_path, how):
    path = pathlib.Path(write(tmp_path / "a.parquet"))
    data = path.read_bytes()
    data = {"cut off": data[:-100], "footer": data, "not parquet": b"no parquet" * 100, "empty": b""}[how]
    path.write_bytes(data)
    if how == "footer":
        tiny_data.flip(path, len(data) - 300, len(data) - 8)
    write(tmp_path / "b.parquet", TABLE.slice(0, 3))
    for corpus in (open_corpus(str(tmp_path)), in_parts(str(tmp_path))):
        skips = Skips(1)
        assert read(corpus, skips) == TEXTS[:3]
        assert skips.first == {"has no footer that can be read": f"{path}, byte {len(data)}"}
    with pytest.raises(DataError, match=r"a\.parquet, byte \d+ has no footer that can be read"):
        read(open_corpus(str(tmp_path)))


def test_a_file_that_changes_between_dividing_and_reading_stops_the_work(tmp_path):
    path = write(tmp_path / "a.parquet")
    corpus, whole = in_parts(path), open_corpus(path)
    (part,) = whole.parts()
    parts = corpus.parts()
    write(path, TABLE.slice(0, 50))
    with pytest.raises(DataError, match="has other row groups"):
        list(corpus.read(parts[7], Skips(0)))
    with pytest.raises(DataError, match="bytes, but had"):
        list(whole.read(part, Skips(0)))
    write(path, compression="none")
    with pytest.raises(DataError, match="has other row groups"):
        list(corpus.read(parts[0], Skips(0)))
    open(path, "wb").write(b"gone bad")
    with pytest.raises(DataError, match="is damaged now"):
        list(corpus.read(parts[0], Skips(100)))


def test_an_error_of_the_disk_is_not_taken_for_damage(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")

    class Failing(io.FileIO):
        """A file on a connection that is lost after the footer was read."""

        num_reads = 0

        def read(self, size=-1):
            self.num_reads += 1
            if self.num_reads > 3:
                raise ConnectionResetError("connection lost")
            return super().read(size)

    monkeypatch.setattr("meap_jax.readers.parquet.open_part", lambda part: Failing(part.path))
    skips = Skips(1_000)
    with pytest.raises(ConnectionResetError):
        read(open_corpus(path), skips)
    assert not skips.counts
