"""Data is frozen once, completely, and opened many times."""

import dataclasses
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest

import tiny_data
import tiny_runs
from meap_jax.corpus import packing
from meap_jax.corpus import prepare as prepare_module
from meap_jax.corpus.prepare import prepare
from meap_jax.corpus.retrieval import KEYS
from meap_jax.data.store import SPLITS
from meap_jax.errors import ConfigError, DataError, UserError
from meap_jax.evals.retrieval import questions

TEKKEN = {"tokenizer": "tekken", "vocab_size": 131_136}


def spec_of(path, **fields):
    """What a config with both sources asks for; fields as in `tiny_data.text_spec`."""
    ours = dict(
        mixture="retrieval=1,text=1", tokenizer="bpe", vocab_size=512, seed=3, min_facts=4, num_facts=4,
        num_eval_facts=4, questions_per_fact=0.5, max_fillers=1, num_documents=300, num_eval_documents=20,
    )  # fmt: skip
    return tiny_data.text_spec(path, **ours | fields)


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
def prepared(tmp_path_factory, books):
    return prepare(tmp_path_factory.mktemp("prepared") / "deep" / "data", spec_of(books))


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared.folder, tmp_path / "copy")


def test_blocks_are_what_the_tokenizer_made_of_the_sources(prepared, books):
    texts = {path.read_text() for path in books.glob("*.txt")}
    seen = []
    for split in SPLITS:
        blocks = prepared.blocks("text", split)
        stream = np.concatenate([blocks[i].tokens for i in range(len(blocks))])
        assert all((blocks[i].segment_ids == 1).all() for i in range(len(blocks)))
        whole = prepared.tokenizer.decode(stream.tolist()).split("<eos>")[:-1]
        seen += [document.removeprefix("<bos>") for document in whole]
    assert set(seen) <= texts and len(set(seen)) >= 35  # A block's rest of each split is left out.
    assert prepared.plan_manifest("text")["split_by"] == "document"
    assert sum(prepared.manifest("text")["documents"].values()) == 41 and prepared.manifest("text")["skipped"] == {}


def test_every_answer_is_where_the_blocks_say(prepared):
    for split in ("validation", "test"):
        blocks = prepared.blocks("retrieval", split)
        documents = prepared.plan_manifest("retrieval")["splits"][split]["documents"]
        asked = questions(blocks.spans("fact"), blocks.spans("answer"))
        assert len(asked) == 4 * documents  # Held-out documents ask each of their four facts once.
        for answer in asked:
            block = blocks[answer["row"]]
            start, length, distance = answer["start"], answer["length"], answer["distance"]
            found = block.tokens[start : start + length]
            assert np.array_equal(found, block.tokens[start - distance : start - distance + length])
            assert block.segment_ids[start] == block.segment_ids[start - distance] > 0
            assert prepared.tokenizer.decode(block.tokens[start - distance - 1 : start - distance]) == " is"
    assert len(prepared.blocks("retrieval", "train").spans("fact")) == 4 * 300
    assert not len(prepared.blocks("text", "train").spans("fact"))


def test_a_role_that_no_source_has_is_refused_by_its_name_and_theirs(prepared, tmp_path):
    def blocks(name, where, folder=prepared.folder):
        asked = dataclasses.replace(prepared.spec, where=where)
        return dataclasses.replace(prepared, folder=folder, spec=asked).blocks(name, "train")

    assert "maskable" in dataclasses.replace(prepared.spec, where="only:key").row_fields
    assert "maskable" not in prepared.spec.row_fields and prepared.blocks("retrieval", "train")[0].maskable is None
    keys = blocks("retrieval", "only:key")[0]
    words = prepared.tokenizer.decode(keys.tokens[keys.maskable].tolist()).split()
    assert len(words) > 4 and set(words) <= set(KEYS)
    # Of two sources one may lack the role: no token of its is named.
    text = {where: blocks("text", where)[0] for where in ("never:key", "only:key")}
    assert not text["only:key"].maskable.any()
    np.testing.assert_array_equal(text["never:key"].maskable, text["never:key"].segment_ids > 0)
    with pytest.raises(ConfigError, match="a span of the role 'loss', only of answer, fact, key, repeat: name another"):
        blocks("retrieval", "only:key,loss")
    # As a version prepared it whose documents had no keys: it is read as before, and says what it lacks.
    old = shutil.copytree(prepared.folder, tmp_path / "old")
    manifest = json.loads((old / "retrieval" / "manifest.json").read_text())
    for role in ("key", "repeat"):
        (old / "retrieval" / f"spans.{role}.npy").unlink()
        del manifest["files"][f"spans.{role}.npy"]
    (old / "retrieval" / "manifest.json").write_text(json.dumps(manifest))
    assert dataclasses.replace(prepared, folder=old).fingerprint == prepared.fingerprint
    np.testing.assert_array_equal(blocks("retrieval", "all", old)[0].tokens, keys.tokens)
    with pytest.raises(ConfigError, match="'key', only of answer, fact: .* prepare the data anew in another data.prep"):
        blocks("retrieval", "only:key", old)


