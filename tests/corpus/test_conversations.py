"""Conversations as prepared documents: answers as spans, splits, and what the data depends on."""

import json
import logging
import pickle
import shutil

import numpy as np
import pytest
from etils import epath

import tiny_data
from chat_templates import LLAMA3, chatting
from meap_jax import models
from meap_jax.corpus import shards
from meap_jax.corpus.prepare import prepare
from meap_jax.corpus.sources import open_source
from meap_jax.data.manifest import read_manifest
from meap_jax.data.prepared import open_store
from meap_jax.data.store import SPLITS
from meap_jax.errors import ConfigError, DataError
from meap_jax.hf.tokenizer import hub_files
from meap_jax.readers import Skips

WORDS = "the sea salt ship storm sail sand keeps under over while night day wind no".split()


def talk(i, num_turns=1, system=None):
    """A record as OpenAI has it; those of other numbers differ from it."""
    words = np.random.default_rng(i).choice(WORDS, (num_turns, 2, 6))
    said = [{"role": "system", "content": system}] if system else []
    for turn, (question, answer) in enumerate(words):
        said.append({"role": "user", "content": f"{i}.{turn} {' '.join(question)}?"})
        said.append({"role": "assistant", "content": f"{' '.join(answer)} {i}.{turn}</s>"})
    return {"messages": said}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def spec_of(path, **fields):
    return tiny_data.text_spec(path, **dict(format="chat", template="vicuna", holdout=0.2, seq_len=256) | fields)


def texts_of(prepared):
    """(split, line, texts of the answers, text) of each document."""
    store, decode = open_store(prepared.folder / "text"), prepared.tokenizer.decode
    spans, found = store.spans("answer"), []
    for i in range(len(store)):
        own = spans[spans["document"] == i]
        answers = [decode(store[i][s["start"] : s["start"] + s["length"]], continues=True) for s in own]
        [line] = set(own["line"].tolist())
        found.append((SPLITS[store.index["split"][i]], line, answers, decode(store[i])))
    return found


def answers_of(record, end="</s>"):
    return [f" {message['content']}{end}" for message in record["messages"] if message["role"] == "assistant"]


TALKS = [talk(i, 1 + i % 3, system="Be brief." if i % 5 == 0 else None) for i in range(60)]


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    return write(tmp_path_factory.mktemp("lessons") / "a.jsonl", TALKS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, lessons):
    return prepare(tmp_path_factory.mktemp("prepared") / "data", spec_of(lessons))


def test_each_conversation_is_a_document_whose_answers_are_spans_with_the_line_of_its_record(prepared):
    found = texts_of(prepared)
    assert [(line, answers) for _, line, answers, _ in found] == [
        (i, answers_of(record)) for i, record in enumerate(TALKS, start=1)
    ]
    for (_, _, _, text), record in zip(found, TALKS, strict=True):
        system = "Be brief. " if record["messages"][0]["role"] == "system" else ""
        assert text.startswith(f"<s>{system}USER: ") and text.count("<s>") == 1 and text.endswith("</s></s>")
    assert {split for split, *_ in found} == set(SPLITS)


def test_the_model_of_a_run_is_asked_in_the_template_that_it_was_taught_in(prepared, tmp_path):
    place = epath.Path(tmp_path)
    kept = models.open_tokenizer(place, models.save_tokenizer(place, prepared.tokenizer))
    store = open_store(prepared.folder / "text")
    start = store.spans("answer")["start"][0]
    assert kept.encode_chat(TALKS[0]["messages"][:2]) == store[0][:start].tolist()
    config = json.loads(hub_files(kept, 256)["tokenizer_config.json"])
    assert config["chat_template"] == prepared.manifest("text")["chat_template"]


def test_a_conversations_split_depends_on_what_is_said_alone(prepared, lessons, tmp_path):
    splits = {line: split for split, line, *_ in texts_of(prepared)}
    write(tmp_path / "twice.jsonl", [*TALKS[::-1], *TALKS])
    for fields in (dict(template="alpaca"), dict(system="No."), dict(tokenizer="bpe", vocab_size=512)):
        place = tmp_path / "-".join(fields)
        again = texts_of(prepare(place, spec_of(tmp_path / "twice.jsonl", **fields)))
        assert [split for split, *_ in again] == [splits[i] for i in (*range(60, 0, -1), *range(1, 61))]


def test_a_second_corpus_is_held_out(lessons, tmp_path):
    held = write(tmp_path / "held.jsonl", [talk(i) for i in range(100, 130)])
    found = texts_of(prepare(tmp_path / "data", spec_of(lessons, validation=str(held))))
    assert [split for split, *_ in found[:60]] == ["train"] * 60
    assert {split for split, *_ in found[60:]} == {"validation", "test"}
    assert [line for _, line, *_ in found[60:]] == list(range(1, 31))


