"""Documents of ids on disk, in any order."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_data
from meap_jax.data import store as store_module
from meap_jax.data.store import SPAN_DTYPE, EncodedDocument, Store, TokenSpan, ids_dtype, index_files, shard_file
from meap_jax.errors import DataError


@pytest.fixture(scope="module")
def shards():
    rng = np.random.default_rng(0)

    def document():
        return int(rng.integers(3)), EncodedDocument(rng.integers(0, 60_000, rng.integers(1, 300)).tolist())

    return [[document() for _ in range(n)] for n in (50, 0, 1, 120)]


@pytest.fixture(scope="module")
def store(tmp_path_factory, shards):
    return tiny_data.make_store(tmp_path_factory.mktemp("store"), shards, num_tokens=60_000)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_documents_come_back_in_the_order_asked_for(store, shards, data):
    documents = [d.ids for shard in shards for _, d in shard]
    asked = data.draw(st.lists(st.integers(0, len(documents) - 1), max_size=20))
    assert [ids.tolist() for ids in store.read(asked)] == [documents[i] for i in asked]


def test_the_index_knows_lengths_and_splits(store, shards):
    documents = [(split, d.ids) for shard in shards for split, d in shard]
    assert store.index["length"].tolist() == [len(ids) for _, ids in documents]
    for number, split in enumerate(("train", "validation", "test")):
        assert store.documents(split).tolist() == [i for i, (s, _) in enumerate(documents) if s == number]


def test_threads_read_what_one_does(store, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_FILES", 1)  # So that threads close what others have opened.
    numbers = np.random.default_rng(1).permutation(len(store)).tolist() * 4
    expected = {i: store[i].tolist() for i in range(len(store))}
    with ThreadPoolExecutor(8) as pool:
        for i, ids in zip(numbers, pool.map(store.__getitem__, numbers), strict=True):
            assert ids.tolist() == expected[i]


def test_ids_that_need_it_take_four_bytes(tmp_path):
    assert [ids_dtype(n).itemsize for n in (512, 65_536, 65_537, 131_136)] == [2, 2, 4, 4]
    store = tiny_data.make_store(tmp_path, [[(0, EncodedDocument([131_071, 0, 65_536]))]], num_tokens=131_072)
    assert store[0].tolist() == [131_071, 0, 65_536]


def test_spans_of_every_split_and_their_columns_are_kept_with_the_documents_number(tmp_path):
    spans = (TokenSpan(3, 1, "answer", {"fact": 2, "score": 0.5}), TokenSpan(1, 2, "loss"), TokenSpan(3, 2, "loss"))
    document = EncodedDocument([1, 5, 6, 5, 2], spans)
    store = tiny_data.make_store(tmp_path, [[(0, document), (0, EncodedDocument([1]))], [], [(1, document)]])
    answers = store.spans("answer")
    assert answers.tolist() == [(0, 3, 1, 2, 0.5), (2, 3, 1, 2, 0.5)]
    assert answers.dtype.names == ("document", "start", "length", "fact", "score")
    assert store.spans("loss").tolist() == [(0, 1, 2), (0, 3, 2), (2, 1, 2), (2, 3, 2)]
    assert store.spans("absent").dtype == SPAN_DTYPE and not len(store.spans("absent"))
    assert [path.name for path in index_files(tmp_path)] == ["index.npy", "spans.answer.npy", "spans.loss.npy"]


@pytest.mark.parametrize("columns", [{}, {"fact": 1, "more": 2}, {"other": 1}])
def test_spans_of_a_role_with_different_columns_are_refused(tmp_path, columns):
    spans = (TokenSpan(1, 1, "answer", {"fact": 0}), TokenSpan(2, 1, "answer", columns))
    with pytest.raises(TypeError):
        tiny_data.make_store(tmp_path, [[(0, EncodedDocument([1, 2, 3], spans))]])


def test_the_hash_of_a_shard_depends_on_ids_and_splits_alone(tmp_path):
    def sha(folder, *documents):
        folder.mkdir(exist_ok=True)
        encoded = [(split, EncodedDocument(ids)) for split, ids in documents]
        return store_module.write_shard(folder, 0, encoded, np.dtype("<u2")).sha256

    first = sha(tmp_path / "a", (0, [1, 2]), (0, [3]))
    assert sha(tmp_path / "b", (0, [1, 2]), (0, [3])) == first
    assert len({first, sha(tmp_path / "c", (0, [1]), (0, [2, 3])), sha(tmp_path / "d", (1, [1, 2]), (0, [3]))}) == 3


def test_a_flipped_byte_is_named_with_file_record_and_byte(tmp_path, shards):
    tiny_data.make_store(tmp_path, shards, num_tokens=60_000)
    tiny_data.flip(shard_file(tmp_path, 3), 5000, 5001)
    damaged = Store(tmp_path, [50, 0, 1, 120], np.dtype("<u2"))
    with pytest.raises(DataError, match=r"00003.arrayrecord is damaged at one of the records \d+ to \d+ .*at byte"):
        for i in range(len(damaged)):
            damaged[i]
