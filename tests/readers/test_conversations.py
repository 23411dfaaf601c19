"""Conversations in files: how they may be written, which are bad records, and on which line each begins."""

import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from meap_jax.errors import ConfigError, DataError
from meap_jax.readers import Skips, open_conversations
from meap_jax.readers.conversations import ConversationCorpus
from meap_jax.readers.files import FileCorpus
from meap_jax.readers.records import Selection

ALPACA = {"instruction": "Sort", "input": "b, a", "output": "a, b"}
SHAREGPT = {
    "id": 7,
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "Hi!"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Bye!"},
        {"from": "gpt", "value": "So."},
    ],
}
OPENAI = {"messages": [{"role": who, "content": who.upper()} for who in ("system", "user", "assistant")], "lang": "en"}
SAID = [
    [("user", "Sort\nb, a"), ("assistant", "a, b")],
    [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "Bye!"), ("assistant", "So.")],
    [("system", "SYSTEM"), ("user", "USER"), ("assistant", "ASSISTANT")],
]


def read(path, limit=0, **options):
    """(role, content) of each message of each conversation, their lines, and what was left out."""
    corpus, skips = open_conversations(str(path), **options), Skips(limit)
    return parts_of(corpus, skips) + (skips,)


def parts_of(corpus, skips):
    corpus = pickle.loads(pickle.dumps(corpus))
    found = [conversation for part in corpus.parts() for conversation in corpus.read(part, skips)]
    said = [[(message["role"], message["content"]) for message in each.messages] for each in found]
    return said, [conversation.line for conversation in found]


def in_lines(records):
    return "\n \n".join(map(json.dumps, records)).encode()


def in_an_array(records):
    return b"\xef\xbb\xbf\n[" + ",\n\n".join(json.dumps(record, indent=1) for record in records).encode() + b"\n]\n"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("write", [in_lines, in_an_array])
def test_three_ways_of_writing_are_told_by_their_fields_in_lines_and_arrays(tmp_path, name, write):
    data = write([ALPACA, SHAREGPT, OPENAI])
    lines = [1, 3, 5] if write is in_lines else [2, 8, 31]
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(compress(data))
    (tmp_path / "notes.txt").write_text("not read")
    assert read(tmp_path)[:2] == (SAID, lines)
    if write is in_an_array:
        assert [data.split(b"\n")[line - 1].strip(b"[ ") for line in lines] == [b"{"] * 3


def test_parquet_has_lists_of_messages_and_the_numbers_of_its_records(tmp_path):
    rows = [{"lang": "en", **dict.fromkeys(["messages", "instruction", "input", "output"]), **record}
            for record in (ALPACA, OPENAI, ALPACA | {"input": None, "lang": "fr"}, ALPACA) * 3]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=5)
    said = [SAID[0], SAID[2], [("user", "Sort"), ("assistant", "a, b")], SAID[0]] * 3
    assert read(tmp_path / "a.parquet")[:2] == (said, list(range(1, 13)))
    divided = FileCorpus(str(tmp_path), Selection.parse("messages"), part_bytes=1)
    assert len(divided.parts()) == 3 and parts_of(ConversationCorpus(divided), Skips(0)) == (said, list(range(1, 13)))
    assert read(tmp_path / "a.parquet", where="lang=fr")[1] == [3, 7, 11]


@pytest.mark.parametrize("part_bytes", [1, 7, 40, 10_000])
def test_lines_are_numbered_through_wherever_a_file_was_divided_and_an_array_is_not_divided(tmp_path, part_bytes):
    records = [ALPACA | {"instruction": f"{i}" * (i % 5 + 1)} for i in range(12)]
    (tmp_path / "a.jsonl").write_bytes(in_lines(records))
    (tmp_path / "b.json").write_bytes(in_an_array(records))
    corpus = ConversationCorpus(FileCorpus(str(tmp_path), Selection.parse("messages"), part_bytes=part_bytes))
    said, lines = parts_of(corpus, Skips(0))
    assert said == [[("user", f"{r['instruction']}\nb, a"), ("assistant", "a, b")] for r in records] * 2
    assert lines == [*range(1, 24, 2), *range(2, 74, 6)]
    assert [part.start for part in corpus.parts() if part.path.endswith("b.json")] == [0]
    places = [each.place for part in corpus.parts() for each in corpus.read(part, Skips(0))]
    assert places[11] == f"{tmp_path}/a.jsonl, line 23"


def test_templates_are_told_an_instruction_and_its_input_apart(tmp_path):
    (tmp_path / "a.json").write_bytes(in_lines([ALPACA, ALPACA | {"input": " "}, {"instruction": "a", "output": "b"}]))
    corpus = open_conversations(str(tmp_path))
    asked = [conversation.messages[0] for part in corpus.parts() for conversation in corpus.read(part, Skips(0))]
    assert asked == [
        {"role": "user", "content": "Sort\nb, a", "instruction": "Sort", "input": "b, a"},
        {"role": "user", "content": "Sort"},
        {"role": "user", "content": "a"},
    ]