def test_each_turn_is_a_conversation_by_itself_with_the_systems_message(lessons, tmp_path):
    found = texts_of(prepare(tmp_path / "data", spec_of(lessons, turns="each", system="Go on.")))
    assert [(line, answers) for _, line, answers, _ in found] == [
        (i, [answer]) for i, record in enumerate(TALKS, start=1) for answer in answers_of(record)
    ]
    for _, line, _, text in found:
        assert text.startswith("<s>Be brief. USER:" if line % 5 == 1 else "<s>Go on. USER:") and text.count("USER") == 1


def test_a_bpe_is_trained_on_what_is_said_and_not_on_the_template(tmp_path):
    records = [{"instruction": f"zq zq {i}", "output": "qz qz"} for i in range(50)]
    path = write(tmp_path / "a.jsonl", records + TALKS)
    spec = spec_of(path, tokenizer="bpe", vocab_size=512, template="llama3", holdout=0.3)
    made = prepare(tmp_path / "data", spec)
    vocab = json.loads(made.tokenizer.files()["tokenizer.json"])["model"]["vocab"]
    assert {"zq", "Ġzq", "qz", "Ġqz"} <= vocab.keys() and not {"ead", "header", "ass", "smart"} & vocab.keys()
    assert texts_of(made)[0][2] == ["qz qz<eos>"]


def test_shards_workers_and_interruptions_change_nothing(lessons, tmp_path, monkeypatch, prepared):
    for i in range(4):
        write(tmp_path / f"{i}.jsonl", TALKS[15 * i : 15 * (i + 1)])
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    spec, stops = spec_of(tmp_path / "*.jsonl"), []

    def stopping(todo):
        stops.append(len(todo))
        return shards.run_here(todo[:2], workers=1) if len(todo) > 2 else shards.run_here(todo, workers=1)

    with pytest.raises(KeyError):  # The summaries of two are missing.
        prepare(tmp_path / "data", spec, shard_maker=stopping)
    monkeypatch.setattr(shards, "_ONE_PROCESS", 0)
    made = prepare(tmp_path / "data", spec, workers=2)
    assert stops == [4] and len(made.manifest("text")["shards"]) == 4
    ours, whole = texts_of(made), texts_of(prepared)
    assert [(s, (i % 15) + 1, a, t) for i, (s, _, a, t) in enumerate(whole)] == ours


def test_a_source_is_small_and_travels(lessons):
    source = open_source("text", spec_of(lessons).sources["text"], LLAMA3)
    source = pickle.loads(pickle.dumps(source))
    [part] = source.parts()
    documents = [document for _, document in source.read(part, Skips(0))]
    assert len(documents) == 60 and {document.template for document in documents} == {LLAMA3}
    assert len(pickle.dumps(source)) < 2_000


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLAMA3


def test_what_a_template_refuses_is_a_bad_record_with_its_line(lessons, tmp_path):
    chatting(tmp_path, REFUSING)
    spec = spec_of(
        lessons, tokenizer=str(tmp_path), template="tokenizer", max_skipped=12, max_skipped_share=0.2, vocab_size=1024
    )
    made = prepare(tmp_path / "data", spec)
    reason = "is refused: the chat template can't render these messages: no system"
    assert made.manifest("text")["skipped"] == {reason: 12} and made.manifest("text")["chat_template"] == REFUSING
    assert [line for _, line, *_ in texts_of(made)] == [i for i in range(1, 61) if i % 5 != 1]
    spec = spec_of(lessons, tokenizer=str(tmp_path), template="tokenizer", max_skipped=3, vocab_size=1024)
    with pytest.raises(DataError, match=r"a.jsonl, line 16 is refused: .*no system \(bad records: 4, allowed: 3\)"):
        prepare(tmp_path / "other", spec)


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_turns_are_trained_each(lessons, tmp_path):
    words = "(message['content'] if loop.last or message['role'] != 'assistant' else '')"
    rewriting = LLAMA3.replace("message['content'] | trim", words)
    chatting(tmp_path, rewriting)
    fields = dict(tokenizer=str(tmp_path), template="tokenizer", vocab_size=1024, max_skipped=0)
    with pytest.raises(DataError, match="line 2 is refused: the chat template writes earlier turns anew .* sft.turns"):
        prepare(tmp_path / "data", spec_of(lessons, **fields))
    assert len(texts_of(prepare(tmp_path / "data", spec_of(lessons, turns="each", **fields)))) == 120


