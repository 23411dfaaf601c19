"""Corpora that TensorFlow Datasets prepared."""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

import tiny_data
from corpus_reader import read
from meap_jax.corpus import shards
from meap_jax.corpus.prepare import prepare
from meap_jax.errors import ConfigError, DataError
from meap_jax.readers import Skips, open_corpus
from meap_jax.readers.records import Selection
from meap_jax.readers.tfds import TfdsCorpus

SIZES = {"train": 600, "validation": 7}


def text(split, number):
    return f"{split} document {number} é {random.Random(number).getrandbits(2_400):x}"  # little to compress


class LittleTexts(tfds.core.GeneratorBasedBuilder):
    """A builder as users write them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        meta = {"set": tfds.features.Text(), "id": np.int64}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "meta": meta})
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split):
        for number in range(SIZES[split]):
            yield number, {"text": text(split, number), "meta": {"set": "ab"[number % 2], "id": number}}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builder = LittleTexts(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=3, verify_ssl=False, try_download_gcs=False)
    )
    return folder


@pytest.fixture
def data_dir(built, tmp_path, monkeypatch):
    """A copy that a test may damage, where TFDS looks."""
    shutil.copytree(built, tmp_path / "data")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def shard(data_dir, index):
    return data_dir / "little_texts" / "1.0.0" / f"little_texts-train.array_record-{index:05d}-of-00003"


def numbers(texts):
    return [int(text.split()[2]) for text in texts]


SMALL_PARTS = TfdsCorpus("tfds:little_texts", Selection.parse("text"), 40_000)


def test_all_records_are_read_by_name_version_split_and_folder(data_dir):
    train = read(open_corpus("tfds:little_texts"))
    assert sorted(train) == sorted(text("train", number) for number in range(600))
    folder = data_dir / "little_texts" / "1.0.0"
    assert read(open_corpus("tfds:little_texts:1.0.0?split=train")) == train
    assert read(open_corpus(f"tfds:{folder}")) == train
    validation = read(open_corpus("tfds:little_texts?split=validation"))
    assert sorted(validation) == sorted(text("validation", number) for number in range(7))
    assert read(open_corpus("tfds:little_texts?split=train[:10%]")) == train[:60]
    assert read(open_corpus(f"tfds:{folder}?split=train[590:]+validation")) == train[590:] + validation


def test_it_is_prepared_by_two_workers_with_a_split_of_its_own_held_out(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(shards, "_ONE_PROCESS", 0)
    spec = tiny_data.text_spec("tfds:little_texts", validation="tfds:little_texts?split=validation", seq_len=32)
    prepared = prepare(tmp_path / "prepared", spec, workers=2)
    assert prepared.manifest("text")["documents"]["train"] == 600
    store = prepared.blocks("text", "train")._store
    texts = [prepared.tokenizer.decode(ids[1:-1]) for ids in store.read(range(607))]
    validation = read(open_corpus("tfds:little_texts?split=validation"))
    assert texts == read(open_corpus("tfds:little_texts")) + validation


def test_parts_are_the_same_texts_in_the_same_order(data_dir):
    train = read(open_corpus("tfds:little_texts"))
    corpus = pickle.loads(pickle.dumps(SMALL_PARTS))
    parts = corpus.parts()
    assert 5 < len(parts) < 20 and parts == corpus.parts()
    assert {part.path for part in parts} == {"tfds:little_texts:1.0.0?split=train"}  # no folder of this machine
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert all(0.5 < part.num_bytes / 40_000 < 1.5 for part in parts[:-1])
    texts = {part: list(corpus.read(part, Skips(0))) for part in reversed(parts)}
    assert [text for part in parts for text in texts[part]] == train


def test_the_newest_version_is_read_and_named_in_the_parts(data_dir):
    versions = data_dir / "little_texts"
    for version in ("9.0.0", "10.0.0"):
        shutil.copytree(versions / "1.0.0", versions / version)
        about = json.loads((versions / version / "dataset_info.json").read_text())
        (versions / version / "dataset_info.json").write_text(json.dumps(about | {"version": version}))
    (versions / "10.0.0.incomplete").mkdir()
    (part,) = open_corpus("tfds:little_texts").parts()
    assert part.path == "tfds:little_texts:10.0.0?split=train"
    (part,) = open_corpus("tfds:little_texts:9.0.0").parts()
    assert part.path == "tfds:little_texts:9.0.0?split=train"


def test_fields_within_others_and_where(data_dir):
    assert sorted(numbers(read(open_corpus("tfds:little_texts", where="meta.set=b")))) == list(range(1, 600, 2))
    assert numbers(read(open_corpus("tfds:little_texts", where="meta.id=77"))) == [77]
    assert set(read(open_corpus("tfds:little_texts?split=validation", field="meta.set"))) == {"a", "b"}
    place = re.escape("tfds:little_texts:1.0.0?split=validation, record 0")
    with pytest.raises(DataError, match=f"^{place} has a field `meta.id` that is not a string"):
        read(open_corpus("tfds:little_texts?split=validation", field="meta.id"))


def test_a_corrupt_chunk_costs_its_records(data_dir):
    train = read(open_corpus("tfds:little_texts"))
    file = shard(data_dir, 1)
    quarter = file.stat().st_size // 4  # in the chunks of records; behind them is their index
    tiny_data.flip(file, quarter, quarter + 8)
    before = lengths(data_dir)[0]
    for corpus in (open_corpus("tfds:little_texts"), SMALL_PARTS):
        skips = Skips(2)
        texts = read(corpus, skips)
        assert 598 <= len(texts) < 600 and skips.counts == {"is corrupt": 600 - len(texts)}
        assert texts == [text for text in train if text in set(texts)]
        lost = min(train.index(text) for text in set(train) - set(texts))
        assert skips.first["is corrupt"].startswith(f"{file}, record {lost - before}, byte ")
        with pytest.raises(DataError, match=r"-00001-of-00003, record \d+, byte \d+ is corrupt"):
            read(corpus)


def lengths(data_dir):
    return tfds.builder_from_directory(data_dir / "little_texts" / "1.0.0").info.splits["train"].shard_lengths


def test_a_shard_that_is_cut_off_costs_its_records(data_dir):
    train = read(open_corpus("tfds:little_texts"))
    file = shard(data_dir, 2)
    file.write_bytes(file.read_bytes()[:-5_000])
    skips = Skips(600)
    texts = read(open_corpus("tfds:little_texts"), skips)
    last = lengths(data_dir)[2]
    assert texts == train[: 600 - last] and skips.counts == {"is corrupt": last}


def test_a_shard_or_records_that_vanished_are_an_error_whatever_the_limit(data_dir):
    corpus = open_corpus("tfds:little_texts")
    (part,) = corpus.parts()
    with pytest.raises(DataError, match="has 600 records, but had more"):
        list(corpus.read(part._replace(stop=601), Skips(1_000)))
    shard(data_dir, 1).unlink()
    with pytest.raises(DataError, match=r"-00001-of-00003 can't be read: open\(\) failed: No such file or directory"):
        list(corpus.read(part, Skips(1_000)))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("tfds:nosuch/en", r"no such data set in .*nosuch/en.*tfds build .*--file_format=array_record.*TFDS_DATA_DIR"),
        ("tfds:little_texts:2.0.0", r"no such data set in .*little_texts/2\.0\.0"),
        ("tfds:little_texts?split=test", "the split must be of train, validation"),
        ("tfds:little_texts?split=train[", "the split must be of train, validation"),
        ("tfds:little_texts?split=", r"behind the \? must be split=SPLIT"),
        ("tfds:little_texts?train", r"behind the \? must be split=SPLIT"),
        ("tfds:", "must be like tfds:c4/en"),
        ("tfds:a b", "must be like tfds:c4/en"),
        ("tfds:/nowhere", "no such data set in /nowhere"),
        ("tfds:gs://bucket/c4/en/3.1.0", "read from disks alone"),
    ],
)
def test_what_is_not_there_is_reported_in_a_sentence(data_dir, path, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        open_corpus(path).parts()
    assert repr(path) in str(error.value) and "\n" not in str(error.value)


def test_data_that_cannot_be_used_is_refused_with_what_to_do(data_dir):
    about = data_dir / "little_texts" / "1.0.0" / "dataset_info.json"
    about.write_text(about.read_text().replace("array_record", "tfrecord"))
    for file in about.parent.glob("*array_record*"):
        file.rename(str(file).replace("array_record", "tfrecord"))
    with pytest.raises(ConfigError, match="isn't there as ArrayRecord: prepare it again.*--file_format=array_record"):
        open_corpus("tfds:little_texts").parts()
    about.write_text("{")
    with pytest.raises(DataError, match=r"dataset_info\.json") as error:
        open_corpus("tfds:little_texts").parts()
    assert "\n" not in str(error.value)


def test_tensorflow_and_jax_are_not_imported(data_dir):
    program = (
        "import sys; from meap_jax.readers import open_corpus, Skips; c = open_corpus('tfds:little_texts'); "
        "assert 'tensorflow_datasets' not in sys.modules; "
        "assert len([t for p in c.parts() for t in c.read(p, Skips(0))]) == 600; "
        "assert not {'tensorflow', 'jax'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ, capture_output=True)