def test_the_fingerprint_depends_on_content_alone(prepared, books, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module.platform, "python_version", lambda: "9.9.9")
    moved = shutil.copytree(books, tmp_path / "moved")
    assert prepare(tmp_path / "a", spec_of(moved)).fingerprint == prepared.fingerprint
    others = [spec_of(books, num_facts=5), spec_of(books, packing="best_fit")]
    found = {prepare(tmp_path / str(i), other).fingerprint for i, other in enumerate(others)}
    assert len(found | {prepared.fingerprint}) == 3


def test_what_is_there_is_opened_and_not_made_again(copy, books, monkeypatch):
    for name in ("_make_store", "make_plans", "_training_texts"):
        monkeypatch.setattr(prepare_module, name, None)
    prepare(copy, spec_of(books))
    prepare(copy, spec_of(None))  # Without a path a config takes what was prepared.


def test_another_way_of_packing_needs_no_tokenizing(copy, books, monkeypatch):
    monkeypatch.setattr(prepare_module, "_make_store", None)
    before = (copy / "text" / "manifest.json").read_text()
    longer = prepare(copy, spec_of(books, seq_len=110, packing="best_fit"))
    assert len(longer.blocks("text", "train")[0].tokens) == 111
    assert (copy / "text" / "manifest.json").read_text() == before
    assert len(os.listdir(copy / "text" / "plans")) == 2