@pytest.mark.parametrize(
    "record, system",
    [
        (OPENAI | {"system": "other"}, "SYSTEM"),
        (SHAREGPT | {"system": " ", "system_prompt": "Yes."}, "Yes."),
        (SHAREGPT | {"system": "\n"}, None),
        (ALPACA | {"system": "Be brief."}, "Be brief."),
        ({"messages": [{"role": "system", "content": ""}, *OPENAI["messages"][1:]]}, None),
    ],
)
def test_whose_system_prompt_a_conversation_has(tmp_path, record, system):
    (tmp_path / "a.json").write_bytes(in_an_array([record]))
    [said], _, _ = read(tmp_path)
    assert said[0] == ("system", system) if system else said[0][0] == "user"
    assert [role for role, _ in said].count("system") == bool(system)


def messages(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    "record, place, reason",
    [
        ([], "", "is not an object"),
        ({"text": "a"}, "", "has none of the fields `messages`, `conversations` and `instruction`"),
        ({"messages": []}, "", "has no list of messages in `messages`"),
        ({"conversations": "a"}, "", "has no list of messages in `conversations`"),
        ({"messages": ["a"]}, "message 1", "is not an object"),
        (messages(("tool", "a")), "message 1 ('tool')", "has a role that is none of system, user, human, assistant"),
        (messages(("user", "a"), ({}, "b")), "message 2 ({})", "has a role that is none of system, user, human"),
        (messages(("user", "a"), ("assistant", " ")), "message 2, `content`", "is blank"),
        (messages(("user", ""), ("assistant", "a")), "message 1, `content`", "is blank"),
        (messages(("user", "a"), ("assistant", ["b"])), "message 2, `content`", "is not a string"),
        (messages(("user", "a"), ("assistant", "\ud800")), "message 2, `content`", "escapes half of a surrogate pair"),
        ({"conversations": [{"from": "human"}]}, "message 1, `value`", "is missing"),
        ({"instruction": "a"}, "`output`", "is missing"),
        ({"instruction": "a", "output": ""}, "`output`", "is blank"),
        ({"instruction": "a", "input": 5, "output": "b"}, "`input`", "is not a string"),
        (messages(("assistant", "a")), "message 1 (assistant)", "is out of order: behind a system's message, if there"),
        (messages(("user", "a"), ("user", "b")), "message 2 (user)", "is out of order"),
        (messages(("user", "a"), ("system", "b"), ("assistant", "c")), "message 2 (system)", "is out of order"),
        (messages(("system", "s"), ("assistant", "b")), "message 2 (assistant)", "is out of order"),
        (messages(("user", "a"), ("assistant", "b"), ("user", "c")), "", "does not end with an answer"),
        (messages(("system", "a")), "", "does not end with an answer"),
    ],
)
@pytest.mark.parametrize("write", [in_lines, in_an_array])
def test_what_is_no_conversation_is_left_out_with_its_place_up_to_the_limit(tmp_path, record, place, reason, write):
    (tmp_path / "a.json").write_bytes(write([OPENAI, record, ALPACA]))
    said, (_, _), skips = read(tmp_path, limit=1)
    assert said == [SAID[2], SAID[0]] and skips.counts.total() == 1
    [(found, where)] = skips.first.items()
    line = 3 if write is in_lines else 20
    assert found.startswith(reason) and where == f"{tmp_path}/a.json, line {line}" + (place and f", {place}")
    with pytest.raises(DataError, match=rf"a.json, line {line}.* \(bad records: 1, allowed: 0\)"):
        read(tmp_path)


def test_lines_that_are_no_json_are_bad_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(in_lines([ALPACA]) + b"\n{'a'}\n" + in_lines([ALPACA]))
    assert read(tmp_path, limit=1)[1] == [1, 3]


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1},\n {"a" 1}]', "line 2, column 7 is not JSON as an array has it: Expecting ':' delimiter"),
        ('[{"a": 1}\n\n{"a": 1}]', "line 3, column 1 is not JSON as an array has it: a comma or a bracket is missing"),
        ('\n\n[{"a": 1}', "line 3, column 10 is not JSON as an array has it: a comma or a bracket is missing"),
        ('[{"a": 1},]', "line 1, column 11 is not JSON as an array has it: Expecting value"),
        ("[", "line 1, column 2 is not JSON as an array has it: Expecting value"),
        ("[]\n{}", "line 2, column 1 is not JSON as an array has it: something is behind the array"),
        ("[" * 100_000, "line 1 is JSON beyond what Python reads"),
        ('["\xff"]', "byte 2 is not UTF-8"),
    ],
)
def test_an_array_that_is_broken_is_an_error_and_no_bad_record(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=f"^{tmp_path}/a.json, {message}"):
        read(tmp_path, limit=10)


def test_an_array_may_be_empty_and_a_damaged_one_says_where(tmp_path):
    (tmp_path / "a.json").write_text(" [ ] ")
    assert read(tmp_path)[0] == []
    data = gzip.compress(in_an_array([SHAREGPT] * 500))
    (tmp_path / "a.json").unlink()
    (tmp_path / "b.json.gz").write_bytes(data[:-20])
    with pytest.raises(DataError, match=f"b.json.gz, byte {len(data) - 20} ends too early"):
        read(tmp_path, limit=10)
    (tmp_path / "b.json.gz").write_bytes(b"no gzip")
    assert read(tmp_path, limit=1)[2].counts == {"is corrupt": 1}


def test_paths_that_hold_no_conversations_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="tfds:a', but conversations are read from .json, .jsonl and .parquet files"):
        open_conversations("tfds:a")
    with pytest.raises(ConfigError, match="but must be a file that ends in .jsonl, .json, "):
        read(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="where is 'lang', but must be FIELD=VALUE"):
        open_conversations(str(tmp_path), where="lang")
