"""The text of a record."""

import pytest

from meap_jax.errors import ConfigError
from meap_jax.readers import Skips
from meap_jax.readers.records import Selection, checked, decode, parse_json, select


def test_the_field_may_be_within_others():
    assert Selection.parse("text").text({"text": " é\n", "id": 1}) == " é\n"
    assert Selection.parse("meta.text").text({"text": "no", "meta": {"text": "yes"}}) == "yes"
    assert Selection.parse("text").text({"text": b"\xef\xbb\xbfcaf\xc3\xa9"}) == "café"


@pytest.mark.parametrize(
    ("value", "wanted"), [("GitHub", "GitHub"), (b"GitHub", "GitHub"), (3, "3"), (True, "true"), ("a=b", "a=b")]
)
def test_where_keeps_only_the_records_with_the_value(value, wanted):
    selection = Selection.parse("text", f"meta.name={wanted}")
    assert selection.columns == ["text", "meta.name"]
    records = [
        ("0", {"text": "kept", "meta": {"name": value}}),
        ("1", {"text": "other", "meta": {"name": "x"}}),
        ("2", {"text": "none", "meta": {}}),
        ("3", {"text": "none", "meta": "name"}),
        ("4", {"meta": {"name": "x"}}),  # without a text, but nobody asked for it
    ]
    skips = Skips(0)
    assert list(select(records, selection, skips)) == ["kept"] and not skips.counts


def test_whole_surrogate_pairs_and_marks_are_no_damage():
    assert checked(parse_json(b'\xef\xbb\xbf{"t": "\\ud83d\\ude00"}')["t"]) == "😀"
    assert decode("\ufeffx".encode()) == "x"


@pytest.mark.parametrize(
    ("field", "where", "sentence"),
    [
        ("", "", "field is ''"),
        ("a..b", "", "field is 'a..b'"),
        ("text", "x", "where is 'x'"),
        ("text", "=x", "where is '=x'"),
        ("text", "a.=x", "where is 'a.=x'"),
    ],
)
def test_what_names_no_field_is_refused(field, where, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Selection.parse(field, where)
