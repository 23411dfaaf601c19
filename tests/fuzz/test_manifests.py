"""Prepared data whose manifests or files were altered: it is opened and read, or refused in a sentence."""

import json
import pathlib
import shutil
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_data
from fuzzing import altered, damaged, few, refused_in_a_sentence
from meap_jax.corpus.prepare import prepare

MANIFESTS = ("manifest.json", "text/manifest.json", "text/plans/*/manifest.json")
FILES = ("text/index.npy", "text/00000.arrayrecord", "text/plans/*/train.slices", "text/plans/*/train.bounds",
         "tokenizer.model")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A corpus, its spec, and the folder that was prepared from it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus").mkdir()
    corpus = tiny_data.write_sea_stories(folder / "corpus", 1, 40, num_words=120)
    spec = tiny_data.text_spec(corpus)
    prepare(folder / "data", spec, workers=1)
    return folder / "data", spec


def open_and_read(folder, spec):
    prepared = prepare(folder, spec, workers=1)
    for split in ("train", "validation", "test"):
        blocks = prepared.blocks("text", split)
        for index in range(min(len(blocks), 50)):
            assert blocks[index].tokens.shape == (spec.plans["text"].block_len,)


def read_altered(whole, pattern, change):
    """Opens a copy in which one file is another, and checks that nothing was written beside it."""
    source, spec = whole
    with tempfile.TemporaryDirectory() as above:
        folder = pathlib.Path(above, "data")
        shutil.copytree(source, folder)
        (file,) = folder.glob(pattern)
        file.write_bytes(change(file.read_bytes()))
        with refused_in_a_sentence():
            open_and_read(folder, spec)
        assert [path.name for path in pathlib.Path(above).iterdir()] in (["data"], [])


@pytest.mark.parametrize("pattern", MANIFESTS)
@few
@given(st.data())
def test_an_altered_manifest_is_read_or_refused(whole, pattern, data):
    read_altered(whole, pattern, lambda old: json.dumps(data.draw(altered(json.loads(old)))).encode())


@pytest.mark.parametrize("pattern", [*MANIFESTS, *FILES])
@few
@given(st.data())
def test_a_damaged_file_is_read_or_refused(whole, pattern, data):
    read_altered(whole, pattern, lambda old: data.draw(damaged(old)))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "", "a/b", "a\0b"])
def test_a_manifest_names_no_file_outside_its_folder(whole, name):
    for pattern in MANIFESTS[:2]:
        files = [name] if pattern == "manifest.json" else {name: 5}
        read_altered(whole, pattern, lambda old, files=files: json.dumps(json.loads(old) | {"files": files}).encode())
