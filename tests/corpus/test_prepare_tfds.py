"""A data set of TFDS, from a builder as users write them to the blocks of training."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

import tiny_data
from meap_jax.corpus import shards as shards_module
from meap_jax.corpus.prepare import prepare
from meap_jax.data.store import SPLITS

SIZES = {"train": 300, "validation": 40}


def text(split, number):
    return f"{split} {number}: " + " ".join(
        ["the sea", "a storm", "salt", "é 漢字"][(number * i) % 4] for i in range(40)
    )


class PreparedTexts(tfds.core.GeneratorBasedBuilder):
    """Both splits of a corpus; a record of each is blank."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"body": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split):
        for number in range(SIZES[split]):
            yield number, {"body": text(split, number) if number != 7 else " \n"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    config = tfds.download.DownloadConfig(num_shards=3, verify_ssl=False, try_download_gcs=False)
    PreparedTexts(data_dir=str(folder), file_format="array_record").download_and_prepare(download_config=config)
    return folder


@pytest.fixture
def spec(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    return tiny_data.text_spec("tfds:prepared_texts", validation="tfds:prepared_texts?split=validation", field="body")


def texts_of(prepared, split):
    """The documents that the blocks of a split hold, the last one perhaps cut."""
    blocks = prepared.blocks("text", split)
    ids = np.concatenate([blocks[i].tokens for i in range(len(blocks))]).tolist()
    bos, eos = prepared.tokenizer.bos_id, prepared.tokenizer.eos_id
    starts = [i for i, token in enumerate(ids) if token == bos] + [len(ids)]
    assert starts[0] == 0 and all(ids[stop - 1] == eos for stop in starts[1:-1])
    return [
        prepared.tokenizer.decode(ids[start + 1 : stop]).removesuffix("</s>")
        for start, stop in zip(starts, starts[1:], strict=False)
    ]


def test_blocks_hold_its_texts_each_in_its_split(spec, tmp_path):
    prepared = prepare(tmp_path / "data", spec)
    assert prepared.manifest("text")["skipped"] == {"is blank": 2}
    train = texts_of(prepared, "train")
    held_out = texts_of(prepared, "validation") + texts_of(prepared, "test")
    expected = {split: [text(split, i) for i in range(SIZES[split]) if i != 7] for split in SIZES}
    assert len(train) >= 290 and set(train[:-1]) <= set(expected["train"])
    assert len(held_out) >= 30 and len(set(held_out) & set(expected["validation"])) >= len(held_out) - 2
    assert sum(prepared.manifest("text")["documents"][split] for split in SPLITS) == sum(map(len, expected.values()))


def test_any_number_of_shards_and_workers_gives_the_same_blocks(spec, tmp_path, monkeypatch):
    alone = prepare(tmp_path / "alone", spec, workers=1)
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 1)
    monkeypatch.setattr(shards_module, "_ONE_PROCESS", 0)
    many = prepare(tmp_path / "many", spec, workers=2)
    assert len(many.manifest("text")["shards"]) == 2 and len(alone.manifest("text")["shards"]) == 1
    for split in SPLITS:
        assert len(alone.blocks("text", split)) == len(many.blocks("text", split))
        for i in range(len(alone.blocks("text", split))):
            assert np.array_equal(*(prepared.blocks("text", split)[i].tokens for prepared in (alone, many)))
