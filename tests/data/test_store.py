"""Documents of ids on disk, in any order."""

import pickle
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_data
from meap_jax.data import store as store_module
from meap_jax.data.store import AnswerSpan, EncodedDocument, Store, ids_dtype, shard_file, write_shard
from meap_jax.errors import DataError


@pytest.fixture(scope="module")
def shards():
    rng = np.random.default_rng(0)
    return [
        [
            (int(rng.integers(3)), EncodedDocument(rng.integers(0, 60_000, rng.integers(1, 300)).tolist()))
            for _ in range(n)
        ]
        for n in (50, 0, 1, 120)
    ]


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


def test_threads_and_other_processes_read_what_this_one_does(store, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_FILES", 1)  # So that threads close what others have opened.
    numbers = np.random.default_rng(1).permutation(len(store)).tolist() * 4
    expected = {i: store[i].tolist() for i in range(len(store))}
    with ThreadPoolExecutor(8) as pool:
        for i, ids in zip(numbers, pool.map(store.__getitem__, numbers), strict=True):
            assert ids.tolist() == expected[i]
    assert pickle.loads(pickle.dumps(store))[7].tolist() == expected[7]


def test_ids_that_need_it_take_four_bytes(tmp_path):
    assert [ids_dtype(n).itemsize for n in (512, 65_536, 65_537, 131_136)] == [2, 2, 4, 4]
    store = tiny_data.make_store(tmp_path, [[(0, EncodedDocument([131_071, 0, 65_536]))]], num_tokens=131_072)
    assert store[0].tolist() == [131_071, 0, 65_536]


def test_answers_of_held_out_documents_are_kept_with_the_documents_number(tmp_path):
    with_answer = EncodedDocument([1, 5, 6, 5, 2], (AnswerSpan(3, 1, 1, 0.5),))
    store = tiny_data.make_store(tmp_path, [[(0, with_answer), (1, with_answer)], [(2, with_answer)]])
    assert store.answers.tolist() == [(1, 3, 1, 0.5, 2), (2, 3, 1, 0.5, 2)]


def test_the_hash_of_a_shard_depends_on_ids_and_splits_alone(tmp_path):
    def sha(folder, *documents):
        folder.mkdir(exist_ok=True)
        return write_shard(folder, 0, [(s, EncodedDocument(ids)) for s, ids in documents], np.dtype("<u2")).sha256

    first = sha(tmp_path / "a", (0, [1, 2]), (0, [3]))
    assert sha(tmp_path / "b", (0, [1, 2]), (0, [3])) == first
    assert len({first, sha(tmp_path / "c", (0, [1]), (0, [2, 3])), sha(tmp_path / "d", (1, [1, 2]), (0, [3]))}) == 3


def test_a_flipped_byte_is_named_with_file_record_and_byte(tmp_path, shards):
    tiny_data.make_store(tmp_path, shards, num_tokens=60_000)
    file = shard_file(tmp_path, 3)
    content = bytearray(file.read_bytes())
    content[5000] ^= 0xFF
    file.write_bytes(content)
    damaged = Store(tmp_path, [50, 0, 1, 120], np.dtype("<u2"))
    with pytest.raises(DataError, match=r"00003.arrayrecord is damaged at one of the records \d+ to \d+ .*at byte"):
        for i in range(len(damaged)):
            damaged[i]


def test_a_full_disk_is_an_error_and_leaves_no_shard(tmp_path):
    program = (
        "import pathlib, resource, signal, numpy as np\n"
        "from meap_jax.corpus.documents import EncodedDocument\n"
        "from meap_jax.data.store import write_shard\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "documents = ((0, EncodedDocument(list(range(i, i + 900)))) for i in range(300))\n"
        f"write_shard(pathlib.Path({str(tmp_path)!r}), 0, documents, np.dtype('<u2'))\n"
    )
    assert resource.RLIMIT_FSIZE and signal.SIGXFSZ
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "OSError" in ended.stderr and "can't be written" in ended.stderr and "File too large" in ended.stderr
    assert list(tmp_path.iterdir()) == []