def test_a_source_is_added_to_those_that_are_there(books, tmp_path, monkeypatch):
    prepare(tmp_path, tiny_data.text_spec(books))
    before = (tmp_path / "text" / "index.npy").stat()
    more = tiny_data.write_jsonl(tmp_path.parent / "more.jsonl", [f"more text {i} " * 30 for i in range(60)])
    prepared = prepare(tmp_path, tiny_data.text_spec(books, more, mixture="text,more"))
    assert (tmp_path / "text" / "index.npy").stat() == before
    assert prepared.sources == ["text", "more"] and len(prepared.blocks("more", "train"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer": "mistral", "vocab_size": 32_064}, r"data\.tokenizer = 'bpe', but the config wants 'mistral'"),
        ({"holdout": 0.2}, r"prepared with data\.holdout = 0\.1, but the config wants 0\.2"),
        ({"num_facts": 3}, r"data\.\S*retrieval\.num_facts = 4, but the config wants 3"),
        ({"path": "/elsewhere"}, r"path = '.*books.*', but the config wants '/elsewhere'"),
        ({"vocab_size": 600}, r"model\.vocab_size = 512, but the config wants 600"),
    ],
)
def test_other_options_are_named_with_both_values(prepared, books, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        prepare(prepared.folder, spec_of(**{"path": books} | change))


FILES = (
    "tokenizer.json", "manifest.json", "text/manifest.json", "text/00000.arrayrecord", "text/index.npy",
    "text/plans/concat-97-*/train.slices", "text/plans/concat-97-*/train.bounds",
)  # fmt: skip
BOTH_HASHES = r"another tokenizer \([0-9a-f]{12}\) .* \([0-9a-f]{12}\)"


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        *((name, None, "{0.name}") for name in FILES),
        *((name, lambda data: data[:-5], "({0.name}|{0.parent.name}) is damaged") for name in FILES),
        ("text/index.npy", lambda data: bytes(len(data)), "index.npy is damaged: delete"),
        ("tokenizer.json", lambda data: data.replace(b"falcon", b"fulcon"), BOTH_HASHES),
        ("manifest.json", lambda data: data.replace(b'_version": ', b'_version": 10'), "layout 10"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(copy, books, name, change, sentence):
    [path] = copy.glob(name)
    data = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(data))
    with pytest.raises(DataError, match=sentence.format(path) if "{0" in sentence else sentence):
        prepare(copy, spec_of(books)).blocks("text", "train")


def test_an_unknown_source_or_split_is_named(prepared):
    with pytest.raises(DataError, match="stdlib-train"):
        prepared.blocks("stdlib", "train")


def test_a_folder_of_something_else_is_left_alone(tmp_path, books):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a prepared data folder"):
        prepare(tmp_path, spec_of(books))
    assert os.listdir(tmp_path) == ["thesis.txt"]


TEXT = {"mixture": "text=1"}
FEW = dict(num_keys=1, num_values=1, min_facts=1, num_facts=1, num_eval_facts=1, max_fillers=0, questions_per_fact=1.0)


IMPOSSIBLE = [
    ({"path": None}, r"path is not set"),
    ({"path": "/nowhere/at/all"}, "/nowhere/at/all"),
    ({"path": "{here}"}, r"data\.prepared is .*/data, which lies in data\.sources\.text\.path"),
    ({"tokenizer": "gpt"}, r"data\.tokenizer is 'gpt'"),
    ({"tokenizer": "mistral"}, r"model\.vocab_size is 512, .* set 32064"),
    ({"tokenizer": "{here}/data/"}, r"must be another folder than that of data\.tokenizer"),
    ({"tokenizer": "{here}/data/tokenizer.json"}, r"must be another folder than that of data\.tokenizer"),
    (TEXT | {"where": "a=b", "path": "{here}/little.jsonl"}, "holds no text in records with a=b"),
    ({"path": "prepared:{made}"}, "names no prepared source: .* such as prepared:.*/text"),
    ({"path": "prepared:{made}/retrieval"}, "holds retrieval documents"),
    ({"path": "prepared:{made}/text"}, "data.tokenizer is 'bpe', which is trained on text"),
    ({"path": "prepared:{made}/text", "where": "a=b"}, r"text\.where is 'a=b', but its path is 'prepared:.*leave"),
    (TEXT | TEKKEN | {"path": "prepared:{made}/text"}, r"whose tokenizer \([0-9a-f]{12}\) is not that of .* \("),
]
TOO_LITTLE_OR_TOO_LONG = [
    ({"seq_len": 20}, r"longest document of retrieval has \d+ ids .* the 21 of a block"),
    (FEW, "no document left for"),
    (TEXT | {"path": "{here}/little.jsonl"}, r"its text makes 0 full blocks of 97 ids \(seq_len \+ 1\)"),
    (TEXT | {"path": "{here}/little.jsonl", "validation": "{books}"}, "small: without its validation text"),
    (TEXT | {"validation": "{here}/little.jsonl"}, r"text\.validation is '.*little.jsonl', but .* a block of 97"),
    (TEXT | {"max_tokens": 10, "seq_len": 400}, r"for training, less than a block of 401 ids .*text\.max_tokens"),
    (TEXT | {"long_from": 9_999, "keep_shorter": 0.0}, r"tokens for training, less than a block of 97 ids"),
]


@pytest.mark.parametrize(("change", "sentence"), IMPOSSIBLE + TOO_LITTLE_OR_TOO_LONG)
def test_what_cannot_be_prepared_is_one_sentence_and_leaves_nothing_but_sources(
    tmp_path, books, prepared, change, sentence
):
    tiny_data.write_jsonl(tmp_path / "little.jsonl", ["a few words"])
    folders = dict(books=books, here=tmp_path, made=prepared.folder)
    fields = {"path": books} | change
    fields = {name: value.format(**folders) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(UserError, match=sentence):
        prepare(tmp_path / "data", spec_of(**fields))
    assert (tmp_path / "data").exists() == ((change, sentence) in TOO_LITTLE_OR_TOO_LONG)


def test_a_bucket_must_be_mounted(books):
    with pytest.raises(ConfigError, match="must be a local folder, or a bucket that is mounted"):
        prepare("gs://bucket/data", spec_of(books))


def test_a_single_small_book_is_split_by_blocks_from_its_end(tmp_path, books):
    prepared = prepare(tmp_path, tiny_data.text_spec(books / "00.txt", seq_len=32))
    assert prepared.plan_manifest("text")["split_by"] == "block"
    assert prepared.tokenizer.mask_id == 32_000
    ids = [1, *prepared.tokenizer.encode((books / "00.txt").read_text()), 2]
    rows = [prepared.blocks("text", split) for split in SPLITS]
    stream = np.concatenate([blocks[i].tokens for blocks in rows for i in range(len(blocks))])
    num_blocks = len(ids) // 33
    assert stream.tolist() == ids[: 33 * num_blocks]
    assert len(rows[1]) == len(rows[2]) == max(1, num_blocks // 10)


def test_ids_beyond_the_vocabulary_are_skipped_and_counted(tmp_path, books):
    first = prepare(tmp_path / "first", tiny_data.text_spec(books))
    manifest = tmp_path / "first" / "text" / "manifest.json"
    largest = max(int(ids.max()) for ids in (first.blocks("text", "train")._store[i] for i in range(41)))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"num_tokens": largest}))
    second = prepare(tmp_path / "second", tiny_data.text_spec(f"prepared:{tmp_path / 'first' / 'text'}"))
    skipped = second.manifest("text")["skipped"]
    assert list(skipped) == [f"has an id beyond the vocabulary of {largest}"]
    assert 0 < skipped.popitem()[1] == 41 - sum(second.manifest("text")["documents"].values())


