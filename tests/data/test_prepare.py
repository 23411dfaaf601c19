"""Data is frozen once, completely, and opened many times."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meap_jax.config import ConfigError
from meap_jax.data import prepare as prepare_module
from meap_jax.data import sources
from meap_jax.data.documents import DataError
from meap_jax.data.prepare import open_prepared, prepare

OPTIONS = {
    "sources": ("retrieval", "text"),
    "path": None,
    "tokenizer": "bpe",
    "vocab_size": 512,
    "seq_len": 96,
    "seed": 3,
    "retrieval": {
        "num_keys": 16,
        "num_values": 16,
        "num_facts": 4,
        "num_eval_facts": 4,
        "questions_per_fact": 0.5,
        "max_fillers": 1,
        "num_documents": 300,
        "num_eval_documents": 20,
    },
    "holdout": 0.1,
}


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["sea", "salt", "ship", "storm", "sail", "sand"], 200)
        (folder / f"{i:02}.txt").write_text(f"Book {i}: " + " ".join(words))
    (folder / "40.txt").write_text((folder / "00.txt").read_text())
    return folder


@pytest.fixture(scope="module")
def options(books):
    return OPTIONS | {"path": str(books)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, options):
    return prepare(tmp_path_factory.mktemp("prepared") / "deep" / "data", options=options)


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared.folder, tmp_path / "copy")


def test_blocks_are_what_the_tokenizer_made_of_the_sources(prepared):
    for source in ("retrieval", "text"):
        for split in ("train", "validation", "test"):
            blocks = prepared.blocks(source, split)
            assert blocks.tokens.shape == blocks.segment_ids.shape
            assert blocks.tokens.shape[1] == prepared.block_len == 97 and len(blocks.tokens) > 0
            assert blocks.tokens.dtype == np.uint16 and blocks.segment_ids.dtype == np.uint8
            assert isinstance(blocks.tokens, np.memmap) and not blocks.tokens.flags.writeable
            assert (blocks.answers is not None) == (source == "retrieval" and split != "train")
    blocks = prepared.blocks("retrieval", "test")
    num_documents = prepared.manifest["sources"]["retrieval"]["test"]["documents"]
    assert len(blocks.answers) == 4 * num_documents  # Held-out documents ask each of their four facts once.
    for answer in blocks.answers:
        tokens = blocks.tokens[answer["row"]]
        start, length, distance = answer["start"], answer["length"], answer["distance"]
        assert np.array_equal(tokens[start : start + length], tokens[start - distance : start - distance + length])


def test_the_manifest_counts_what_is_there(prepared):
    manifest = prepared.manifest
    counts = manifest["sources"]["retrieval"]["train"]
    blocks = prepared.blocks("retrieval", "train")
    assert counts["documents"] == 300 and counts["blocks"] == len(blocks.tokens)
    assert counts["tokens"] == np.count_nonzero(blocks.segment_ids)
    assert counts["padding_share"] == pytest.approx(np.mean(blocks.segment_ids == 0), abs=1e-4)
    assert manifest["sources"]["text"]["split_by"] == "document"
    assert manifest["tokenizer"]["mask_id"] == prepared.tokenizer.mask_id == 3
    assert set(os.listdir(prepared.folder)) == set(manifest["files"]) | {"manifest.json"}


def test_the_fingerprint_depends_on_content_alone(prepared, options, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module.platform, "python_version", lambda: "9.9.9")
    assert prepare(tmp_path / "b", options=options).fingerprint == prepared.fingerprint
    moved = shutil.copytree(options["path"], tmp_path / "moved")
    again = prepare(tmp_path / "c", options=options | {"path": str(moved)})
    assert again.fingerprint == prepared.fingerprint
    other = prepare(tmp_path / "d", options=options | {"seed": 4})
    assert other.fingerprint != prepared.fingerprint


def test_no_text_stands_in_two_splits(prepared, options):
    for name in ("retrieval", "text"):
        source = sources.open_source(name, options)
        train, validation, test = ({document.text for document in source.documents(split)} for split in sources.SPLITS)
        assert train and validation and test
        assert not (train & validation or train & test or validation & test)
    assert len(train | validation | test) == 40  # of 41 files, two of which are equal


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=12), st.floats(0.01, 0.4))
def test_every_text_is_in_one_split_and_held_out_splits_are_not_empty(texts, holdout):
    source = sources._split_texts("text", lambda: texts, holdout)
    splits = [[d.text for d in source.documents(split)] for split in sources.SPLITS]
    assert sorted(sum(splits, [])) == sorted(texts)
    if len(set(texts)) >= 3:
        assert all(splits)
    else:
        assert not splits[1] and not splits[2]


def test_adding_a_text_does_not_depend_on_the_order_of_files():
    texts = [f"text {i}" for i in range(50)]
    there = sources._split_texts("text", lambda: texts, 0.1)
    back = sources._split_texts("text", lambda: texts[::-1], 0.1)
    for split in sources.SPLITS:
        assert {*there.documents(split)} == {*back.documents(split)}


def test_a_finished_folder_is_reused_and_never_written_again(copy, options, monkeypatch):
    monkeypatch.setattr(prepare_module, "_write", None)
    assert prepare(copy, options=options).fingerprint == open_prepared(copy).fingerprint


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seq_len": 64}, "prepared with seq_len = 96, but the config wants 64"),
        (
            {"tokenizer": "mistral", "vocab_size": 32064},
            r"prepared with data.tokenizer = 'bpe', but the config wants 'mistral'; model.vocab_size",
        ),
        ({"retrieval": OPTIONS["retrieval"] | {"num_facts": 3}}, r"data\.retrieval\.num_facts = 4"),
        ({"sources": ("text",)}, "prepared with "),
    ],
)
def test_other_options_are_named_with_both_values(prepared, options, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        prepare(prepared.folder, options=options | change)


def test_options_that_the_sources_do_not_read_may_differ(options, tmp_path):
    only_text = options | {"sources": ("text",)}
    first = prepare(tmp_path / "a", options=only_text)
    second = prepare(tmp_path / "a", options=only_text | {"seed": 99, "retrieval": {}})
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("name", ["retrieval-train.tokens.npy", "tokenizer.json", "manifest.json"])
def test_a_missing_or_cut_file_is_named(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=f"{name} is damaged"):
        open_prepared(copy)
    path.unlink()
    with pytest.raises(DataError, match=name):
        open_prepared(copy)


def test_a_changed_tokenizer_of_the_same_size_is_found(copy):
    path = copy / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"falcon", b"fulcon"))
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged"):
        open_prepared(copy)


def test_a_manifest_of_other_files_or_another_layout_is_refused(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"fingerprint": "0"}))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        open_prepared(copy)
    path.write_text(json.dumps(manifest | {"layout_version": 0}))
    with pytest.raises(DataError, match="layout 0"):
        open_prepared(copy)


def test_an_unknown_source_or_split_is_named(prepared):
    with pytest.raises(DataError, match="stdlib-train"):
        prepared.blocks("stdlib", "train")


def test_a_killed_process_leaves_no_half_written_folder(tmp_path, options):
    folder = tmp_path / "data"
    program = (
        "import os, signal\n"
        "from meap_jax.data import prepare as module\n"
        "save = module._save\n"
        "def dies(path, array):\n"
        "    save(path, array)\n"
        "    if 'validation' in path.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "module._save = dies\n"
        f"module.prepare({str(folder)!r}, options={options!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not folder.exists() and list(tmp_path.glob(".data.partial-*"))
    assert prepare(folder, options=options).fingerprint


def test_an_error_leaves_nothing_behind(tmp_path, options):
    with pytest.raises(DataError, match="Document 0 has"):
        prepare(tmp_path / "data", options=options | {"seq_len": 20})
    assert os.listdir(tmp_path) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path, options):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a prepared data folder"):
        prepare(tmp_path, options=options)
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"path": None}, r"data\.path is not set: .* --config\.data\.path=/data/books"),
        ({"tokenizer": "gpt"}, r"data\.tokenizer is 'gpt', but must be one of bpe, mistral"),
        ({"sources": ("web",)}, "'web'"),
        ({"tokenizer": "mistral"}, r"model\.vocab_size is 512, .* set 32064"),
    ],
)
def test_impossible_options_are_one_sentence(tmp_path, options, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        prepare(tmp_path / "data", options=options | change)


def test_a_bucket_is_no_place_for_memory_maps(options):
    with pytest.raises(ConfigError, match="must be a local folder"):
        prepare("gs://bucket/data", options=options)


def test_too_few_different_documents_are_an_error(tmp_path, options):
    few = dict(options["retrieval"], num_keys=1, num_values=1, num_facts=1, num_eval_facts=1, questions_per_fact=1.0)
    with pytest.raises(DataError, match="no document left for"):
        prepare(tmp_path / "data", options=options | {"retrieval": few | {"max_fillers": 0}})


def test_a_single_small_book_can_be_trained_on_with_the_large_vocabulary(tmp_path, books):
    path = str(books / "00.txt")
    wanted = OPTIONS | {"sources": ("text",), "path": path, "seq_len": 32}
    prepared = prepare(tmp_path / "a", options=wanted | {"tokenizer": "mistral", "vocab_size": 32064})
    assert prepared.manifest["sources"]["text"]["split_by"] == "block"
    assert prepared.tokenizer.mask_id == 32_000
    text = prepared.tokenizer.decode(prepared.blocks("text", "train").tokens[0])
    assert text.startswith("<s>Book 0:")
