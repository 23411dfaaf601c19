"""Summaries of articles: what is asked, what is measured, and the command from files to figures."""

import gzip
import json
import re
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from hub_folders import content_of, write_model
from judge_server import completion, serving
from meap_jax import config as config_lib
from meap_jax import evaluate
from meap_jax.convert import import_model
from meap_jax.errors import ConfigError, DataError
from meap_jax.evals.compare import compare
from meap_jax.evals.judge import Verdict
from meap_jax.evals.summaries import Article, Summarizing, draw, files_of, judged_metrics, open_judge, with_verdict
from meap_jax.results import Interval
from meap_jax.statistics import binomial_interval, mean_interval
from tiny_runs import ROOT

ARTICLES = [
    {
        "id": n,
        "document": f"Heavy snow closed road {n} in {1900 + n}. A plough came.",
        "summary": f"Snow shut road {n}.",
    }
    for n in range(1, 8)
]


def write(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


# ------------------------------------------------------------------------------------------------------ what is asked


def test_articles_are_drawn_by_the_seed_and_more_of_them_keep_what_fewer_were(tmp_path):
    file = write(tmp_path / "x.jsonl.gz", ARTICLES)
    few, more, every = (draw(file, "document", "summary", number, 3) for number in (2, 4, 99))
    assert len(few) == 2 and len(more) == 4 and set(few) < set(more)
    assert every == [Article(n, a["document"], a["summary"]) for n, a in enumerate(ARTICLES, start=1)]
    assert {tuple(draw(file, "document", "summary", 2, seed)) for seed in range(9)} > {tuple(few)}


def test_the_prompt_is_the_papers_and_holds_the_whole_article():
    task = Summarizing("summaries_x", [Article(4, "A {b} c.", "B.")], 9)
    [question] = task.questions(SimpleNamespace(encode=lambda text: text))
    assert question.tokens == "Summarize the following article: A {b} c."
    assert question.golds == ("B.",) and question.about == {"record": 4} and task.max_new_tokens == 9


def test_files_are_named_once_each():
    assert files_of("xsum=/a/x=1.jsonl, news=b.jsonl.gz").items() >= {("news", files_of("n=b.jsonl.gz")["n"])}
    for path in (None, "", "/a/x.jsonl", "a=", "a=x,a=y", "a/b=x", "a=x,"):
        with pytest.raises(ConfigError, match="eval.summaries.path is .* must be name=FILE"):
            files_of(path)


def test_the_page_makes_files_of_parquet(tmp_path, monkeypatch):
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "summaries.md").read_text(), re.DOTALL)
    (tmp_path / "xsum" / "default" / "test").mkdir(parents=True)
    table = pyarrow.Table.from_pylist([*ARTICLES, {"id": 8, "document": "", "summary": "Nothing."}])
    pyarrow.parquet.write_table(table, tmp_path / "xsum" / "default" / "test" / "0000.parquet")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/summaries.md", "exec"), {})
    found = draw(tmp_path / "xsum.jsonl", "document", "summary", 99, 0)
    assert [article.summary for article in found] == [article["summary"] for article in ARTICLES]


@pytest.mark.parametrize(
    "record, said",
    [({"document": "x"}, "no field 'summary'"), ({"document": 3, "summary": "x"}, "no text in the field 'document'")],
)
def test_a_line_without_a_field_is_named_even_if_it_would_not_be_drawn(tmp_path, record, said):
    for at in range(3):
        file = write(tmp_path / "x.jsonl", [*ARTICLES[:at], record, *ARTICLES[at:2]])
        with pytest.raises(DataError, match=rf"x.jsonl, line {at + 1} has {said}"):
            draw(file, "document", "summary", 1, 0)


# -------------------------------------------------------------------------------------------------- what is measured


def test_an_output_is_compared_with_the_reference_and_with_the_article():
    task = Summarizing("s", [Article(1, "Snow closed road 7 in 1907.", "Snow shut road 7.")], 9)
    [question] = task.questions(SimpleNamespace(encode=lambda text: text))
    scores = task.score("Snow closed road 8.", question)  # Shared with the reference: snow, road, and no pair.
    assert scores == pytest.approx(
        {
            "rouge1": 0.5, "rouge1_recall": 0.5, "rouge2": 0, "rouge2_recall": 0, "rougeL": 0.5, "rougeL_recall": 0.5,
            "faithful_1grams": 3 / 4, "faithful_2grams": 2 / 3, "faithful_3grams": 1 / 2, "faithful_numbers": 0,
        }
    )  # fmt: skip
    assert set(task.score("", question)) == {f"rouge{kind}{of}" for kind in "12L" for of in ("", "_recall")}


def test_metrics_are_means_over_the_articles_that_have_the_score():
    records = [
        {"output": "a b", "scores": {"rouge1": 0.2, "faithful_numbers": 1.0}},
        {"output": "", "scores": {"rouge1": 0.6}},
    ]
    found = Summarizing("s", [], 9).metrics(records)
    assert found == {
        "rouge1": mean_interval([0.2, 0.6]), "words": mean_interval([2, 0]),
        "faithful_numbers": Interval(1.0, None, None),
    }  # fmt: skip


