"""Questions of every task: their lengths, where the answer stands, what they refuse."""

import gzip
import json
import uuid

import numpy as np
import pytest

import tiny_settings
from meap_jax.errors import ConfigError, DataError
from meap_jax.evals import kv, make_evaluators, mdqa, mneedle, niah, published, ruler
from meap_jax.evals.prompting import Question
from tokenizer_kinds import kind


def text_of(question):
    return kind("bpe").decode(question.tokens)


# ----------------------------------------------------------------------------------------------------------------- niah


def test_needles_are_where_their_depth_says_in_prompts_of_the_length():
    task = niah.NeedleInAHaystack()
    setting = tiny_settings.setting(niah__lengths="400,800", niah__depths="0,50,100", niah__trials=3)
    questions = task.questions(setting)
    assert len(questions) == 2 * 3 * 3 and len({tuple(q.tokens) for q in questions}) == 18
    for q in questions:
        needle = niah.NEEDLES[q.about["trial"]]
        context = text_of(q).split("Remember what it says.\n\n")[1].split("\n\nQuestion:")[0]
        assert q.about["length"] - 110 < len(q.tokens) + task.max_new_tokens <= q.about["length"]
        assert context.count(needle.needle) == 1 and text_of(q).count(needle.answer) == 1
        share = context.index(needle.needle) / (len(context) - len(needle.needle))
        assert abs(share - q.about["depth"] / 100) < 150 / q.about["length"]  # Sentences are whole.
    # What shares a name begins alike, the deepest for longest, and is the same text without its needle.
    of_one = [q for q in questions if q.shares == questions[0].shares]
    assert [q.about["depth"] for q in of_one] == [100, 50, 0]
    assert len({"".join(text_of(q).replace(niah.NEEDLES[0].needle, "").split()) for q in of_one}) == 1
    shared = [int(np.argmax(np.array(of_one[0].tokens[:200]) != q.tokens[:200])) or 200 for q in of_one[1:]]
    assert shared[0] > shared[1] > 10


def test_needles_of_a_file_and_a_prompt_of_ones_own(tmp_path):
    (tmp_path / "n.jsonl").write_text(json.dumps(dict(needle="The key is red.", question="Which key?", answer="red")))
    (tmp_path / "p").write_text("<{context}> {question}")
    options = dict(niah__lengths="200", niah__depths="0", niah__trials=1)
    setting = tiny_settings.setting(
        niah__needles=str(tmp_path / "n.jsonl"), niah__prompt=str(tmp_path / "p"), **options
    )
    [question] = niah.NeedleInAHaystack().questions(setting)
    assert "<The key is red." in text_of(question) and text_of(question).endswith("> Which key?")
    assert question.golds == ("red",)
    (tmp_path / "n.jsonl").write_text('{"needle": "a"}')
    with pytest.raises(DataError, match="n.jsonl, line 1 has no field 'question'"):
        niah.NeedleInAHaystack().questions(setting)


def test_the_cells_of_figure_3_have_the_mean_of_table_2():
    cells = [value for name, value in published.PUBLISHED.items() if "/depth_" in name]
    assert len(cells) == 88
    assert np.mean([cell.ntp for cell in cells]) == pytest.approx(0.871, abs=5e-4)
    assert np.mean([cell.meap for cell in cells]) == pytest.approx(0.982, abs=5e-4)


# ---------------------------------------------------------------------------------------------------------------- ruler


