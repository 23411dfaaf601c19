"""Files are found in folders, by patterns and behind URLs."""

import os
import sys

import fsspec
import pytest

from meap_jax.errors import ConfigError, DataError
from meap_jax.readers import Part
from meap_jax.readers.storage import File, find_files, open_part

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def names(path, root):
    return [os.path.relpath(file.path.removeprefix("file://"), root) for file in find_files(str(path), SUFFIXES)]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_files_come_in_the_order_of_their_names_from_every_depth(tmp_path, prefix):
    touch(*(tmp_path / name for name in ("z.txt", "b/c/x.TXT", "a.jsonl", "b/a.jsonl.gz", "notes.md", "gz")))
    touch(tmp_path / ".hidden.txt", tmp_path / ".git/a.txt", tmp_path / "b/.x/a.txt")
    assert names(f"{prefix}{tmp_path}", tmp_path) == ["a.jsonl", "b/a.jsonl.gz", "b/c/x.TXT", "z.txt"]
    assert names(f"{prefix}{tmp_path}/", tmp_path) == ["a.jsonl", "b/a.jsonl.gz", "b/c/x.TXT", "z.txt"]
    assert names(f"{prefix}{tmp_path}/z.txt", tmp_path) == ["z.txt"]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_patterns_match_files_and_folders(tmp_path, prefix):
    touch(*(tmp_path / name for name in ("en.0.txt", "en.1.txt", "de.0.txt", "en.2.md", "en.d/x.txt", ".en.3.txt")))
    assert names(f"{prefix}{tmp_path}/en.*", tmp_path) == ["en.0.txt", "en.1.txt", "en.d/x.txt"]
    assert names(f"{prefix}{tmp_path}/e?.[01].txt", tmp_path) == ["en.0.txt", "en.1.txt"]
    assert names(f"{prefix}{tmp_path}/**/x.txt", tmp_path) == ["en.d/x.txt"]


def test_a_name_that_looks_like_a_pattern_is_a_name_if_it_is_there(tmp_path):
    touch(tmp_path / "[a]" / "x.txt", tmp_path / "a" / "y.txt")
    assert names(tmp_path / "[a]", tmp_path) == ["[a]/x.txt"]


def test_the_home_folder_is_known(tmp_path, monkeypatch):
    touch(tmp_path / "x.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("~/x.txt", SUFFIXES) == [File(f"{tmp_path}/x.txt", 1)]


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "blobs" / "0123.txt", tmp_path / "other" / "y.txt")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "x.txt").symlink_to("../blobs/0123.txt")
    (tree / "other").symlink_to("../other")
    (tree / "again").symlink_to(".")
    assert names(tree, tree) == ["other/y.txt", "x.txt"]
    (tree / "lost.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"lost\.txt can't be read: No such file"):
        find_files(str(tree), SUFFIXES)


def test_files_in_a_bucket_are_found_and_opened(tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe({f"/{tmp_path.name}/{name}": b"four" for name in ("b/1.txt", "a.jsonl", "no.md", "b/.x/2.txt")})
    url = f"memory://{tmp_path.name}"
    files = find_files(url, SUFFIXES)
    assert [file.path for file in files] == [f"memory:///{tmp_path.name}/{name}" for name in ("a.jsonl", "b/1.txt")]
    assert find_files(f"{url}/*/1.txt", SUFFIXES) == find_files(f"{url}/b/1.txt", SUFFIXES) == [files[1]]
    with open_part(Part(files[0].path, 0, None, files[0].size)) as file:
        assert file.read() == b"four"
    with pytest.raises(DataError, match="has 4 bytes, but had 5"):
        open_part(Part(files[0].path, 0, None, 5))
    with pytest.raises(DataError, match="is gone"):
        open_part(Part(f"{url}/lost.txt", 0, None, 5))
    with pytest.raises(ConfigError, match="does not exist"):
        find_files(f"{url}/lost", SUFFIXES)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("gs", r"pip install gcsfs\.?$"), ("s3", r"pip install s3fs\.?$"), ("nosuch", "fsspec does not know its kind")],
)
def test_a_kind_of_url_that_cannot_be_read_is_named_with_what_to_install(kind, sentence, monkeypatch):
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it weren't there, where it is
    with pytest.raises(ConfigError, match=rf"the path is '{kind}://bucket/x'.*{sentence}"):
        find_files(f"{kind}://bucket/x", SUFFIXES)


def test_a_path_without_such_files_is_refused(tmp_path):
    for nothing in ("nowhere", "*.txt"):
        with pytest.raises(ConfigError, match="does not exist"):
            find_files(str(tmp_path / nothing), SUFFIXES)
    with pytest.raises(DataError, match=r"holds no file that ends in \.txt, \.jsonl or \.jsonl\.gz"):
        find_files(str(tmp_path), SUFFIXES)
    touch(tmp_path / "a.pdf")
    with pytest.raises(ConfigError, match=r"a\.pdf', but must be a file that ends in \.txt"):
        find_files(str(tmp_path / "a.pdf"), SUFFIXES)
    with pytest.raises(DataError, match="holds no file"):
        find_files(str(tmp_path), SUFFIXES)


def test_a_file_that_vanished_or_changed_is_an_error_in_a_sentence(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("four")
    with open_part(Part(str(path), 1, None, 3)) as file:
        assert file.read() == b"four"
    for part in (Part(str(path), 0, None, 5), Part(str(path), 1, None, 4)):
        with pytest.raises(DataError, match=r"a\.txt has 4 bytes, but had 5 when the work was divided"):
            open_part(part)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt was there when the work was divided, but is gone"):
        open_part(Part(str(path), 0, None, 4))
    path.mkdir()
    with pytest.raises(DataError, match=r"a\.txt is a folder, but must be a file"):
        open_part(Part(str(path), 0, None, 4))