def test_the_command_prepares_and_prints_the_counts(tmp_path, books, capsys, monkeypatch):
    flags = [
        f"--config={tiny_runs.ROOT / 'configs/meap_100m.py'}", f"--config.data.path={books}", "--config.seq_len=32",
        f"--config.data.prepared={tmp_path / 'data'}", "--config.data.holdout=0.1", "--config.data.packing=best_fit",
    ]  # fmt: skip
    prepare_module.command(["prepare", *flags])
    counts = json.loads(capsys.readouterr().out)
    assert counts["source"] == "text" and sum(counts["documents"].values()) == 41 and counts["skipped"] == {}
    assert counts["splits"]["train"]["blocks"] > 100 and 0 < counts["splits"]["train"]["padding_share"] < 0.5
    assert {"cut_documents", "mean_document_tokens"} <= counts["splits"]["train"].keys()
    with pytest.raises(ConfigError, match="data.prepared is not set: name the folder to make"):
        prepare_module.command(["prepare", *flags[:3]])


def test_a_source_takes_its_first_tokens_and_few_of_its_short_documents(tmp_path):
    lengths = np.random.default_rng(0).choice([20, 400], 400)
    path = tiny_data.write_jsonl(tmp_path / "a.jsonl", (f"{i} " + "word " * n for i, n in enumerate(lengths)))

    def train(**fields):
        made = prepare(tmp_path / "data", tiny_data.text_spec(path, **fields))
        return made.plan_manifest("text")["splits"]["train"]

    every, kept, first = train(), train(long_from=300, keep_shorter=0.1), train(max_tokens=5000)
    assert 0.5 * every["documents"] < kept["documents"] < 0.65 * every["documents"]
    assert kept["tokens"] > 0.9 * every["tokens"]
    assert 5000 - 97 <= first["tokens"] <= 5000 + 410