@pytest.mark.parametrize("name", list(ruler.MAX_NEW_TOKENS))
def test_rulers_prompts_fit_and_hold_their_answers(name):
    task = ruler.Ruler(name)
    lengths = "4500,4900" if name == "cwe" else "900,1300"
    setting = tiny_settings.setting(ruler__lengths=lengths, ruler__trials=2, seq_len=5_000)
    questions = task.questions(setting)
    assert questions == task.questions(setting) and len({tuple(q.tokens) for q in questions}) == 4
    expected = {"vt": 5, "cwe": 10, "fwe": 3, "niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
    for q in questions:
        assert q.about["length"] * 0.85 < len(q.tokens) + task.max_new_tokens <= q.about["length"]
        assert len(set(q.golds)) == expected
        text = text_of(q)
        context, asked = text.split("\n\n", 1)[1].rsplit("\n\n", 1)
        assert all(gold in context for gold in q.golds)
        assert name in ("vt", "cwe", "fwe") or not any(gold in asked for gold in q.golds)
        assert task.score(" ".join(q.golds), q) == {"string_match_all": 1.0, "string_match_part": 1.0}


def test_what_rulers_answers_are_follows_from_their_contexts():
    rng = np.random.default_rng(0)
    context, value, names = ruler.variables(rng, 20)
    values = {}
    for line in context.splitlines():
        if line.startswith("VAR "):
            name, _, of = line.removeprefix("VAR ").partition(" = ")
            values[name] = values[of.removeprefix("VAR ")] if of.startswith("VAR ") else of
    assert values == dict.fromkeys(names, value)
    context, _, common = ruler.common_words(rng, 40)
    words, counts = np.unique(context.split()[1::2], return_counts=True)
    assert set(words[np.argsort(-counts)[:10]]) == set(common) and sorted(set(counts)) == [3, 30]
    context, _, frequent = ruler.frequent_words(rng, 60)
    words, counts = np.unique(context.split(), return_counts=True)
    assert ["...", *frequent] == words[np.argsort(-counts)[:4]].tolist()
    size = ruler.NIAH["niah_multikey_3"]
    context, key, [value] = ruler.needles_in(rng, 30, size, None, 0, 1)
    lines = context.splitlines()
    assert len(lines) == 31 and [line for line in lines if key in line] == [ruler._needle(size, key, value)]
    uuid.UUID(key), uuid.UUID(value)


def test_a_prompt_file_takes_the_place_of_rulers(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"vt": "{context} ? {query}"}))
    setting = tiny_settings.setting(ruler__lengths="500", ruler__trials=1, ruler__prompts=str(file))
    [question] = ruler.Ruler("vt").questions(setting)
    assert text_of(question).rstrip("0123456789").endswith(" ? ")
    for bad in ({"vt": "{context}"}, {"qa": "{context}"}, []):
        file.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match="eval.ruler.prompts is .* but must be an object"):
            ruler.Ruler("vt").questions(setting)


# --------------------------------------------------------------------------------------------------------- mdqa and kv


def asked(i, **changes):
    answer = f"answer{i}"
    gold = dict(title=f"Title {i}", text=f"Text that says answer{i}.", isgold=True, hasanswer=True)
    return dict(question=f"question {i}", answers=[answer], ctxs=[gold], nq_annotated_gold={}) | changes


def write(path, records):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return str(path)


def test_contexts_from_the_oracle_file_have_the_gold_document_at_its_position(tmp_path):
    # answer1 is part of answer10 to answer12: those documents hold it, and can't be distractors of question 1.
    path = write(tmp_path / "oracle.jsonl.gz", [asked(i) for i in range(13)])
    options = dict(mdqa__path=path, mdqa__num_documents=4, mdqa__positions="1,3,4")
    questions = mdqa.MultiDocumentQA().questions(tiny_settings.setting(**options))
    assert len(questions) == 39
    for q in questions:
        i, position = q.about["question"], q.about["position"]
        lines = [line for line in text_of(q).splitlines() if line.startswith("Document [")]
        assert (
            len(lines) == 4
            and lines[position - 1] == f"Document [{position}](Title: Title {i}) Text that says answer{i}."
        )
        assert sum(f"answer{i}" in line for line in lines) == 1 and q.about["kind"] == "drawn_4"
        assert text_of(q).endswith(f"Question: question {i}\nAnswer:")
    of_one = [q for q in questions if q.about["question"] == 5]
    others = [[d for d in text_of(q).splitlines() if "Document" in d and "answer5" not in d] for q in of_one]
    assert len({tuple(line.partition("](")[2] for line in lines) for lines in others}) == 1  # The same distractors.
    assert questions == mdqa.MultiDocumentQA().questions(tiny_settings.setting(**options))
    assert questions != mdqa.MultiDocumentQA().questions(tiny_settings.setting(seed=1, **options))