def test_records_that_are_bad_count_and_a_source_of_nothing_else_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, *TALKS, {"messages": []}])
    made = prepare(tmp_path / "data", spec_of(path, max_skipped=2))
    assert sum(made.manifest("text")["skipped"].values()) == 2
    with pytest.raises(DataError, match="a.jsonl, line 1 has none of the fields `messages`, `conversations` and"):
        prepare(tmp_path / "other", spec_of(path, max_skipped=0))
    path = write(tmp_path / "b.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="The source text holds no conversation: 1 x has none of the fields"):
        prepare(tmp_path / "other", spec_of(path))
    with pytest.raises(ConfigError, match="data.sources.text: where is 'a', but must be FIELD=VALUE"):
        prepare(tmp_path / "other", spec_of(path, where="a"))


def test_another_template_needs_another_folder_even_under_the_same_name(lessons, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(LLAMA3.replace("<|eot|>", "{{ eos_token }}").replace("'{{ eos_token }}'", "eos_token"))
    spec = spec_of(lessons, template=str(template))
    made = prepare(tmp_path / "data", spec)
    assert made.manifest("text")["chat_template"] == template.read_text()
    assert prepare(tmp_path / "data", spec).fingerprint == made.fingerprint
    for option, value in dict(template="alpaca", system="A", turns="each").items():
        with pytest.raises(ConfigError, match=rf"was prepared with sft.{option} = .*, but the config wants"):
            prepare(tmp_path / "data", spec_of(lessons, **{"template": str(template), option: value}))
    template.rename(tmp_path / "away.jinja")
    assert prepare(tmp_path / "data", spec).fingerprint == made.fingerprint  # On a machine that lacks the file.
    template.write_text((tmp_path / "away.jinja").read_text() + "{# #}")
    with pytest.raises(ConfigError, match="was prepared with sft.template_hash = '[0-9a-f]{16}', but the config wants"):
        prepare(tmp_path / "data", spec)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(template="chatml"), r"sft.template is 'chatml', but the chat template ends an answer with '<\|im_end\|>"),
        (dict(template="tokenizer"), "sft.template is 'tokenizer', but the tokenizer brings no template of its own"),
        (dict(template="gone.jinja"), "sft.template is 'gone.jinja', but that file can't be read: No such file"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["mistral", "bpe"])
def test_templates_that_do_not_suit_are_refused_before_anything_is_read(lessons, tmp_path, fields, message, tokenizer):
    vocab = dict(vocab_size=512) if tokenizer == "bpe" else {}
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path / "data", spec_of(lessons, tokenizer=tokenizer, **vocab, **fields))
    assert not (tmp_path / "data").exists()


def test_markers_that_are_plain_text_are_logged(lessons, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        prepare(tmp_path / "data", spec_of(lessons, template="llama3"))
        prepare(tmp_path / "data", spec_of(lessons, template="llama3"))
    said = [record.getMessage() for record in caplog.records if "plain text" in record.getMessage()]
    names = "<|end_header_id|>, <|eot_id|>, <|start_header_id|>"
    assert said == [f"sft.template: {names} are plain text to the tokenizer"]


def test_conversations_that_were_prepared_are_copied_with_their_answers(prepared, tmp_path):
    path = f"prepared:{prepared.folder}/text"
    made = prepare(tmp_path / "data", spec_of(path))
    assert texts_of(made) == texts_of(prepared)
    assert read_manifest(made.folder / "text")["chat_template"] == prepared.manifest("text")["chat_template"]
    with pytest.raises(
        ConfigError, match=r"sft.turns is 'each', but prepared:.* was prepared with 'all', and its conv"
    ):
        prepare(tmp_path / "other", spec_of(path, turns="each"))
    shutil.copytree(prepared.folder, tmp_path / "older")
    manifest = tmp_path / "older/text/manifest.json"
    manifest.write_text(manifest.read_text().replace("ASSISTANT", "HELPER"))
    with pytest.raises(
        ConfigError, match="whose template had another content than sft.template has now: name the files"
    ):
        prepare(tmp_path / "other", spec_of(f"prepared:{tmp_path}/older/text"))
    text = prepare(
        tmp_path / "text", tiny_data.text_spec(tiny_data.write_jsonl(tmp_path / "a.jsonl", WORDS * 9), seq_len=8)
    )
    with pytest.raises(ConfigError, match="data.sources.text.format is 'chat', but prepared:.* holds no conversations"):
        prepare(tmp_path / "other", spec_of(f"prepared:{text.folder}/text"))
