"""Reading the user's files."""

import json

import pytest

from meap_jax.config import ConfigError
from meap_jax.data.documents import DataError
from meap_jax.data.text import read_text


def test_documents_come_in_sorted_order_from_every_depth(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "z.txt").write_text("last\n")
    (tmp_path / "b" / "c" / "x.TXT").write_bytes(b"\xef\xbb\xbfdeep \xc3\xa9")
    lines = [
        json.dumps({"text": "one\ntwo", "id": 3}),
        "",
        json.dumps({"text": " "}),
        '{"text":"é"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    assert list(read_text(str(tmp_path))) == ["one\ntwo", "é", "deep é", "last\n"]


def test_a_single_file_is_enough(tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    assert list(read_text(str(tmp_path / "a.txt"))) == ["alone"]


def test_documents_are_read_one_at_a_time(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.jsonl").write_text("broken")
    assert next(read_text(str(tmp_path))) == "good"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text"', r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl, line 1 .* field `text`"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl, line 1 .* string"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1 is not an object"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1 .* surrogate"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl, line 2 is not UTF-8"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8: byte 3 is 0xe9"),
        ("a.txt", b" \n\t", "no text"),
        ("a.jsonl", b"", "no text"),
        ("a.md", b"text", r"no \.txt or \.jsonl file"),
    ],
)
def test_unusable_data_is_one_sentence_with_file_and_line(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as error:
        list(read_text(str(tmp_path)))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_cannot_be_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        list(read_text(str(tmp_path / "nowhere")))
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ConfigError, match=r"neither \.txt nor \.jsonl"):
        list(read_text(str(tmp_path / "a.pdf")))