def test_a_run_that_names_no_path_takes_what_was_held_out_beside_it_too(tmp_path, books):
    made = prepare(tmp_path / "data", tiny_data.text_spec(books / "0*.txt", validation=str(books)))
    again = prepare(tmp_path / "data", tiny_data.text_spec(None))
    assert again.fingerprint == made.fingerprint
    with pytest.raises(ConfigError, match=r"validation = '.*', but the config wants '/elsewhere'"):
        prepare(tmp_path / "data", tiny_data.text_spec(None, validation="/elsewhere"))


def test_equal_documents_cut_into_other_blocks_have_another_fingerprint(tmp_path, books):
    book = books / "00.txt"
    a = prepare(tmp_path / "a", tiny_data.text_spec(book, seq_len=16, holdout=0.1))
    b = prepare(tmp_path / "b", tiny_data.text_spec(book, seq_len=16, holdout=0.2))
    assert a.manifest("text")["fingerprint"] == b.manifest("text")["fingerprint"]
    assert len(a.blocks("text", "train")) != len(b.blocks("text", "train")) and a.fingerprint != b.fingerprint


def test_after_a_misspelt_field_the_right_one_can_be_used_at_once(tmp_path, books):
    path = tiny_data.write_jsonl(tmp_path / "a.jsonl", [f"text {i} " * 60 for i in range(60)])
    field, where = {"field": "txt"}, {"where": "a=b"}
    for wrong in (field | {"max_skipped": 100}, field, where):
        with pytest.raises(DataError, match="has no field `txt`|holds no text in records with a=b"):
            prepare(tmp_path / "data", tiny_data.text_spec(path, **wrong))
    assert prepare(tmp_path / "data", tiny_data.text_spec(path)).counts("text")["skipped"] == {}


def test_what_another_tokenizer_made_is_not_joined(tmp_path, books):
    first = prepare(tmp_path / "first", tiny_data.text_spec(books))
    prepare(tmp_path / "second", tiny_data.text_spec(books, **TEKKEN))
    shutil.rmtree(tmp_path / "second" / "text")
    shutil.copytree(first.folder / "text", tmp_path / "second" / "text")
    with pytest.raises(DataError, match=rf"another tokenizer \({first.tokenizer_hash[:12]}\) than that of .*second"):
        prepare(tmp_path / "second", tiny_data.text_spec(books, **TEKKEN))


def test_a_process_that_waited_for_one_that_failed_goes_on(tmp_path, books, monkeypatch):
    folder, begun, waits, real = tmp_path / "data", threading.Event(), threading.Event(), prepare_module._prepare

    def failing(*_):
        begun.set()
        assert waits.wait(60)
        time.sleep(0.2)  # The other one is in flock by then.
        raise ConfigError("no")

    def first():
        with pytest.raises(ConfigError):
            prepare(folder, tiny_data.text_spec(books))

    monkeypatch.setattr(prepare_module, "_prepare", failing)
    monkeypatch.setattr(prepare_module._log, "info", lambda text, *_: waits.set() if "waiting" in text else None)
    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    monkeypatch.setattr(prepare_module, "_prepare", real)
    prepare(folder, tiny_data.text_spec(books))
    thread.join()
    assert (folder / "text").is_dir()


def test_more_documents_than_numbers_are_refused(tmp_path, books, monkeypatch):
    monkeypatch.setattr(prepare_module, "MAX_DOCUMENTS", 40)
    with pytest.raises(DataError, match="has 41 documents, more than 40"):
        prepare(tmp_path, tiny_data.text_spec(books))


def test_best_fit_on_several_cores_gives_the_plan_that_one_gives(tmp_path, monkeypatch):
    lengths = np.random.default_rng(0).integers(5, 200, 300)
    path = tiny_data.write_jsonl(tmp_path / "a.jsonl", (f"{i} " + "word " * n for i, n in enumerate(lengths)))
    monkeypatch.setattr(packing, "_RANGE", 50)
    found = []
    for cores in ({0}, {0, 1}):
        monkeypatch.setattr(packing.os, "sched_getaffinity", lambda _, cores=cores: cores)
        made = prepare(tmp_path / str(len(cores)), tiny_data.text_spec(path, packing="best_fit"), workers=1)
        found.append(made.fingerprint)
    assert found[0] == found[1]