def test_files_of_k_documents_the_oracle_and_closed_book(tmp_path):
    other = dict(title="Other", text="Nothing.", isgold=False, hasanswer=False)
    path = write(tmp_path / "three.jsonl", [asked(i, ctxs=[other, other, asked(i)["ctxs"][0]]) for i in range(3)])
    questions = mdqa.MultiDocumentQA().questions(tiny_settings.setting(mdqa__path=path, mdqa__max_questions=2))
    assert [dict(q.about) for q in questions] == [dict(question=i, kind="file_3", position=3) for i in range(2)]
    assert text_of(questions[0]).index("[2](Title: Other)") < text_of(questions[0]).index("[3](Title: Title 0)")
    [oracle, *_] = mdqa.MultiDocumentQA().questions(tiny_settings.setting(mdqa__path=path, mdqa__mode="oracle"))
    assert "[1](Title: Title 0)" in text_of(oracle) and "Other" not in text_of(oracle)
    [closed, *_] = mdqa.MultiDocumentQA().questions(tiny_settings.setting(mdqa__path=path, mdqa__mode="closed_book"))
    assert text_of(closed).endswith("Question: question 0\nAnswer:") and "Document" not in text_of(closed)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (asked(1, answers="a"), "line 2 has no list of texts in the field 'answers'"),
        (asked(1, answers=[]), "line 2 has no list of texts in the field 'answers'"),
        (asked(1, ctxs=[]), "line 2 must have one document in 'ctxs' with 'isgold': true"),
        (asked(1, ctxs=[{"title": "t", "isgold": True}]), "line 2 has no field 'text'"),
        (asked(1, question=" "), "line 2 has no text in the field 'question'"),
        ([1], "line 2 is no object, but list"),
    ],
)
def test_bad_records_are_named_by_file_and_line(record, expected, tmp_path):
    path = write(tmp_path / "bad.jsonl", [asked(0), record])
    with pytest.raises(DataError, match=f"bad.jsonl, {expected}"):
        mdqa.MultiDocumentQA().questions(tiny_settings.setting(mdqa__path=path))


def test_too_few_documents_without_an_answer_and_positions_beyond_the_last_are_said(tmp_path):
    path = write(tmp_path / "few.jsonl", [asked(i) for i in range(3)])
    with pytest.raises(DataError, match="question 1 .* needs 3 other documents without an answer, but 2 were found"):
        mdqa.MultiDocumentQA().questions(
            tiny_settings.setting(mdqa__path=path, mdqa__num_documents=4, mdqa__positions="1")
        )
    with pytest.raises(ConfigError, match=r"eval.mdqa.positions is 1,5, but must be at most .* \(4\)"):
        mdqa.MultiDocumentQA().questions(
            tiny_settings.setting(mdqa__path=path, mdqa__num_documents=4, mdqa__positions="1,5")
        )


def test_key_value_pairs_of_a_file_or_generated(tmp_path):
    record = dict(ordered_kv_records=[["k1", "v1"], ["k2", "v2"], ["k3", "v3"]], key="k2", value="v2")
    path = write(tmp_path / "kv.jsonl.gz", [record])
    first, last = kv.KeyValue().questions(tiny_settings.setting(kv__path=path, kv__positions="1,3"))
    assert '{"k2": "v2",\n "k1": "v1",\n "k3": "v3"}' in text_of(first) and first.golds == ("v2",)
    assert '{"k1": "v1",\n "k3": "v3",\n "k2": "v2"}' in text_of(last)
    made = kv.KeyValue().questions(tiny_settings.setting(kv__num_keys=5, kv__positions="2", kv__max_questions=3))
    for q in made:
        pairs = json.loads(text_of(q).split("object:\n\n")[1].split("\n\nIts value")[0])
        assert len(pairs) == 5 and list(pairs.values())[1] == q.golds[0]
        assert f'"{list(pairs)[1]}" is' in text_of(q)
    bad = tmp_path / "bad.jsonl"
    for broken, expected in [
        (record | {"value": "v1"}, 'asks for "k2", which is not among its pairs'),
        (record | {"ordered_kv_records": [["k"]]}, "no list of pairs of texts"),
    ]:
        with pytest.raises(DataError, match=expected):
            kv.KeyValue().questions(tiny_settings.setting(kv__path=write(bad, [broken])))
    with pytest.raises(ConfigError, match="eval.kv.positions is 9, but an object has 3 pairs"):
        kv.KeyValue().questions(tiny_settings.setting(kv__path=path, kv__positions="9"))


# -------------------------------------------------------------------------------------------------------------- mneedle


def test_chains_lead_from_the_question_to_the_answer():
    for num in (1, 2, 3, 5):
        for chain in mneedle.generated(num, 4, seed=0):
            assert len(chain.needles) == num and chain.needles[-1].endswith(f"{chain.answer}.")
            assert chain.answer not in chain.question and sum(chain.answer in needle for needle in chain.needles) == 1
            for before, after in zip(chain.needles, chain.needles[1:], strict=False):
                name = before.rstrip(".").split()[-1]
                assert after.startswith(name) and name not in chain.question