def test_outputs_without_a_score_of_the_judge_are_counted_and_are_no_zeros():
    found = judged_metrics([Verdict(1, ""), Verdict(None, "Well."), Verdict(0, ""), Verdict(1, "")])
    assert found == {"judged": binomial_interval(2, 3), "not_judged": Interval(1.0, None, None)}
    assert judged_metrics([Verdict(None, "")]) == {"not_judged": Interval(1.0, None, None)}
    record = {"scores": {"rouge1": 1.0}}
    yes, well = with_verdict(record, Verdict(1, "Yes.")), with_verdict(record, Verdict(None, "Well."))
    assert yes == {"scores": {"rouge1": 1.0, "judged": 1.0}, "judge": {"score": 1, "reply": "Yes."}}
    assert well == {"scores": {"rouge1": 1.0}, "judge": {"score": None, "reply": "Well."}}


def test_two_models_are_compared_on_the_articles_on_which_both_have_a_score():
    def evaluation(*verdicts):
        records = [{"prompt": str(n), "record": n, "output": "", "scores": {"rouge1": 0.5}} for n in range(3)]
        return {"examples": {"summaries_x": [with_verdict(r, v) for r, v in zip(records, verdicts, strict=True)]}}

    a = evaluation(Verdict(1, "Yes."), Verdict(0, "No."), Verdict(None, "Well."))
    b = evaluation(Verdict(1, "Indeed."), Verdict(1, "Yes."), Verdict(0, "No."))
    rows = {row.name: row for row in compare(a, b)["summaries_x"]}
    assert rows["summaries_x/judged"].num_units == 2 and rows["summaries_x/judged"].difference.estimate == 0.5
    assert rows["summaries_x/rouge1"].num_units == 3


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The workdir of a tiny model that was imported."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder / "hub", content_of("llama"))
    import_model(folder / "hub", epath.Path(folder / "ours"))
    return folder / "ours"


def run(model, out, *, files, **options):
    """Runs the command; returns the results that it wrote."""
    path = ",".join(f"{name}={file}" for name, file in files.items())
    values = {"path": path, "max_new_tokens": 8, "num_documents": 3, **options}
    words = [f"--config.eval.summaries.{name}={value}" for name, value in values.items()]
    evaluate.command(["evaluate", f"--workdir={model}", "--tasks=summaries", f"--out={out}", "--mesh=data=1", *words])
    return json.loads(out.read_text())


def test_the_command_summarizes_judges_and_goes_on_where_the_budget_stopped_it(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    too_long = {"document": "snow " * 400, "summary": "Snow."}
    files = {
        "xsum": write(tmp_path / "x.jsonl", ARTICLES),
        "news": write(tmp_path / "n.jsonl", [*ARTICLES[:2], too_long]),
    }
    out = tmp_path / "found" / "results.json"

    def answer(_, body):
        return completion(f"Score: {int('Snow shut road 1' in body['messages'][0]['content'])}")

    with serving(answer) as server:
        options = dict(files=files, judge_url=server.url, judge_model="tester")
        with pytest.raises(ConfigError, match="judge_budget is 2, and tester has had 2 requests"):
            run(model, out, **options, judge_budget=2)
        assert not out.exists() and len(server.requests) == 2
        made = (tmp_path / "found" / "results" / "summaries_xsum.jsonl").read_bytes()
        results = run(model, out, **options, judge_budget=50)
        assert len(server.requests) == 5  # 3 + 2: the third article of news is too long.
        assert (tmp_path / "found" / "results" / "summaries_xsum.jsonl").read_bytes() == made
    metrics, records = results["metrics"], results["examples"]["summaries_news"]
    assert metrics["summaries_news/too_long"]["estimate"] == 1 and metrics["summaries_news/judged"]["estimate"] == 0.5
    assert metrics["summaries_xsum/not_judged"]["estimate"] == 0 and "summaries_xsum/rougeL" in metrics
    assert 0 < metrics["summaries_xsum/words"]["estimate"] <= 8
    assert [record.get("scores", {}).get("judged") for record in records] == [1, 0, None] and "too_long" in records[2]
    assert results["options"]["summaries.judge_model"] == "tester"
    written = capsys.readouterr().out + "".join(file.read_text() for file in tmp_path.rglob("*.json*"))
    assert "summaries_xsum/judged" in written and "sk-secret" not in written


def test_no_judge_is_asked_where_no_predictions_are_kept_as_during_training(tmp_path):
    config = config_lib.base()
    config.eval.summaries.update(judge_url="http://127.0.0.1:9/v1", judge_model="tester")
    assert open_judge(SimpleNamespace(config=config, folder=None)) is None
    assert open_judge(SimpleNamespace(config=config, folder=tmp_path)) is not None


def test_bad_settings_stop_before_anything_is_made(model, tmp_path):
    files = {"x": write(tmp_path / "x.jsonl", [*ARTICLES, {"document": "no summary"}])}
    with pytest.raises(DataError, match="x.jsonl, line 8 has no field 'summary'"):
        run(model, tmp_path / "results.json", files=files)
    for options, said in (({}, "judge_model is ''"), ({"judge_url": "here"}, "judge_url is 'here'")):
        with pytest.raises(ConfigError, match=said):
            options = {"judge_url": "http://a/v1", **options} | ({"judge_model": "m"} if options else {})
            run(model, tmp_path / "results.json", files=files, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl"]