def test_needles_of_a_chain_are_a_fixed_share_apart(tmp_path):
    options = dict(mneedle__lengths="1500", mneedle__depths="0,40", mneedle__trials=1, mneedle__buffer=200)
    setting = tiny_settings.setting(mneedle__counts="3", mneedle__spacing=20.0, **options)
    questions = mneedle.MultiNeedle().questions(setting)
    [chain] = mneedle.generated(3, 1, 0)
    for q in questions:
        text = text_of(q)
        context = text.split("few words.\n\n")[1].split("\n\nQuestion:")[0]
        places = [context.index(needle) / len(context) for needle in chain.needles]
        wanted = [q.about["depth"] / 100 + 0.2 * i for i in range(3)]
        np.testing.assert_allclose(places, wanted, atol=0.1)
        assert 1_250 < len(q.tokens) <= 1_350 and q.about["version"] == "generated"


def test_a_file_of_needlebench_is_read_as_it_is_and_named_by_its_hash(tmp_path):
    record = dict(derivation_count=2, derivations=["A is B.", "B is C."], question="What is A?", answer="C", extra=1)
    file = tmp_path / "needles.json"
    file.write_text(json.dumps([record]))
    options = dict(mneedle__lengths="900", mneedle__depths="50", mneedle__trials=1, mneedle__buffer=150)
    setting = tiny_settings.setting(mneedle__counts="2", mneedle__needles=str(file), **options)
    [question] = mneedle.MultiNeedle().questions(setting)
    assert question.golds == ("C",) and len(question.about["version"]) == 12
    assert "\nA is B.\n" in text_of(question) and "\nB is C.\n" in text_of(question)
    for bad, expected in [
        ([record | {"derivation_count": 3}], "record 1 must have derivation_count"),
        ([record, {"question": "x"}], "record 2 must have derivation_count"),
        ({}, "record 1 must have"),
        ([record | {"derivation_count": 1, "derivations": ["x"]}], "has no record of 2 needles"),
    ]:
        file.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=expected):
            mneedle.MultiNeedle().questions(setting)
    file.write_text("[")
    with pytest.raises(DataError, match="can't be read as JSON"):
        mneedle.MultiNeedle().questions(setting)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("niah", dict(niah__lengths="100,9000"), "eval.niah.lengths has 9000, but the model reads 4096 tokens"),
        ("ruler", dict(ruler__lengths="9000"), "eval.ruler.lengths has 9000"),
        ("mneedle", dict(mneedle__lengths="9000"), "eval.mneedle.lengths has 9000"),
        ("ruler", dict(ruler__lengths="900", ruler__tasks="vt,qa_1"), "eval.ruler.tasks names 'qa_1', but must"),
        ("mdqa", {}, "eval.mdqa.path is not set"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_runs(task, options, expected):
    with pytest.raises(ConfigError, match=expected):
        make_evaluators(tiny_settings.setting(**options), task)
    longer = {name: value for name, value in options.items() if "9000" in str(value)}
    if longer:
        make_evaluators(tiny_settings.setting(seq_len=9_000, **longer), task)


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        (niah.NeedleInAHaystack(), dict(niah__lengths="100"), "a needle of .* don't fit into 100"),
        (ruler.Ruler("cwe"), dict(ruler__lengths="900"), "cwe takes at least .* don't fit into 900"),
        (mneedle.MultiNeedle(), dict(mneedle__lengths="700"), "needles of .* don't fit into 700"),
        (mneedle.MultiNeedle(), dict(mneedle__buffer=20), "eval.mneedle.buffer is 20, but must be at least 50"),
        (mneedle.MultiNeedle(), dict(mneedle__lengths="1000", mneedle__buffer=60), "it must be larger"),
    ],
)
def test_what_has_no_room_is_said(task, options, expected):
    with pytest.raises((ConfigError, DataError), match=expected):
        task.questions(tiny_settings.setting(**{"mneedle__lengths": "1000", **options}))


def test_scores_of_questions_are_named_as_metrics():
    question = Question([1], ("one two.",), {})
    assert niah.NeedleInAHaystack().score("one two", question) == dict.fromkeys(niah.SCORES, 1.0)
    assert mneedle.MultiNeedle().score("two.", question) == {"word_share": 0.5}
    assert mdqa.MultiDocumentQA().score("One two\nx", question) == {"best_subspan_em": 1.0}
    assert kv.KeyValue().score("x\nONE TWO.", question) == {"accuracy": 1.0}
